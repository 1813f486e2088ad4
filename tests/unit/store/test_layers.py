"""Layers: committed whole or not at all, found where they are, deleted when nobody uses them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from guestpull_server.config import LayerNames
from guestpull_server.errors import InvalidRequest, LayerInUse, WorkDirInUse
from guestpull_server.models import Decoder, Digest, UnpackedLayer
from guestpull_server.store import Fault, Store, audit
from support.images import Layer, file, image, layer
from support.stores import (
    AMD64,
    MountsInMemory,
    bundled,
    is_whole,
    lose_metadata,
    open_store,
    pulled,
    put_layer,
    resolved,
)

BASE, TOP, SIDE = layer(file("a")), layer(file("b")), layer(file("c"))
SHOP = image(BASE, TOP)
LATEST = "docker.io/library/shop:latest"


def digest_of(one: Layer) -> Digest:
    return Digest(one.digest)


def metadata_path(work_dir: Path, one: Layer) -> Path:
    return work_dir / "records" / f"{digest_of(one).directory_name}.json"


def test_a_committed_layer_is_there_with_all_that_is_known_of_it(store: Store, work_dir: Path) -> None:
    committed = put_layer(store, BASE)

    assert store.layer(digest_of(BASE)) == committed
    assert committed.store_path == str(work_dir / "layers" / committed.compressed_digest.directory_name)
    assert committed.uncompressed_digest == BASE.diff_id
    assert committed.decoder is Decoder.GZIP
    assert committed.size_bytes == 2 * len(BASE.tar)
    assert committed.implied_directories == (b"usr", b"\xff\xfe")
    assert is_whole(committed.store_path, BASE)


def test_a_layer_is_known_after_a_restart(store: Store, reopened: Callable[[], Store]) -> None:
    committed = put_layer(store, BASE)

    assert reopened().layer(digest_of(BASE)) == committed


def test_a_staged_layer_that_is_not_committed_leaves_nothing(store: Store, work_dir: Path) -> None:
    with store.stage(digest_of(BASE)) as staged:
        Path(staged.directory, "file").write_bytes(b"x")
        Path(staged.tar_split_path).write_bytes(b"x")

    assert os.listdir(work_dir / "staging") == []
    assert store.layer(digest_of(BASE)) is None


def test_staging_is_closed_to_others(store: Store, work_dir: Path) -> None:
    with store.stage(digest_of(BASE)) as staged:
        assert os.stat(staged.directory).st_mode & 0o777 == 0o755
        assert os.stat(work_dir / "staging").st_mode & 0o777 == 0o700


def test_committing_a_layer_again_keeps_the_first(store: Store, work_dir: Path) -> None:
    first = put_layer(store, BASE)
    inode = os.stat(first.store_path).st_ino

    assert put_layer(store, BASE) == first

    assert os.stat(first.store_path).st_ino == inode
    assert os.listdir(work_dir / "staging") == []


def test_a_layer_whose_directory_is_gone_is_not_there_and_can_be_committed_again(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    stored = pulled(store, SHOP, LATEST)
    shutil.rmtree(stored.layers[0].store_path)
    store = reopened()
    assert store.layer(digest_of(BASE)) is None
    assert [store.is_present(one) for one in store.find_image(SHOP.image_id, None).layers] == [False, True]

    pulled(store, SHOP, LATEST)

    found = store.layer(digest_of(BASE))
    assert found is not None
    assert is_whole(found.store_path, BASE)


def test_what_another_program_left_under_a_layers_name_is_never_believed(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    half = work_dir / "layers" / digest_of(BASE).directory_name
    half.mkdir()
    (half / "one").write_bytes(BASE.tar)
    assert reopened().layer(digest_of(BASE)) is None

    committed = put_layer(reopened(), BASE)

    assert is_whole(committed.store_path, BASE)


def test_facts_of_a_deleted_layer_do_not_vouch_for_a_directory_that_comes_later(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    pulled(store, SHOP, LATEST)
    store.remove_image(store.find_image(SHOP.image_id, None), None, force=False)
    (work_dir / "layers" / digest_of(BASE).directory_name).mkdir()

    assert reopened().layers() == ()


def test_facts_of_a_layer_that_vanished_do_not_vouch_for_a_directory_that_comes_later(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    put_layer(store, BASE)
    store.close()
    shutil.rmtree(work_dir / "layers" / digest_of(BASE).directory_name)
    (work_dir / "meta_store.json").unlink()
    reopened()

    (work_dir / "layers" / digest_of(BASE).directory_name).mkdir()

    assert reopened().layers() == ()


def test_facts_do_not_vouch_for_a_directory_that_an_entry_gives_to_another_layer(tmp_path: Path) -> None:
    store = open_store(tmp_path / "work", layer_names=LayerNames.INDEX)
    put_layer(store, BASE)
    store.close()
    meta = json.loads((tmp_path / "work/meta_store.json").read_bytes())
    other = meta["layer_db"].pop(BASE.digest)
    meta["layer_db"][TOP.digest] = other | {
        "compressed_digest": TOP.digest,
        "uncompressed_digest": TOP.diff_id,
    }
    (tmp_path / "work/meta_store.json").write_text(json.dumps(meta))

    store = open_store(tmp_path / "work", layer_names=LayerNames.INDEX)

    assert [one.compressed_digest for one in store.layers()] == [TOP.digest]
    store.close()


def test_a_layer_that_was_committed_but_not_written_down_is_taken_in(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    committed = put_layer(store, BASE)
    store.close()
    (work_dir / "meta_store.json").unlink()

    assert reopened().layer(digest_of(BASE)) == committed
    assert BASE.digest in json.loads((work_dir / "meta_store.json").read_bytes())["layer_db"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"compressed_digest":"sha', id="cut short"),
        pytest.param(b"\xff\xfe\n", id="not UTF-8"),
        pytest.param(b"[]", id="of another form"),
    ],
)
def test_damaged_metadata_is_deleted_and_damages_no_other(
    store: Store, work_dir: Path, reopened: Callable[[], Store], damage: bytes
) -> None:
    pulled(store, image(BASE), LATEST)
    second = put_layer(store, TOP)
    store.close()
    (path := metadata_path(work_dir, BASE)).write_bytes(damage)
    (finding,) = audit(str(work_dir))
    assert (finding.fault, finding.path) == (Fault.CORRUPT, str(path))

    store = reopened()

    assert str(path) in store.warnings[0]
    assert not path.exists()
    found = store.layer(digest_of(BASE))
    assert found is not None
    assert found.size_bytes == -1
    assert store.layer(digest_of(TOP)) == second


def test_metadata_of_another_directory_is_not_believed(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    pulled(store, SHOP, LATEST)
    store.close()
    metadata_path(work_dir, TOP).write_bytes(metadata_path(work_dir, BASE).read_bytes())

    store = reopened()

    assert {one.compressed_digest: one.size_bytes >= 0 for one in store.layers()} == {
        BASE.digest: True,
        TOP.digest: False,
    }


def test_metadata_that_is_lost_loses_nothing_essential(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    pulled(store, SHOP, LATEST)
    lose_metadata(work_dir)

    found = reopened().layer(digest_of(BASE))

    assert found is not None
    assert (found.size_bytes, found.implied_directories) == (-1, ())


def test_metadata_and_tar_split_go_with_their_layer(store: Store, work_dir: Path) -> None:
    put_layer(store, BASE, record=b"headers")
    stored = pulled(store, SHOP, LATEST)

    store.remove_image(stored, None, force=False)

    assert os.listdir(work_dir / "records") == []


def test_metadata_without_a_directory_vouches_for_no_directory_of_another_program(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    pulled(store, image(BASE), LATEST)
    (directory := work_dir / "layers" / digest_of(BASE).directory_name).rename(work_dir.parent / "away")
    reopened()
    directory.mkdir()

    found = reopened().layer(digest_of(BASE))

    assert found is not None
    assert found.size_bytes == -1


def test_a_second_owner_is_refused_by_the_number_of_the_first(store: Store, work_dir: Path) -> None:
    with pytest.raises(WorkDirInUse) as refused:
        open_store(work_dir)

    assert refused.value.owner == f"process {os.getpid()}"


def test_a_closed_work_directory_can_be_opened_again(store: Store, work_dir: Path) -> None:
    store.close()

    open_store(work_dir).close()


def test_a_pinned_layer_outlives_its_image(store: Store) -> None:
    stored = pulled(store, SHOP, LATEST)

    with store.pin([digest_of(BASE)]):
        removal = store.remove_image(stored, None, force=False)

    assert removal.deleted_layers == (digest_of(TOP),)
    assert store.layer(digest_of(BASE)) is not None


def test_a_record_goes_with_its_layer(store: Store, work_dir: Path) -> None:
    stored = put_layer(store, BASE, record=b"headers")
    record = store.tar_split_of(stored)
    assert record == str(work_dir / "records" / f"{stored.compressed_digest.directory_name}.record")
    assert Path(record).read_bytes() == b"headers"

    store.delete_unused([digest_of(BASE)])

    assert store.tar_split_of(stored) is None
    assert os.listdir(work_dir / "records") == []


def test_a_start_deletes_the_record_of_a_commit_that_a_crash_cut_off_and_no_other(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    stored = put_layer(store, BASE, record=b"headers")
    cut_off = work_dir / "records" / f"{digest_of(TOP).directory_name}.record"
    cut_off.write_bytes(b"headers")
    store.flush()
    shutil.rmtree(stored.store_path)  # as if layers/ were not mounted yet

    reopened()

    assert os.listdir(work_dir / "records") == [f"{stored.compressed_digest.directory_name}.record"]


# -- where they are ---------------------------------------------------------------------------------------


def test_a_second_work_directory_with_a_copy_of_meta_store_reuses_the_layers_of_the_first(
    store: Store, work_dir: Path, tmp_path: Path
) -> None:
    pulled(store, SHOP, LATEST)
    (tmp_path / "second").mkdir()
    shutil.copy(work_dir / "meta_store.json", tmp_path / "second")

    second = open_store(tmp_path / "second")

    found = second.image_for(LATEST, AMD64)
    assert found is not None
    assert found.layers == store.find_image(SHOP.image_id, None).layers
    assert all(second.layer(one.compressed_digest) == one for one in found.layers)
    assert all(second.is_present(one) and second.is_read_only(one) for one in found.layers)
    second.close()


def test_forgetting_an_image_deletes_nothing_of_another_store(
    store: Store, work_dir: Path, tmp_path: Path
) -> None:
    pulled(store, SHOP, LATEST)
    (tmp_path / "second").mkdir()
    shutil.copy(work_dir / "meta_store.json", tmp_path / "second")
    second = open_store(tmp_path / "second")

    removal = second.remove_image(second.find_image(SHOP.image_id, None), None, force=False)

    assert removal.deleted_layers == ()
    assert (second.layers(), second.images()) == ((), ())
    assert all(is_whole(one.store_path, of) for one, of in zip(store.layers(), SHOP.layers, strict=False))
    second.close()


def test_a_work_directory_that_was_moved_finds_its_layers_and_keeps_its_entries(
    store: Store, work_dir: Path, tmp_path: Path
) -> None:
    pulled(store, SHOP, LATEST)
    store.close()
    work_dir.rename(tmp_path / "moved")
    before = (tmp_path / "moved" / "meta_store.json").read_bytes()

    moved = open_store(tmp_path / "moved")

    found = moved.layer(digest_of(BASE))
    assert found is not None
    assert found.store_path == str(tmp_path / "moved" / "layers" / digest_of(BASE).directory_name)
    assert not moved.is_read_only(found)
    moved.close()
    assert (tmp_path / "moved" / "meta_store.json").read_bytes() == before


def test_a_running_number_is_not_taken_for_that_of_another_store(tmp_path: Path) -> None:
    first = open_store(tmp_path / "first", layer_names=LayerNames.INDEX)
    pulled(first, image(BASE), LATEST)
    first.close()
    second = open_store(tmp_path / "second", layer_names=LayerNames.INDEX)
    put_layer(second, TOP)
    second.close()
    meta = json.loads((tmp_path / "first" / "meta_store.json").read_bytes())
    ours = json.loads((tmp_path / "second" / "meta_store.json").read_bytes())
    meta["layer_db"] |= ours["layer_db"]
    (tmp_path / "second" / "meta_store.json").write_text(json.dumps(meta))
    shutil.rmtree(tmp_path / "first")

    second = open_store(tmp_path / "second")

    assert second.layer(digest_of(BASE)) is None
    assert second.layer(digest_of(TOP)) is not None
    second.close()


def test_a_read_only_store_that_was_made_for_our_own_path_keeps_its_own_layers(tmp_path: Path) -> None:
    own = open_store(tmp_path / "work", layer_names=LayerNames.INDEX)
    pulled(own, image(BASE), LATEST)
    own.close()
    baked = open_store(
        tmp_path / "baked", guest_work_dir=str(tmp_path / "work"), layer_names=LayerNames.INDEX
    )
    pulled(baked, image(TOP), "docker.io/library/other:1")
    baked.close(tidy=True)

    own = open_store(tmp_path / "work", additional_stores=[tmp_path / "baked"])

    theirs = own.layer(digest_of(TOP))
    assert theirs is not None
    assert is_whole(theirs.store_path, TOP)
    assert own.is_read_only(theirs)
    ours = own.layer(digest_of(BASE))
    assert ours is not None
    assert is_whole(ours.store_path, BASE)
    own.close()


def test_a_read_only_store_outlives_the_same_layers_at_the_path_that_it_was_made_for(tmp_path: Path) -> None:
    baked = open_store(tmp_path / "baked", guest_work_dir=str(tmp_path / "work"))
    pulled(baked, SHOP, "docker.io/library/other:1")
    baked.close(tidy=True)
    own = open_store(tmp_path / "work", additional_stores=[tmp_path / "baked"])
    for one in SHOP.layers:
        put_layer(own, one)
    own.record_image(resolved(SHOP, LATEST), [one for one in own.layers() if not own.is_read_only(one)])
    own.remove_image(own.find_image(LATEST, LATEST), LATEST, force=False)

    found = own.find_image("docker.io/library/other:1", "docker.io/library/other:1")

    assert all(own.is_present(one) and own.is_read_only(one) for one in found.layers)
    own.close()


@pytest.mark.parametrize("keeps_metadata", [True, False], ids=["of ours", "of image-rs"])
def test_two_stores_that_were_made_at_the_same_path_are_not_taken_for_each_other(
    tmp_path: Path, keeps_metadata: bool
) -> None:
    for of, name in ((TOP, "other"), (BASE, "work")):
        store = open_store(tmp_path / "work", layer_names=LayerNames.INDEX)
        pulled(store, image(of), f"docker.io/library/{name}:1")
        store.close()
        if not keeps_metadata:
            lose_metadata(tmp_path / "work")
        if name == "other":
            (tmp_path / "work").rename(tmp_path / "other")

    store = open_store(tmp_path / "work", additional_stores=[tmp_path / "other"])

    for of in (TOP, BASE):
        found = store.layer(digest_of(of))
        assert found is not None
        assert is_whole(found.store_path, of)
    store.close()


def test_a_store_that_says_where_its_layers_are_may_mean_others_as_well(tmp_path: Path) -> None:
    """image-rs, started with a copy of another work directory's meta_store.json; its numbers begin anew."""
    first = open_store(tmp_path / "first", layer_names=LayerNames.INDEX)
    pulled(first, image(TOP, BASE), LATEST)
    first.close()
    meta = json.loads((tmp_path / "first/meta_store.json").read_bytes())
    (second := tmp_path / "second/layers").mkdir(parents=True)
    shutil.copytree(tmp_path / "first/layers/0", second / "0")
    (second / "1").mkdir()  # half unpacked
    meta["layer_db"][TOP.digest]["store_path"] = str(second / "0")
    for entry in meta["image_db"].values():
        entry["layer_metas"][0]["store_path"] = str(second / "0")
    (tmp_path / "second/meta_store.json").write_text(json.dumps(meta))

    store = open_store(tmp_path / "work", additional_stores=[tmp_path / "second"])

    found = store.layer(digest_of(BASE))
    assert found is not None
    assert found.store_path == str(tmp_path / "first/layers/1")
    store.close()


