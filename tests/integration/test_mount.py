"""Layers -> a mounted rootfs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpull_server.errors import BundleBusy, MountFailed, StorageFailed
from guestpull_server.models import Decoder, Digest, StoredLayer
from guestpull_server.snapshot import OverlayMounts, mount_rootfs
from guestpull_server.snapshot.overlay import mount_by_one_page


class Stage:
    """A place with layers that are made by hand, and what is mounted there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rootfs = directory / "rootfs"
        self.rootfs.mkdir()
        self.overlay = directory / "overlay"
        self.overlay.mkdir()
        self._layers = 0

    def layer(self, *paths: str, implied: tuple[bytes, ...] = (), name: str = "") -> StoredLayer:
        """A layer with some files, each with its layer's number in it; a path that ends with / is a directory."""
        self._layers += 1
        path = self.directory / "layers" / (name or f"layer{self._layers}")
        path.mkdir(parents=True)
        for one in paths:
            if one.endswith("/"):
                (path / one).mkdir(parents=True, exist_ok=True)
            else:
                (path / one).parent.mkdir(parents=True, exist_ok=True)
                (path / one).write_text(str(self._layers))
        digest = Digest.of(str(path).encode())
        return StoredLayer(digest, digest, Decoder.GZIP, str(path), implied_directories=implied)

    def mount(self, *layers: StoredLayer) -> Path:
        """Mount them, bottom-most first; returns the rootfs."""
        mount_rootfs(layers, str(self.overlay), str(self.rootfs))
        return self.rootfs


@pytest.fixture
def stage(disk: Path) -> Iterator[Stage]:
    yield Stage(disk)
    OverlayMounts().unmount(str(disk / "rootfs"))


def test_the_topmost_layer_wins_and_the_mount_is_writable(stage: Stage) -> None:
    rootfs = stage.mount(stage.layer("a", "b"), stage.layer("b", "c"))

    assert [(rootfs / name).read_text() for name in "abc"] == ["1", "2", "2"]
    (rootfs / "a").write_text("written")
    assert (stage.directory / "layers/layer1/a").read_text() == "1"
    assert str(rootfs) in OverlayMounts().mounted()


def test_whiteouts_and_opaque_directories_hide_what_is_below(stage: Stage) -> None:
    below = stage.layer("gone", "dir/old", "kept")
    above = stage.layer("dir/new")
    os.mknod(f"{above.store_path}/gone", stat.S_IFCHR, 0)
    os.setxattr(f"{above.store_path}/dir", "trusted.overlay.opaque", b"y")

    rootfs = stage.mount(below, above)

    assert sorted(os.listdir(rootfs)) == ["dir", "kept"]
    assert os.listdir(rootfs / "dir") == ["new"]


def test_an_opaque_root_hides_all_layers_below(stage: Stage) -> None:
    above = stage.layer("new")
    os.setxattr(above.store_path, "trusted.overlay.opaque", b"y")

    assert os.listdir(stage.mount(stage.layer("old"), above)) == ["new"]


@pytest.mark.parametrize(
    "name", ["with:colon", "with,comma", "with\\backslash", "with space", "ümlaut", "x" * 200]
)
def test_any_name_of_a_layers_directory_will_do(stage: Stage, name: str) -> None:
    assert os.listdir(stage.mount(stage.layer("a", name=name), stage.layer("b"))) == ["a", "b"]


@pytest.mark.parametrize("count", [1, 130, 500])
def test_older_kernels_get_their_layers_by_one_page_of_options(stage: Stage, count: int) -> None:
    layers = [stage.layer(f"file{number}") for number in range(count)]
    for name in ("upper", "work"):
        (stage.overlay / name).mkdir()
    target = os.open(stage.rootfs, os.O_PATH | os.O_DIRECTORY)
    here = os.getcwd()

    mount_by_one_page([layer.store_path for layer in reversed(layers)], str(stage.overlay), target)
    os.close(target)

    assert len(os.listdir(stage.rootfs)) == count
    assert os.getcwd() == here


