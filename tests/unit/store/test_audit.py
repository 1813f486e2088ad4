"""Audits and garbage: what is wrong is found and named, what nobody needs is deleted, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guestpull_server.errors import InvalidStore, WorkDirInUse
from guestpull_server.models import Digest
from guestpull_server.store import Fault, Finding, Store, audit, collect_garbage, gather_proof_inputs
from support.images import Layer, file, image, layer
from support.stores import MountsInMemory, bundled, lose_metadata, open_store, pulled, put_layer

BASE, TOP, SIDE = layer(file("a")), layer(file("b")), layer(file("c"))
SHOP = image(BASE, TOP)
LATEST = "docker.io/library/shop:latest"


@pytest.fixture
def shop(store: Store, work_dir: Path) -> Path:
    """A work directory that holds SHOP, and has no owner."""
    pulled(store, SHOP, LATEST)
    store.close()
    return work_dir


def directory_of(work_dir: Path, one: Layer) -> Path:
    return work_dir / "layers" / one.digest.replace(":", "_")


def tree(work_dir: Path) -> list[str]:
    return sorted(str(path) for path in work_dir.rglob("*"))


def found(work_dir: Path) -> list[tuple[Fault, str]]:
    return [(one.fault, os.path.relpath(one.path, work_dir)) for one in audit(str(work_dir))]


def collected(work_dir: Path, mounts: MountsInMemory, *, dry_run: bool = False) -> set[str]:
    return {
        os.path.relpath(one.path, work_dir) for one in collect_garbage(str(work_dir), mounts, dry_run=dry_run)
    }


def test_nothing_is_wrong_with_a_store_that_is_whole(shop: Path) -> None:
    assert audit(str(shop)) == ()


def test_nothing_is_wrong_with_an_empty_directory(tmp_path: Path) -> None:
    assert audit(str(tmp_path)) == ()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("look", [audit, lambda path: collect_garbage(path, MountsInMemory(), dry_run=True)])
def test_a_work_directory_that_is_not_there_is_an_error(
    tmp_path: Path, look: Callable[[str], object]
) -> None:
    with pytest.raises(InvalidStore):
        look(str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_an_audit_changes_nothing(shop: Path) -> None:
    (shop / "meta_store.json").write_bytes(b"{")
    (shop / "staging/left").mkdir()
    before = tree(shop)

    audit(str(shop))

    assert tree(shop) == before


def test_a_missing_layer_is_found_with_the_images_that_need_it(shop: Path) -> None:
    shutil.rmtree(directory_of(shop, BASE))

    (finding,) = audit(str(shop))

    assert finding.fault is Fault.MISSING
    assert (finding.layer, finding.images) == (BASE.digest, (SHOP.image_id,))
    assert BASE.digest in finding.sentence
    assert "verify --repair" in finding.remedy


def image_entry(work_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the entry of the one image."""
    meta = json.loads((work_dir / "meta_store.json").read_bytes())
    (entry,) = meta["image_db"].values()
    change(entry)
    (work_dir / "meta_store.json").write_text(json.dumps(meta))


def reverse(entry: dict[str, Any]) -> None:
    entry["layer_metas"].reverse()


def move(entry: dict[str, Any]) -> None:
    entry["layer_metas"][0]["store_path"] = "/elsewhere/layers/0"


def encrypt(entry: dict[str, Any]) -> None:
    entry["layer_metas"][0]["encrypted"] = True


def repeat(entry: dict[str, Any]) -> None:
    entry["layer_metas"].append(entry["layer_metas"][0])