def test_store_paths_are_written_as_the_guest_sees_them_and_found_where_they_are(tmp_path: Path) -> None:
    store = open_store(tmp_path / "rootfs/image", guest_work_dir="/run/kata-containers/image")

    stored = pulled(store, image(BASE), LATEST).layers[0]

    store.close()
    meta = json.loads((tmp_path / "rootfs/image/meta_store.json").read_bytes())
    name = digest_of(BASE).directory_name
    assert meta["layer_db"][BASE.digest]["store_path"] == f"/run/kata-containers/image/layers/{name}"
    assert stored.store_path == f"{tmp_path}/rootfs/image/layers/{name}"
    again = open_store(tmp_path / "rootfs/image", guest_work_dir="/run/kata-containers/image/")
    assert again.layer(digest_of(BASE)) == stored
    assert not again.is_read_only(stored)
    again.close()


def test_paths_that_were_written_before_are_written_as_the_guest_sees_them(
    store: Store, work_dir: Path, tmp_path: Path
) -> None:
    other = open_store(tmp_path / "other")
    put_layer(other, TOP)
    other.close()
    store.close()
    store = open_store(work_dir, additional_stores=[tmp_path / "other"])
    pulled(store, SHOP, LATEST)
    store.close()

    open_store(work_dir, guest_work_dir="/run/image").close()

    meta = json.loads((work_dir / "meta_store.json").read_bytes())
    names = [digest_of(one).directory_name for one in (BASE, TOP)]
    expected = [f"/run/image/layers/{names[0]}", f"{tmp_path}/other/layers/{names[1]}"]
    assert [meta["layer_db"][one.digest]["store_path"] for one in (BASE, TOP)] == expected
    assert [one["store_path"] for one in meta["image_db"][SHOP.image_id]["layer_metas"]] == expected
    assert audit(str(work_dir), "/run/image") == ()


