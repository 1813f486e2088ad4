"""What is synced, when, and what a full disk does to it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from guestpull_server.errors import StorageFailed, StorageFull
from guestpull_server.store import durability
from guestpull_server.store.durability import Durability
from guestpull_server.store.filesystem import is_volatile
from support.images import file, image, layer
from support.store_story import check_end, check_from_outside, check_store, tell_the_story
from support.stores import MountsInMemory, bundled, open_store, pulled, put_layer

BASE, TOP = layer(file("a")), layer(file("b"))
SHOP = image(BASE, TOP)
LATEST = "docker.io/library/shop:latest"


class Recorder:
    """Records what is renamed, and what is synced, by name; files that are being written by their later names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, work_dir: Path, *, volatile: bool) -> None:
        self.steps: list[str] = []
        self._work_dir = work_dir
        rename = os.rename

        def renamed(source: str, target: str) -> None:
            rename(source, target)
            self.steps.append(f"rename {self._short(target)}")

        def synced(descriptor: int) -> None:
            self.steps.append(f"fsync {self._short(os.readlink(f'/proc/self/fd/{descriptor}'))}")

        def tree_synced(_self: Durability, directory: str) -> None:
            if not volatile:
                self.steps.append(f"syncfs {self._short(directory)}")

        monkeypatch.setattr(os, "rename", renamed)
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(Durability, "sync_tree", tree_synced)
        monkeypatch.setattr(durability, "is_volatile", lambda _path: volatile)

    def _short(self, path: str) -> str:
        relative = os.path.relpath(path, self._work_dir)
        return "staging/…" if relative.startswith("staging/") else relative.removesuffix(".new")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, work_dir: Path) -> Recorder:
    return Recorder(monkeypatch, work_dir, volatile=False)


def test_a_layer_is_durable_before_its_name_and_its_name_before_its_entry(
    disk: Recorder, work_dir: Path
) -> None:
    store = open_store(work_dir)
    put_layer(store, TOP)
    name = BASE.digest.replace(":", "_")
    disk.steps.clear()

    put_layer(store, BASE, record=b"headers")
    store.flush()

    assert disk.steps == [
        "syncfs staging/…",
        f"rename records/{name}.json",
        f"rename records/{name}.record",
        "fsync records",
        f"rename layers/{name}",
        "fsync layers",
        "fsync meta_store.json",
        "rename meta_store.json",
        "fsync .",
    ]
    store.close()


def test_an_entry_is_gone_before_its_layer(disk: Recorder, work_dir: Path) -> None:
    store = open_store(work_dir)
    stored = pulled(store, image(BASE), LATEST)
    disk.steps.clear()

    store.remove_image(stored, None, force=False)

    assert disk.steps == [
        "fsync meta_store.json",
        "rename meta_store.json",
        "fsync .",
        "rename staging/…",
        "fsync layers",
        "rename staging/…",
        "fsync records",
    ]
    store.close()


def test_what_a_bundle_is_is_durable_before_it_is_made_and_once_it_is_ready(
    disk: Recorder, work_dir: Path, tmp_path: Path, mounts: MountsInMemory
) -> None:
    store = open_store(work_dir, mounts)
    stored = pulled(store, SHOP, LATEST)
    disk.steps.clear()

    bundled(store, stored, tmp_path / "bundle", mounts)

    (name,) = os.listdir(work_dir / "overlay")
    preparing, ready = (f"overlay/{name}/bundle.json{end}" for end in (".preparing", ""))
    written = [f"fsync {preparing}", f"rename {preparing}", f"fsync overlay/{name}"]
    assert disk.steps == [
        *written,
        "fsync overlay",
        *written,
        *(step.replace(preparing, ready) for step in written),
    ]
    store.close()


def test_a_bundle_that_is_gone_stays_gone(
    disk: Recorder, work_dir: Path, tmp_path: Path, mounts: MountsInMemory
) -> None:
    store = open_store(work_dir, mounts)
    path = bundled(store, pulled(store, SHOP, LATEST), tmp_path / "bundle", mounts)
    disk.steps.clear()

    store.release_bundle(path)

    assert disk.steps == ["rename staging/…", "fsync overlay"]
    store.close()


def test_where_the_work_directory_is_memory_nothing_is_synced(
    monkeypatch: pytest.MonkeyPatch, work_dir: Path, tmp_path: Path, mounts: MountsInMemory
) -> None:
    memory = Recorder(monkeypatch, work_dir, volatile=True)
    store = open_store(work_dir, mounts)

    bundled(store, pulled(store, SHOP, LATEST), tmp_path / "bundle", mounts)
    store.close()

    assert [step for step in memory.steps if not step.startswith("rename ")] == []


