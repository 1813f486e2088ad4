"""A damaged meta_store.json: set aside, reported, and rebuilt as far as it is certain."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from guestpull_server.models import Digest
from guestpull_server.store import Store, audit
from support.images import file, image, layer
from support.stores import AMD64, MountsInMemory, bundled, open_store, pulled, put_layer

BASE, TOP, SIDE = layer(file("a")), layer(file("b")), layer(file("c"))
SHOP, OTHER = image(BASE, TOP), image(BASE, SIDE)
LATEST = "docker.io/library/shop:latest"


def damage(work_dir: Path) -> bytes:
    whole = (work_dir / "meta_store.json").read_bytes()
    (work_dir / "meta_store.json").write_bytes(whole[: len(whole) // 2])
    return whole[: len(whole) // 2]


def set_aside(work_dir: Path) -> list[Path]:
    return sorted(work_dir.glob("meta_store.json.corrupt-*"))


def test_a_damaged_file_is_set_aside_and_reported(store: Store, work_dir: Path) -> None:
    pulled(store, SHOP, LATEST)
    store.close()
    damaged = damage(work_dir)

    store = open_store(work_dir)

    (aside,) = set_aside(work_dir)
    assert aside.read_bytes() == damaged
    assert store.damaged
    assert str(aside) in store.warnings[0]
    assert "1 images and 2 layers are certain" in store.warnings[1]
    store.close()


def test_an_undamaged_file_is_no_news(store: Store, work_dir: Path) -> None:
    pulled(store, SHOP, LATEST)
    store.close()

    store = open_store(work_dir)

    assert not store.damaged
    assert store.warnings == ()
    store.close()


def test_files_that_were_set_aside_before_are_kept(store: Store, work_dir: Path) -> None:
    for _ in range(3):
        pulled(store, SHOP, LATEST)
        store.close()
        damage(work_dir)
        store = open_store(work_dir)
    store.close()

    assert len(set_aside(work_dir)) == 3


@pytest.mark.parametrize("is_there", [True, False])
def test_images_layers_and_bundles_come_back(
    store: Store, work_dir: Path, mounts: MountsInMemory, tmp_path: Path, is_there: bool
) -> None:
    pulled(store, OTHER, "docker.io/library/other:1")
    stored = pulled(store, SHOP, LATEST)
    bundled(store, stored, tmp_path / "bundle", mounts)
    before = (sorted(store.layers(), key=str), sorted(store.images(), key=str), store.bundles())
    store.close()
    whole = (work_dir / "meta_store.json").read_bytes()
    if is_there:
        damage(work_dir)
    else:
        (work_dir / "meta_store.json").unlink()
    assert any("meta_store.json is damaged" in finding.sentence for finding in audit(str(work_dir)))

    store = open_store(work_dir, mounts)

    assert store.damaged
    assert (sorted(store.layers(), key=str), sorted(store.images(), key=str), store.bundles()) == before
    assert (work_dir / "meta_store.json").read_bytes() == whole
    store.close()


def test_a_config_that_another_program_wrote_anew_does_not_spoil_what_is_certain(
    store: Store, work_dir: Path
) -> None:
    for name in (LATEST, "docker.io/library/shop:2"):
        pulled(store, SHOP, name)
    store.close()
    path = work_dir / "meta_store.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=1))
    store = open_store(work_dir)
    store.remove_image(store.find_image(LATEST, LATEST), LATEST, force=False)
    store.close()
    damage(work_dir)

    store = open_store(work_dir)

    assert [one.image_id for one in store.images()] == [SHOP.image_id]
    assert store.images()[0].references == ("docker.io/library/shop:2",)
    store.close()


def test_a_removed_image_does_not_come_back(store: Store, work_dir: Path) -> None:
    pulled(store, OTHER, "docker.io/library/other:1")
    store.remove_image(pulled(store, SHOP, LATEST), None, force=False)
    store.close()
    damage(work_dir)

    store = open_store(work_dir)

    assert [one.image_id for one in store.images()] == [OTHER.image_id]
    assert {one.compressed_digest for one in store.layers()} == {BASE.digest, SIDE.digest}
    store.close()


def test_a_tag_that_moved_does_not_move_back(store: Store, work_dir: Path) -> None:
    pulled(store, SHOP, LATEST)
    pulled(store, OTHER, LATEST)
    store.close()
    damage(work_dir)

    store = open_store(work_dir)

    found = store.image_for(LATEST, AMD64)
    assert found is not None
    assert found.image_id == OTHER.image_id
    assert store.find_image(SHOP.image_id, None).references == (f"docker.io/library/shop@{SHOP.digest}",)
    store.close()


@pytest.mark.parametrize("doubt", ["a layer is gone", "its config was changed", "it was cut short"])
def test_an_image_that_is_not_certain_does_not_come_back(store: Store, work_dir: Path, doubt: str) -> None:
    stored = pulled(store, SHOP, LATEST)
    store.close()
    damage(work_dir)
    copy = work_dir / "images" / f"{stored.image_id.directory_name}.json"
    match doubt:
        case "a layer is gone":
            shutil.rmtree(stored.layers[0].store_path)
        case "its config was changed":
            copy.write_bytes(copy.read_bytes().replace(b'"layer 0"', b'"layer 9"'))
        case _:
            copy.write_bytes(copy.read_bytes()[:-5])

    store = open_store(work_dir)

    assert store.images() == ()
    assert store.layer(Digest(TOP.digest)) is not None
    store.close()


def test_a_config_that_ends_with_a_new_line_comes_back(store: Store, work_dir: Path) -> None:
    stored = pulled(store, image(BASE, config=image(BASE).config + b"\n"), LATEST)
    store.close()
    damage(work_dir)

    store = open_store(work_dir)

    assert [one.image_id for one in store.images()] == [stored.image_id]
    store.close()


def test_layers_that_another_program_unpacked_are_not_certain(store: Store, work_dir: Path) -> None:
    put_layer(store, BASE)
    store.close()
    (work_dir / "layers" / "0").mkdir()
    damage(work_dir)

    store = open_store(work_dir)

    assert [one.compressed_digest for one in store.layers()] == [BASE.digest]
    store.close()


def test_copies_of_images_follow_the_images(store: Store, work_dir: Path) -> None:
    stored = pulled(store, SHOP, LATEST)
    copy = work_dir / "images" / f"{stored.image_id.directory_name}.json"
    meta = json.loads((work_dir / "meta_store.json").read_bytes())
    assert json.loads(copy.read_bytes()) == meta["image_db"][SHOP.image_id]

    store.remove_image(stored, None, force=False)

    assert not copy.exists()


def test_copies_without_an_image_are_deleted_at_the_next_start(store: Store, work_dir: Path) -> None:
    store.close()
    stray = work_dir / "images" / f"sha256_{'ab' * 32}.json"
    stray.write_bytes(b"{}")
    stray.with_suffix(".json.new").write_bytes(b"{")
    (work_dir / "images" / "theirs").write_bytes(b"x")

    open_store(work_dir).close()

    assert os.listdir(work_dir / "images") == ["theirs"]