def test_a_store_that_was_moved_is_written_for_its_guest(
    store: Store, work_dir: Path, tmp_path: Path
) -> None:
    pulled(store, SHOP, LATEST)
    store.close()
    work_dir.rename(tmp_path / "moved")
    work_dir.mkdir()

    moved = open_store(tmp_path / "moved", guest_work_dir="/run/image")

    assert all(moved.is_present(one) and not moved.is_read_only(one) for one in moved.layers())
    moved.close()
    assert str(tmp_path).encode() not in (tmp_path / "moved/meta_store.json").read_bytes()


def test_a_work_directory_reached_by_a_link_is_the_same_work_directory(
    store: Store, work_dir: Path, tmp_path: Path
) -> None:
    pulled(store, SHOP, LATEST)
    store.close()
    (tmp_path / "link").symlink_to(work_dir)

    linked = open_store(tmp_path / "link")

    removal = linked.remove_image(linked.find_image(SHOP.image_id, None), None, force=False)
    assert set(removal.deleted_layers) == {digest_of(BASE), digest_of(TOP)}
    linked.close()


def test_running_numbers_follow_the_order_of_layers_not_that_of_downloads(tmp_path: Path) -> None:
    store = open_store(tmp_path / "work", layer_names=LayerNames.INDEX)
    with store.pin([digest_of(BASE), digest_of(TOP), digest_of(SIDE)]):
        committed = [put_layer(store, one) for one in (SIDE, TOP, BASE)]

    assert [Path(one.store_path).name for one in committed] == ["2", "1", "0"]
    store.close()