def attributes(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns


def test_a_directory_without_an_entry_looks_as_the_layers_below_say(stage: Stage) -> None:
    below = stage.layer("tmp/", "deep/er/still/")
    for path, mode, owner in (("", 0o750, 1), ("tmp", 0o1777, 2), ("deep", 0o711, 3), ("deep/er", 0o700, 4)):
        os.chown(f"{below.store_path}/{path}", owner, owner + 10)
        os.chmod(f"{below.store_path}/{path}", mode)
        os.utime(f"{below.store_path}/{path}", ns=(owner * 10**9, owner * 10**9))
    os.setxattr(f"{below.store_path}/tmp", "user.note", b"kept")
    above = stage.layer("tmp/x", "deep/er/y", "new/z", implied=(b"", b"tmp", b"deep", b"deep/er", b"new"))

    rootfs = stage.mount(below, above)

    assert attributes(rootfs) == (0o750, 1, 11, 10**9)
    assert attributes(rootfs / "tmp") == (0o1777, 2, 12, 2 * 10**9)
    assert attributes(rootfs / "deep") == (0o711, 3, 13, 3 * 10**9)
    assert attributes(rootfs / "deep/er") == (0o700, 4, 14, 4 * 10**9)
    assert os.getxattr(rootfs / "tmp", "user.note") == b"kept"
    assert sorted(os.listdir(rootfs / "deep/er")) == ["still", "y"]


def test_a_directory_whose_own_entry_is_topmost_keeps_its_attributes(stage: Stage) -> None:
    below = stage.layer("tmp/x", implied=(b"", b"tmp"))
    above = stage.layer("tmp/")
    os.chmod(f"{above.store_path}/tmp", 0o1777)

    assert attributes(stage.mount(below, above) / "tmp")[0] == 0o1777


def test_what_a_whiteout_hides_lends_no_attributes(stage: Stage) -> None:
    hidden = stage.layer("dir/")
    os.chmod(f"{hidden.store_path}/dir", 0o700)
    between = stage.layer()
    os.mknod(f"{between.store_path}/dir", stat.S_IFCHR, 0)
    above = stage.layer("dir/x", implied=(b"", b"dir"))

    assert attributes(stage.mount(hidden, between, above) / "dir")[0] == 0o755


def test_a_link_in_a_lower_layer_leads_nowhere(stage: Stage) -> None:
    secret = stage.directory / "secret"
    secret.mkdir(mode=0o700)
    below = stage.layer()
    os.symlink(secret, f"{below.store_path}/dir")
    above = stage.layer("dir/x", implied=(b"", b"dir"))

    assert attributes(stage.mount(below, above) / "dir")[0] == 0o755
    assert os.listdir(secret) == []


def test_a_layer_that_is_gone_is_a_named_error_and_leaves_no_mount(stage: Stage) -> None:
    gone = StoredLayer(Digest.of(b""), Digest.of(b""), Decoder.GZIP, "/nowhere/at/all")

    with pytest.raises(MountFailed, match="verify --repair"):
        stage.mount(stage.layer("a"), gone)

    assert str(stage.rootfs) not in OverlayMounts().mounted()


def test_a_rootfs_that_became_a_link_is_not_followed(stage: Stage) -> None:
    elsewhere = stage.directory / "elsewhere"
    elsewhere.mkdir()
    stage.rootfs.rmdir()
    stage.rootfs.symlink_to(elsewhere)

    with pytest.raises(StorageFailed, match="rootfs"):
        stage.mount(stage.layer("a"))

    assert os.listdir(elsewhere) == []


def test_unmounting_refuses_while_in_use_and_is_harmless_twice(stage: Stage) -> None:
    rootfs = stage.mount(stage.layer("a"))
    mounts = OverlayMounts()
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=rootfs, stdin=subprocess.PIPE) as user:
        with pytest.raises(BundleBusy):
            mounts.unmount(str(rootfs))
        user.communicate(b"\n")

    mounts.unmount(str(rootfs))
    mounts.unmount(str(rootfs))

    assert str(rootfs) not in mounts.mounted()