@pytest.mark.parametrize("change", [reverse, move, encrypt, repeat])
def test_what_image_rs_would_mount_otherwise_is_corrupt_and_put_right_by_a_start(
    shop: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    before = json.loads((shop / "meta_store.json").read_bytes())
    image_entry(shop, change)

    (finding,) = audit(str(shop))

    assert finding.fault is Fault.CORRUPT
    assert SHOP.image_id in finding.sentence
    store = open_store(shop)
    assert SHOP.image_id in " ".join(store.warnings)
    store.close()
    assert audit(str(shop)) == ()
    assert json.loads((shop / "meta_store.json").read_bytes()) == before


def test_a_layer_that_occurs_twice_may_be_anywhere_in_what_image_rs_wrote(
    store: Store, work_dir: Path
) -> None:
    doubled = image(BASE, TOP, BASE)
    pulled(store, doubled, LATEST)
    store.close()
    image_entry(work_dir, reverse)  # image-rs leaves it at its bottom-most place

    assert [one.fault for one in audit(str(work_dir))] == [Fault.CORRUPT]
    for copy in (work_dir / "images").iterdir():
        copy.unlink()
    assert audit(str(work_dir)) == ()


def test_a_copy_is_audited_although_what_it_was_copied_from_is_still_there(
    shop: Path, tmp_path: Path
) -> None:
    shutil.copytree(shop, tmp_path / "copy")
    (directory_of(tmp_path / "copy", BASE) / "one").unlink()

    (finding,) = audit(str(tmp_path / "copy"))

    assert finding.fault is Fault.INCOMPLETE
    assert Path(finding.path) == directory_of(tmp_path / "copy", BASE)
    recorded = gather_proof_inputs(str(tmp_path / "copy")).layers
    assert {Path(one.layer.store_path).parent for one in recorded} == {tmp_path / "copy/layers"}


@pytest.mark.parametrize("change", ["a file less", "a byte less", "a file more"])
def test_a_layer_that_does_not_hold_its_bytes_is_incomplete(shop: Path, change: str) -> None:
    match change:
        case "a file less":
            (directory_of(shop, BASE) / "one").unlink()
        case "a byte less":
            os.truncate(directory_of(shop, BASE) / "one", len(BASE.tar) - 1)
        case _:
            (directory_of(shop, BASE) / "three").write_bytes(b"x")

    (finding,) = audit(str(shop))

    assert finding.fault is Fault.INCOMPLETE
    assert (finding.layer, finding.images) == (BASE.digest, (SHOP.image_id,))


def test_hard_links_are_counted_once_and_links_are_not_followed(store: Store, work_dir: Path) -> None:
    stored = put_layer(store, BASE)
    os.link(f"{stored.store_path}/one", f"{stored.store_path}/three")
    os.symlink("/", f"{stored.store_path}/four")
    store.close()

    assert audit(str(work_dir)) == ()


def test_an_entry_that_says_another_diff_id_is_corrupt_and_put_right_by_a_start(shop: Path) -> None:
    meta = json.loads((shop / "meta_store.json").read_bytes())
    meta["layer_db"][BASE.digest]["uncompressed_digest"] = TOP.diff_id
    (shop / "meta_store.json").write_text(json.dumps(meta))
    assert [fault for fault, _ in found(shop)] == [Fault.CORRUPT]

    open_store(shop).close()

    assert audit(str(shop)) == ()


def test_a_missing_layer_that_nobody_needs_is_for_gc(
    store: Store, work_dir: Path, mounts: MountsInMemory
) -> None:
    put_layer(store, SIDE)
    store.close()
    shutil.rmtree(directory_of(work_dir, SIDE))
    (finding,) = audit(str(work_dir))
    assert (finding.fault, finding.images) == (Fault.MISSING, ())
    assert "gc" in finding.remedy

    collect_garbage(str(work_dir), mounts)

    assert audit(str(work_dir)) == ()


def test_a_config_that_was_changed_is_corrupt(shop: Path) -> None:
    meta = json.loads((shop / "meta_store.json").read_bytes())
    meta["image_db"][SHOP.image_id]["image_config"]["config"] = {"User": "root"}
    (shop / "meta_store.json").write_text(json.dumps(meta))

    assert found(shop) == [(Fault.CORRUPT, "meta_store.json")]


def test_a_damaged_meta_store_is_found_before_and_noted_after_it_is_set_aside(shop: Path) -> None:
    (shop / "meta_store.json").write_bytes(b"{")
    assert found(shop) == [(Fault.CORRUPT, "meta_store.json")]

    open_store(shop).close()

    ((fault, path),) = found(shop)
    assert fault is Fault.NOTE
    assert path.startswith("meta_store.json.corrupt-")


def test_entries_that_cannot_be_used_are_corrupt(shop: Path) -> None:
    meta = json.loads((shop / "meta_store.json").read_bytes())
    meta["layer_db"]["x"] = {}
    (shop / "meta_store.json").write_text(json.dumps(meta))

    assert found(shop) == [(Fault.CORRUPT, "meta_store.json")]


def test_what_belongs_to_nothing_is_foreign(shop: Path) -> None:
    (shop / "layers/theirs").mkdir()
    (shop / "layers/5").write_bytes(b"x")
    (shop / "records/gone.record").write_bytes(b"x")
    (shop / "overlay/theirs").mkdir()
    (shop / "overlay/0").mkdir()  # as image-rs has it
    (shop / "notes.txt").write_bytes(b"x")

    assert found(shop) == [
        (Fault.FOREIGN, "layers/5"),
        (Fault.FOREIGN, "layers/theirs"),
        (Fault.FOREIGN, "records/gone.record"),
        (Fault.FOREIGN, "overlay/theirs"),
        (Fault.NOTE, "notes.txt"),
    ]


def test_what_a_crash_left_is_incomplete(shop: Path, mounts: MountsInMemory, tmp_path: Path) -> None:
    store = open_store(shop, mounts)
    store.reserve_bundle(str(tmp_path / "bundle"))
    put_layer(store, SIDE)
    (shop / "staging/left").mkdir()
    before = (shop / "meta_store.json").read_bytes()
    store.close()
    (shop / "meta_store.json").write_bytes(before)
    (shop / "meta_store.json.new").write_bytes(b"{")

    (overlay,) = os.listdir(shop / "overlay")
    assert found(shop) == [
        (Fault.INCOMPLETE, str(directory_of(shop, SIDE).relative_to(shop))),
        (Fault.INCOMPLETE, "staging/left"),
        (Fault.INCOMPLETE, "meta_store.json.new"),
        (Fault.INCOMPLETE, f"overlay/{overlay}"),
    ]


def test_what_a_daemon_is_in_the_middle_of_is_not_found_fault_with(store: Store, work_dir: Path) -> None:
    with store.reserve_bundle(str(work_dir.parent / "bundle")), store.stage(Digest(BASE.digest)):
        put_layer(store, TOP)

        assert audit(str(work_dir)) == ()


def test_a_bundle_whose_layers_are_gone_is_found(
    store: Store, work_dir: Path, mounts: MountsInMemory, tmp_path: Path
) -> None:
    bundled(store, pulled(store, image(BASE), LATEST), tmp_path / "bundle", mounts)
    store.close()
    shutil.rmtree(directory_of(work_dir, BASE))

    assert [fault for fault, path in found(work_dir) if path.startswith("overlay/")] == [Fault.MISSING]


def test_a_baked_store_is_audited_as_its_guest_sees_it(tmp_path: Path) -> None:
    store = open_store(tmp_path / "baked", guest_work_dir="/run/image")
    pulled(store, SHOP, LATEST)
    store.close(tidy=True)

    assert audit(str(tmp_path / "baked"), "/run/image") == ()


def test_a_finding_is_a_sentence_and_a_remedy(shop: Path) -> None:
    shutil.rmtree(directory_of(shop, BASE))
    (shop / "layers/theirs").mkdir()

    for finding in audit(str(shop)):
        assert isinstance(finding, Finding)
        assert finding.sentence.endswith(".")
        assert finding.remedy.endswith(".")


# -- garbage ------------------------------------------------------------------------------------------------


def test_a_store_that_is_whole_has_no_garbage(shop: Path, mounts: MountsInMemory) -> None:
    before = tree(shop)

    assert collected(shop, mounts) == set()

    assert tree(shop) == before


def test_layers_that_nobody_uses_are_garbage(
    store: Store, work_dir: Path, mounts: MountsInMemory, tmp_path: Path
) -> None:
    stored = pulled(store, SHOP, LATEST)
    bundled(store, stored, tmp_path / "bundle", mounts)
    store.remove_image(stored, None, force=True)
    put_layer(store, SIDE, record=b"x")
    store.close()

    (garbage,) = collect_garbage(str(work_dir), mounts)

    assert garbage.path == str(directory_of(work_dir, SIDE))
    assert garbage.size_bytes == 2 * len(SIDE.tar)
    assert sorted(os.listdir(work_dir / "layers")) == sorted(
        directory_of(work_dir, one).name for one in (BASE, TOP)
    )
    assert sorted(os.listdir(work_dir / "records")) == sorted(
        f"{directory_of(work_dir, one).name}.json" for one in (BASE, TOP)
    )
    assert audit(str(work_dir)) == ()


COPY_OF_NONE = f"images/sha256_{'0' * 64}.json"
GARBAGE = {
    "layers/theirs",
    "records/theirs.record",
    "records/gone.record",
    "records/foreign",
    "images/foreign.txt",
    COPY_OF_NONE,
    f"{COPY_OF_NONE}.new",
    "staging/left",
    "meta_store.json.new",
}


@pytest.fixture
def littered(shop: Path) -> Path:
    (shop / "layers/theirs/deep").mkdir(parents=True)
    (shop / "records/gone.record").write_bytes(b"x")
    (shop / "records/theirs.record").write_bytes(b"x")
    (shop / "records/foreign").symlink_to("/")
    for name in ("images/foreign.txt", COPY_OF_NONE, f"{COPY_OF_NONE}.new"):
        (shop / name).write_bytes(b"x")
    (shop / "staging/left").mkdir()
    (shop / "meta_store.json.new").write_bytes(b"{")
    (shop / "meta_store.json.corrupt-20260101T000000Z").write_bytes(b"{")
    (shop / "overlay/theirs").mkdir()
    (shop / "notes.txt").write_bytes(b"x")
    return shop


def test_what_belongs_to_nothing_is_deleted_and_what_may_be_somebodys_is_not(
    littered: Path, mounts: MountsInMemory
) -> None:
    before = set(tree(littered))

    assert collected(littered, mounts) == GARBAGE

    gone = {os.path.relpath(path, littered) for path in before - set(tree(littered))}
    assert gone == GARBAGE | {"layers/theirs/deep"}


def test_a_dry_run_says_the_same_and_deletes_nothing(littered: Path, mounts: MountsInMemory) -> None:
    before = tree(littered)

    assert collected(littered, mounts, dry_run=True) == GARBAGE

    assert tree(littered) == before


def test_all_garbage_is_found_by_an_audit(littered: Path) -> None:
    names = {name for fault, name in found(littered) if fault is not Fault.NOTE}

    assert names == GARBAGE | {"overlay/theirs"}


def forget(work_dir: Path, *places: str) -> None:
    """Take entries out of meta_store.json."""
    meta = json.loads((work_dir / "meta_store.json").read_bytes())
    for place in places:
        meta[place].clear()
    (work_dir / "meta_store.json").write_text(json.dumps(meta))


def test_a_layer_that_was_not_written_down_is_garbage_if_nobody_uses_it(
    shop: Path, mounts: MountsInMemory
) -> None:
    forget(shop, "image_db", "layer_db")
    expected = collected(shop, mounts, dry_run=True)

    assert collected(shop, mounts) == expected

    assert {f"layers/{directory_of(shop, one).name}" for one in (BASE, TOP)} < expected
    assert collected(shop, mounts, dry_run=True) == set()


@pytest.mark.parametrize(
    "damage",
    [
        lambda work_dir: (work_dir / "meta_store.json").write_bytes(b"{"),
        lambda work_dir: (work_dir / "meta_store.json").unlink(),
        lose_metadata,
        lambda work_dir: forget(work_dir, "layer_db"),
        lambda work_dir: forget(work_dir, "image_db"),
        lambda work_dir: image_entry(work_dir, lambda entry: entry.update(layer_metas=5)),
    ],
    ids=["damaged", "no meta store", "no metadata", "no layers", "no images", "an entry of no use"],
)
def test_a_dry_run_says_what_is_deleted_then_whatever_opening_puts_right(
    littered: Path, mounts: MountsInMemory, damage: Callable[[Path], object]
) -> None:
    damage(littered)
    before = set(tree(littered))
    expected = collected(littered, mounts, dry_run=True)

    assert collected(littered, mounts) == expected

    gone = {os.path.relpath(path, littered) for path in before - set(tree(littered))}
    assert expected <= gone
    of_layers = {f"records/{Path(one).name}.json" for one in expected if one.startswith("layers/")}
    assert all(any(f"{name}/".startswith(f"{one}/") for one in expected) for name in gone - of_layers)


def test_a_bundle_that_was_not_finished_is_garbage(
    store: Store, work_dir: Path, mounts: MountsInMemory, tmp_path: Path
) -> None:
    bundle = store.reserve_bundle(str(tmp_path / "bundle"))
    mounts.places.add(bundle.rootfs)
    store.close()

    assert collected(work_dir, mounts) == {os.path.relpath(bundle.overlay_directory, work_dir)}

    assert mounts.places == set()
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_beside_a_daemon_it_is_refused(store: Store, work_dir: Path, dry_run: bool) -> None:
    with pytest.raises(WorkDirInUse):
        collect_garbage(str(work_dir), MountsInMemory(), dry_run=dry_run)


def test_where_entries_cannot_be_used_no_directory_is_a_stray(shop: Path, mounts: MountsInMemory) -> None:
    meta = json.loads((shop / "meta_store.json").read_bytes())
    meta["layer_db"]["unknown"] = {"store_path": str(shop / "layers/theirs")}
    (shop / "meta_store.json").write_text(json.dumps(meta))
    (shop / "layers/theirs").mkdir()

    assert collected(shop, mounts) == set()


def test_layers_of_another_store_are_nobodys_garbage(
    shop: Path, tmp_path: Path, mounts: MountsInMemory
) -> None:
    (tmp_path / "second").mkdir()
    meta = json.loads((shop / "meta_store.json").read_bytes())
    meta["image_db"] = {}
    (tmp_path / "second/meta_store.json").write_text(json.dumps(meta))

    assert collected(tmp_path / "second", mounts) == set()
    assert directory_of(shop, BASE).is_dir()


def test_garbage_of_a_baked_store_is_what_its_guest_does_not_use(
    tmp_path: Path, mounts: MountsInMemory
) -> None:
    store = open_store(tmp_path / "baked", guest_work_dir="/run/image")
    pulled(store, SHOP, LATEST)
    put_layer(store, SIDE)
    store.close(tidy=True)

    garbage = collect_garbage(str(tmp_path / "baked"), mounts, guest_work_dir="/run/image")

    assert [one.path for one in garbage] == [str(directory_of(tmp_path / "baked", SIDE))]
    assert audit(str(tmp_path / "baked"), "/run/image") == ()