def test_a_running_number_of_a_layer_that_is_gone_is_not_given_to_another(tmp_path: Path) -> None:
    store = open_store(tmp_path / "work", layer_names=LayerNames.INDEX)
    pulled(store, SHOP, LATEST)
    store.close()
    shutil.rmtree(tmp_path / "work/layers/1")
    store = open_store(tmp_path / "work")

    put_layer(store, SIDE)

    assert store.layer(digest_of(TOP)) is None
    assert sorted(os.listdir(tmp_path / "work/layers")) == ["0", "2"]
    store.close()


def test_running_numbers_go_on_where_they_ended(tmp_path: Path) -> None:
    (tmp_path / "work/layers/7").mkdir(parents=True)
    store = open_store(tmp_path / "work", layer_names=LayerNames.INDEX)

    assert Path(put_layer(store, BASE).store_path).name == "8"
    store.close()


# -- repair -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", [*LayerNames, None])
def test_layers_are_named_as_those_that_are_there(tmp_path: Path, naming: LayerNames | None) -> None:
    for one in (BASE, TOP):
        store = open_store(tmp_path / "work", layer_names=naming if one is BASE else None)
        put_layer(store, one)
        store.close()

    expected = (
        ["0", "1"] if naming is LayerNames.INDEX else [digest_of(one).directory_name for one in (BASE, TOP)]
    )
    assert sorted(os.listdir(tmp_path / "work/layers")) == sorted(expected)


