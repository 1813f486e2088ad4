"""The store on disks that are too small, or that nobody can write to."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from guestpull_server.errors import GuestpullError, StorageFailed, StorageFull, storage_errors
from guestpull_server.models import Digest
from guestpull_server.store import Store, audit, collect_garbage
from support.daemon import Tmpfs
from support.images import files, image, layer
from support.store_story import check_end, check_from_outside, check_store, tell_the_story
from support.stores import MountsInMemory, open_store, pulled, unpacked

BIG = layer(*files("big", count=1))
LATEST = "docker.io/library/shop:latest"


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Cover a directory by itself, read-only."""
    subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("kilobytes", [*range(8, 200, 8)])
def test_a_disk_of_any_size_holds_a_store_that_is_true(tmp_path: Path, kilobytes: int) -> None:
    bundles = tmp_path / "bundles"
    bundles.mkdir()
    mounts = MountsInMemory()
    with Tmpfs(tmp_path / "disk", f"{kilobytes}k") as disk:
        work_dir = disk / "work"
        for _ in range(2):
            with suppress(StorageFull):
                store = open_store(work_dir, mounts)
                with suppress(StorageFull), storage_errors("telling the story", str(disk)):
                    tell_the_story(store, mounts, bundles)
                store.close()
            check_from_outside(work_dir)
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)

        store = open_store(work_dir, mounts)

        check_store(store, work_dir, mounts)
        tell_the_story(store, mounts, bundles)
        check_end(store, work_dir, bundles)


def test_what_fills_the_disk_can_be_removed_and_the_space_comes_back(tmp_path: Path) -> None:
    with Tmpfs(tmp_path / "disk", "1m") as disk:
        store = open_store(disk / "work")
        stored = pulled(store, image(BIG), LATEST)
        free = os.statvfs(disk).f_bavail
        with open(disk / "filler", "wb", buffering=0) as filler, suppress(OSError):
            while True:
                filler.write(bytes(4096))
        assert os.statvfs(disk).f_bavail == 0
        with pytest.raises(StorageFull):
            store.reserve_bundle(str(tmp_path / "bundle"))
        assert not (tmp_path / "bundle").exists()

        removal = store.remove_image(stored, None, force=False)

        assert removal.deleted_layers == (BIG.digest,)
        assert os.statvfs(disk).f_bavail > 0
        (disk / "filler").unlink()
        assert os.statvfs(disk).f_bavail >= free
        store.close()
        assert audit(str(disk / "work")) == ()


def test_a_disk_that_became_read_only_is_told_by_name_and_nothing_is_lost(tmp_path: Path) -> None:
    with Tmpfs(tmp_path / "disk", "1m") as disk:
        store = open_store(disk / "work")
        stored = pulled(store, image(BIG), LATEST)
        with store.stage(Digest(BIG.digest)) as staged, read_only(disk):
            for attempt in (
                lambda: store.stage(Digest(BIG.digest)),
                lambda: store.remove_image(stored, None, force=False),
                lambda: store.reserve_bundle(str(tmp_path / "bundle")),
            ):
                with pytest.raises(StorageFailed):
                    attempt()
            assert store.images() == (stored,)
            assert store.commit_layer(staged, Digest(BIG.digest), unpacked(BIG)) == stored.layers[0]
        store.remove_image(stored, None, force=False)
        store.close()


def test_a_start_on_a_read_only_disk_is_refused_by_name(tmp_path: Path) -> None:
    with Tmpfs(tmp_path / "disk", "1m") as disk:
        open_store(disk / "work").close()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

        with pytest.raises(GuestpullError) as refused:
            Store.open(str(disk / "work"), MountsInMemory())

        assert str(disk) in str(refused.value)
        assert audit(str(disk / "work")) == ()
        assert collect_garbage(str(disk / "work"), MountsInMemory(), dry_run=True) == ()
