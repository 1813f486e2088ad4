"""A store whose work directory others have replaced changes nothing in the new one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestpull_server.errors import WorkDirReplaced
from guestpull_server.models import Digest
from guestpull_server.store import Store
from guestpull_server.store.workdir import DIRECTORIES
from support.images import file, image, layer
from support.stores import MountsInMemory, bundled, open_store, pulled, put_layer, unpacked

BASE, TOP = layer(file("a")), layer(file("b"))
SHOP = image(BASE)
LATEST = "docker.io/library/shop:latest"


@pytest.fixture
def old(work_dir: Path) -> Iterator[Store]:
    store = open_store(work_dir)
    yield store
    store.close()


@pytest.fixture
def new(old: Store, work_dir: Path) -> Iterator[Store]:
    """The store of a work directory that replaced that of `old`."""
    pulled(old, SHOP, LATEST)
    shutil.rmtree(work_dir)
    old.abandon()
    store = open_store(work_dir)
    pulled(store, SHOP, LATEST)
    yield store
    store.close()


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in directory.rglob("*")}


def remove(store: Store, _path: Path) -> None:
    store.remove_image(store.find_image(SHOP.image_id, None), None, force=True)


def commit(store: Store, _path: Path) -> None:
    put_layer(store, TOP)


def collect(store: Store, _path: Path) -> None:
    store.collect_unused(dry_run=False)


def bundle(store: Store, path: Path) -> None:
    bundled(store, store.find_image(SHOP.image_id, None), path, MountsInMemory())


@pytest.mark.parametrize("change", [remove, commit, collect, bundle])
def test_an_abandoned_store_changes_nothing(
    old: Store, new: Store, work_dir: Path, tmp_path: Path, change: Callable[[Store, Path], None]
) -> None:
    before = contents(work_dir)

    with pytest.raises(WorkDirReplaced):
        change(old, tmp_path / "bundle")
    old.close()

    assert contents(work_dir) == before
    assert new.is_in_place()
    assert not old.is_in_place()


@pytest.mark.parametrize("lost", [*DIRECTORIES, "lock"])
def test_each_part_of_a_work_directory_is_missed(store: Store, work_dir: Path, lost: str) -> None:
    assert store.is_in_place()
    path = work_dir / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()

    assert not store.is_in_place()


@pytest.mark.parametrize("lost", DIRECTORIES)
def test_a_room_that_was_made_anew_is_another_one(store: Store, work_dir: Path, lost: str) -> None:
    (work_dir / lost).rename(work_dir / "old")
    (work_dir / lost).mkdir()

    assert not store.is_in_place()


def test_a_layer_that_was_staged_before_is_not_committed(store: Store, work_dir: Path) -> None:
    with store.stage(Digest(TOP.digest)) as staged:
        shutil.rmtree(work_dir)

        with pytest.raises(WorkDirReplaced):
            store.commit_layer(staged, Digest(TOP.digest), unpacked(TOP))

    assert not work_dir.exists()