@pytest.mark.parametrize("naming", LayerNames)
def test_names_of_two_kinds_are_not_mixed(tmp_path: Path, naming: LayerNames) -> None:
    store = open_store(tmp_path / "work", layer_names=naming)
    put_layer(store, BASE)
    store.close()
    (other,) = set(LayerNames) - {naming}

    with pytest.raises(InvalidRequest, match=f"named by {naming.value}"):
        open_store(tmp_path / "work", layer_names=other)

    open_store(tmp_path / "work", layer_names=naming).close()


def test_a_layer_that_is_not_what_it_should_be_can_be_discarded_and_pulled_again(store: Store) -> None:
    stored = pulled(store, SHOP, LATEST)
    os.unlink(os.path.join(stored.layers[0].store_path, "one"))

    deleted = store.discard_layer(digest_of(BASE))

    assert deleted.layers == (digest_of(BASE),)
    assert store.layer(digest_of(BASE)) is None
    assert len(store.images()) == 1
    pulled(store, SHOP, LATEST)
    found = store.layer(digest_of(BASE))
    assert found is not None
    assert is_whole(found.store_path, BASE)


def test_a_layer_that_is_mounted_is_not_discarded(
    store: Store, mounts: MountsInMemory, tmp_path: Path
) -> None:
    bundled(store, pulled(store, SHOP, LATEST), tmp_path / "bundle", mounts)

    with pytest.raises(LayerInUse) as refused:
        store.discard_layer(digest_of(BASE))

    assert refused.value.bundles == (str(tmp_path / "bundle"),)
    assert store.layer(digest_of(BASE)) is not None


def test_a_layer_with_a_wrong_diff_id_is_replaced_by_the_right_one(store: Store) -> None:
    with store.stage(digest_of(BASE)) as staged:
        wrong = UnpackedLayer(Digest(TOP.diff_id), Decoder.GZIP, 0, 0, (), 0)
        store.commit_layer(staged, digest_of(BASE), wrong)

    committed = put_layer(store, BASE)

    assert committed.uncompressed_digest == BASE.diff_id
    assert is_whole(committed.store_path, BASE)
