"""Layers that nobody uses: kept for whoever tries again, deleted later, and at once where room is needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from guestpull_server.errors import StorageFull
from guestpull_server.models import Digest
from guestpull_server.store import Store, collect_garbage
from support.images import Layer, file, image, layer
from support.stores import MountsInMemory, bundled, lose_metadata, open_store, pulled, put_layer

BASE, TOP, SIDE = layer(file("a")), layer(file("b")), layer(file("c"))
SHOP = image(BASE, TOP)
LATEST = "docker.io/library/shop:latest"
AN_HOUR = 3600.0


def digest_of(one: Layer) -> Digest:
    return Digest(one.digest)


def failed_pull(store: Store, *layers: Layer) -> None:
    """Commit layers, as a pull does it that then fails."""
    with store.pin(digest_of(one) for one in layers):
        for one in layers:
            put_layer(store, one)


# -- after a while --------------------------------------------------------------------------------------


def test_the_layers_of_a_failed_pull_are_kept_for_the_next_try(store: Store) -> None:
    failed_pull(store, BASE)

    assert store.delete_unused_for(AN_HOUR).layers == ()

    assert store.layer(digest_of(BASE)) is not None


def test_layers_that_nobody_used_for_long_are_deleted_the_oldest_first(store: Store, work_dir: Path) -> None:
    failed_pull(store, TOP)
    failed_pull(store, BASE)

    deleted = store.delete_unused_for(0)

    assert deleted.layers == (TOP.digest, BASE.digest)
    assert deleted.freed_bytes > 0
    assert list((work_dir / "layers").iterdir()) == []
    assert json.loads((work_dir / "meta_store.json").read_text())["layer_db"] == {}


def test_a_layer_that_an_image_has_stays(store: Store) -> None:
    pulled(store, SHOP, LATEST)

    assert store.delete_unused_for(0).layers == ()


def test_a_layer_that_a_bundle_has_stays(store: Store, mounts: MountsInMemory, tmp_path: Path) -> None:
    shop = pulled(store, SHOP, LATEST)
    bundled(store, shop, tmp_path / "bundle", mounts)
    store.remove_image(shop, None, force=True)

    assert store.delete_unused_for(0).layers == ()


def test_a_layer_that_a_pull_needs_stays_and_its_time_begins_when_that_ends(store: Store) -> None:
    failed_pull(store, BASE)
    with store.pin([digest_of(BASE)]):
        assert store.delete_unused_for(0).layers == ()
    assert store.delete_unused_for(AN_HOUR).layers == ()

    assert store.delete_unused_for(0).layers == (BASE.digest,)


def test_a_layer_that_a_pull_kept_when_its_image_was_removed_is_deleted_later(store: Store) -> None:
    shop = pulled(store, SHOP, LATEST)
    assert store.delete_unused_for(0).layers == ()
    with store.pin([digest_of(BASE)]):
        assert store.remove_image(shop, None, force=False).deleted_layers == (TOP.digest,)

    assert store.delete_unused_for(0).layers == (BASE.digest,)


def test_the_time_begins_anew_with_a_restart(store: Store, reopened: Callable[[], Store]) -> None:
    failed_pull(store, TOP)
    failed_pull(store, BASE)
    again = reopened()

    assert again.delete_unused_for(AN_HOUR).layers == ()
    assert set(again.delete_unused_for(0).layers) == {TOP.digest, BASE.digest}


def test_nothing_is_due_before_its_time(store: Store) -> None:
    assert store.seconds_until_unused_for(AN_HOUR) == AN_HOUR
    failed_pull(store, BASE)

    assert AN_HOUR - 60 < store.seconds_until_unused_for(AN_HOUR) <= AN_HOUR
    assert store.seconds_until_unused_for(0) == 0


# -- what others put there ------------------------------------------------------------------------------


def without_images(work_dir: Path) -> None:
    """Have a store of layers alone, as somebody makes it who embeds layers in a guest."""
    path = work_dir / "meta_store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_db": {}}))
    shutil.rmtree(work_dir / "images")


def test_layers_of_a_baked_store_that_no_image_has_are_deleted_only_on_demand(tmp_path: Path) -> None:
    baked = open_store(tmp_path / "baked")
    pulled(baked, SHOP, LATEST)
    baked.close(tidy=True)
    without_images(tmp_path / "baked")

    store = open_store(tmp_path / "baked")

    assert store.delete_unused_for(0).layers == ()
    assert set(store.collect_unused(dry_run=False).layers) == {BASE.digest, TOP.digest}
    store.close()


def test_layers_that_another_program_unpacked_are_deleted_only_on_demand(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    failed_pull(store, BASE)
    store.flush()
    lose_metadata(work_dir)
    again = reopened()

    assert again.delete_unused_for(0).layers == ()
    assert again.collect_unused(dry_run=False).layers == (BASE.digest,)


# -- where room is needed -------------------------------------------------------------------------------


def test_a_step_that_finds_the_disk_full_is_done_again_once_unused_layers_are_gone(store: Store) -> None:
    failed_pull(store, BASE)

    def step() -> str:
        if store.layer(digest_of(BASE)) is not None:
            raise StorageFull("writing", "/")
        return "done"

    assert store.with_room(step) == "done"


def test_where_nothing_can_be_deleted_the_disk_is_full(store: Store) -> None:
    pulled(store, SHOP, LATEST)
    tried: list[int] = []

    def step() -> None:
        tried.append(1)
        raise StorageFull("writing", "/")

    with pytest.raises(StorageFull):
        store.with_room(step)

    assert len(tried) == 1
    assert len(store.layers()) == 2


def test_a_step_is_done_again_where_another_has_made_room_meanwhile(store: Store) -> None:
    failed_pull(store, BASE)
    tried: list[str] = []

    def step(name: str) -> None:
        tried.append(name)
        if tried == ["one"]:
            store.with_room(lambda: step("other"))
        if tried.count(name) == 1:
            raise StorageFull("writing", "/")

    store.with_room(lambda: step("one"))

    assert tried == ["one", "other", "other", "one"]


# -- on demand ------------------------------------------------------------------------------------------


def strew(work_dir: Path) -> list[Path]:
    """Put into a work directory what belongs to nothing."""
    stray = work_dir / "layers/sha256_abc"
    stray.mkdir()
    (stray / "file").write_bytes(b"x" * 100)
    orphan = work_dir / "records/sha256_abc.record"
    orphan.write_bytes(b"x")
    foreign = work_dir / "images/notes.txt"
    foreign.write_bytes(b"x")
    half_written = work_dir / "meta_store.json.new"
    half_written.write_bytes(b"{")
    return [stray, orphan, foreign, half_written]


def test_collecting_deletes_what_gc_would(store: Store, work_dir: Path, mounts: MountsInMemory) -> None:
    pulled(store, SHOP, LATEST)
    failed_pull(store, SIDE)
    store.flush()
    strays = strew(work_dir)

    told = store.collect_unused(dry_run=True)
    assert all(path.exists() for path in strays)
    collected = store.collect_unused(dry_run=False)

    assert told.layers == collected.layers == (SIDE.digest,)
    assert told.freed_bytes == collected.freed_bytes
    assert not any(path.exists() for path in strays)
    store.close()
    assert collect_garbage(str(work_dir), mounts, dry_run=True) == ()


def test_collecting_leaves_what_a_pull_needs(store: Store) -> None:
    with store.pin([digest_of(BASE)]), store.stage(digest_of(TOP)) as staged:
        put_layer(store, BASE)

        assert store.collect_unused(dry_run=False).layers == ()

        assert store.layer(digest_of(BASE)) is not None
        assert Path(staged.directory).is_dir()


def test_collecting_leaves_a_bundle_that_is_being_made(store: Store, tmp_path: Path) -> None:
    with store.reserve_bundle(str(tmp_path / "bundle")) as bundle:
        store.collect_unused(dry_run=False)

        assert Path(bundle.overlay_directory).is_dir()
        assert Path(bundle.rootfs).is_dir()


def test_where_entries_cannot_be_used_no_directory_is_taken_for_a_stray(
    store: Store, work_dir: Path, reopened: Callable[[], Store]
) -> None:
    pulled(store, SHOP, LATEST)
    stray, *_ = strew(work_dir)
    path = work_dir / "meta_store.json"
    document = json.loads(path.read_text())
    document["layer_db"]["sha256:?"] = {}
    path.write_text(json.dumps(document))

    reopened().collect_unused(dry_run=False)

    assert stray.exists()