def test_memory_is_told_from_disks() -> None:
    assert is_volatile("/dev/shm")
    assert not is_volatile("/proc")


def test_a_file_system_that_is_not_there_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        is_volatile("/nowhere")


# -- full disks ---------------------------------------------------------------------------------------------


class FullDisk:
    """A disk that is full from the n-th call on that needs room, until a file is deleted from a directory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self._left = number
        self._unlink = os.unlink
        self.full = True
        self.refused = False
        monkeypatch.setattr(durability, "is_volatile", lambda _path: False)
        monkeypatch.setattr(Durability, "sync_tree", lambda _self, _directory: None)
        monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
        monkeypatch.setattr(os, "unlink", self._make_room)
        for name in ("mkdir", "write", "open", "fsync"):
            monkeypatch.setattr(os, name, self._limited(name, getattr(os, name)))

    def _limited(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*arguments: Any, **named: Any) -> Any:
            if self.full and _needs_room(name, arguments):
                self._left -= 1
                if self._left <= 0:
                    if name == "write":
                        call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    self.refused = True
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            return call(*arguments, **named)

        return limited

    def _make_room(self, path: str, *, dir_fd: int | None = None) -> None:
        self._unlink(path, dir_fd=dir_fd)
        if dir_fd is not None and self.refused:
            self.full = False


def _needs_room(name: str, arguments: Sequence[Any]) -> bool:
    match name:
        case "open":
            return bool(arguments[1] & os.O_CREAT) and not os.path.lexists(arguments[0])
        case "mkdir":
            return not os.path.lexists(arguments[0])
        case "fsync":
            return stat.S_ISREG(os.fstat(arguments[0]).st_mode)
        case _:
            return True


def test_a_disk_that_is_full_at_any_step_leaves_a_store_that_is_true(tmp_path: Path) -> None:
    number = failures = 0
    while True:
        number += 1
        work_dir, bundles = tmp_path / f"{number}/work", tmp_path / f"{number}/bundles"
        bundles.mkdir(parents=True)
        mounts = MountsInMemory()
        store = open_store(work_dir, mounts)
        with pytest.MonkeyPatch.context() as patching:
            disk = FullDisk(patching, number)
            with suppress(StorageFull):
                tell_the_story(store, mounts, bundles)
        if not disk.refused:
            break
        failures += 1
        check_from_outside(work_dir)
        check_store(store, work_dir, mounts)
        if number % 2:  # the daemon goes on; or it is started anew
            store.close()
            store = open_store(work_dir, mounts)
            check_store(store, work_dir, mounts)
        tell_the_story(store, mounts, bundles)
        check_end(store, work_dir, bundles)
    store.close()
    assert failures > 20


def test_a_full_disk_can_be_emptied(
    work_dir: Path, mounts: MountsInMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(work_dir, mounts)
    stored = pulled(store, SHOP, LATEST)
    path = bundled(store, stored, tmp_path / "bundle", mounts)
    disk = FullDisk(monkeypatch, 1)

    store.release_bundle(path)
    removal = store.remove_image(stored, None, force=False)

    assert disk.refused
    assert len(removal.deleted_layers) == 2
    assert os.listdir(work_dir / "layers") == []
    store.close()
    store = open_store(work_dir)
    assert (store.images(), store.layers()) == ((), ())
    store.close()


def test_a_start_on_a_full_disk_goes_on(
    work_dir: Path, mounts: MountsInMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(work_dir, mounts)
    bundled(store, pulled(store, SHOP, LATEST), tmp_path / "bundle", mounts)
    store.close()
    (work_dir / "meta_store.json").unlink()
    disk = FullDisk(monkeypatch, 1)

    store = open_store(work_dir, mounts)

    assert len(store.layers()) == 2
    assert len(store.bundles()) == 1
    disk.full = False
    store.close()


def test_other_refusals_are_told_by_name(work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(work_dir)

    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/the/disk")

    with monkeypatch.context() as patching:
        patching.setattr(os, "rename", refuse)
        with pytest.raises(StorageFailed) as failed:
            put_layer(store, BASE)

    assert failed.value.path == "/the/disk"
    assert store.layers() == ()
    put_layer(store, BASE)
    store.close()
