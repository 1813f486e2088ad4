"""Layers -> a mounted rootfs."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guestpull_server.bundle import write_runtime_config
from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import Cancelled, MountFailed, StorageFailed
from guestpull_server.models import Decoder, Digest, StoredLayer
from guestpull_server.snapshot import OverlayMounts, mount_rootfs, mounts
from guestpull_server.snapshot.overlay import mount_by_one_page
from guestpull_server.snapshot.syscalls import unmount
from support.bundles import CancelledAtCheck, mount_layers, write_config
from support.trees import tree


class Stage:
    """A place with layers that are made by hand, and what is mounted there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rootfs = directory / "rootfs"
        self.rootfs.mkdir()
        self.overlay = directory / "overlay" / secrets.token_hex(8)
        self.overlay.mkdir(parents=True)
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
        digest = Digest.of(os.fsencode(path))
        return StoredLayer(digest, digest, Decoder.GZIP, str(path), implied_directories=implied)

    def mount(self, *layers: StoredLayer) -> Path:
        """Mount them, bottom-most first; returns the rootfs."""
        mount_layers(layers, self.overlay, self.rootfs)
        return self.rootfs

    def unmount(self, rootfs: Path | None = None) -> tuple[str, ...]:
        """Unmount what is mounted; returns who uses it."""
        return OverlayMounts().unmount(str(rootfs or self.rootfs), str(self.overlay))


@pytest.fixture
def stage(disk: Path) -> Iterator[Stage]:
    made = Stage(disk)
    yield made
    assert made.unmount() == ()


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


NAMES = [
    "with:colon",
    "with,comma",
    "back\\slash",
    "trailing\\",
    "with space",
    "with\nnewline",
    "with=equals",
    "ümlaut",
    "\udcff",
    "x" * 250,
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_layer_directory_works(stage: Stage, name: str) -> None:
    assert sorted(os.listdir(stage.mount(stage.layer("a", name=name), stage.layer("b")))) == ["a", "b"]


@pytest.mark.parametrize("name", NAMES)
def test_any_path_of_a_work_directory_and_a_bundle_works(disk: Path, name: str) -> None:
    directory = disk / name
    directory.mkdir()
    stage = Stage(directory)

    rootfs = stage.mount(stage.layer("a"), stage.layer("b"))

    assert sorted(os.listdir(rootfs)) == ["a", "b"]
    (rootfs / "written").write_text("x")
    assert (stage.overlay / "upper/written").exists()
    assert str(rootfs) in OverlayMounts().mounted()
    assert stage.unmount() == ()
    assert str(rootfs) not in OverlayMounts().mounted()


def test_paths_may_be_long(disk: Path) -> None:
    directory = disk / ("x" * 250) / ("y" * 250) / ("z" * 250)
    directory.mkdir(parents=True)
    stage = Stage(directory)

    rootfs = stage.mount(*(stage.layer(f"file{number}") for number in range(130)))

    assert len(os.listdir(rootfs)) == 130
    assert stage.unmount() == ()


@pytest.mark.parametrize("count", [1, 130, 500])
def test_each_layer_has_its_own_parameter(stage: Stage, count: int) -> None:
    rootfs = stage.mount(*(stage.layer(f"file{number}") for number in range(count)))

    assert len(os.listdir(rootfs)) == count
    assert not (stage.overlay / "lower").exists()


def test_more_layers_than_overlayfs_stacks_are_refused_with_that_reason(stage: Stage) -> None:
    with pytest.raises(MountFailed, match="501 layers, and overlayfs stacks at most 500"):
        stage.mount(*(stage.layer() for _ in range(501)))


def test_no_layers_are_an_empty_rootfs(stage: Stage) -> None:
    rootfs = stage.mount()

    assert os.listdir(rootfs) == []
    (rootfs / "written").write_text("x")


def test_a_layer_that_occurs_twice_counts_at_its_topmost_place(stage: Stage) -> None:
    one, other = stage.layer("file"), stage.layer("file")

    assert (stage.mount(one, other, one) / "file").read_text() == "1"


def test_an_xattr_of_a_layer_cannot_redirect_overlayfs(stage: Stage) -> None:
    below = stage.layer("secret/file")
    above = stage.layer("dir/", "stub")
    os.setxattr(f"{above.store_path}/dir", "trusted.overlay.redirect", b"/secret")
    os.setxattr(f"{above.store_path}/stub", "trusted.overlay.metacopy", b"")
    os.setxattr(f"{above.store_path}/stub", "trusted.overlay.redirect", b"/secret/file")

    rootfs = stage.mount(below, above)

    with pytest.raises(PermissionError):
        os.listdir(rootfs / "dir")
    with pytest.raises(PermissionError):
        (rootfs / "stub").read_text()


def test_a_work_directory_on_an_overlay_is_refused_with_a_remedy(stage: Stage) -> None:
    rootfs = stage.mount(stage.layer("a"))
    (rootfs / "overlay").mkdir()
    (rootfs / "rootfs").mkdir()

    with pytest.raises(MountFailed, match="use a tmpfs or a local disk"):
        mount_layers([stage.layer("b")], rootfs / "overlay", rootfs / "rootfs")

    # what the kernel refused to mount, it lets go of in its own time
    subprocess.run(["umount", "--lazy", str(rootfs)], check=True)


@pytest.mark.parametrize("count", [1, 130, 500])
def test_older_kernels_get_the_layers_in_one_page_of_options(stage: Stage, count: int) -> None:
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


def test_no_directory_inherits_an_acl_of_the_work_directory(stage: Stage) -> None:
    bottom = stage.layer("dir/a")
    top = stage.layer("dir/b", implied=(b"", b"dir"))
    user, anybody = 2, 0xFFFFFFFF
    entries = ((1, 7, anybody), (user, 7, 1000), (4, 7, anybody), (16, 7, anybody), (32, 7, anybody))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)
    os.setxattr(stage.overlay, "system.posix_acl_default", acl)

    rootfs = stage.mount(bottom, top)
    (rootfs / "new").mkdir()

    assert [os.listxattr(rootfs / path) for path in ("", "dir", "new")] == [[], [], []]


def test_a_directory_whose_own_entry_is_topmost_keeps_its_attributes(stage: Stage) -> None:
    below = stage.layer("tmp/x", implied=(b"", b"tmp"))
    above = stage.layer("tmp/")
    os.chmod(f"{above.store_path}/tmp", 0o1777)

    assert attributes(stage.mount(below, above) / "tmp")[0] == 0o1777


def test_directories_below_a_whiteout_do_not_provide_attributes(stage: Stage) -> None:
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


def test_an_implied_opaque_directory_keeps_only_its_attributes(stage: Stage) -> None:
    below = stage.layer("tmp/old")
    os.chmod(f"{below.store_path}/tmp", 0o1777)
    above = stage.layer("tmp/new", implied=(b"", b"tmp"))
    os.setxattr(f"{above.store_path}/tmp", "trusted.overlay.opaque", b"y")

    rootfs = stage.mount(below, above)

    assert attributes(rootfs / "tmp")[0] == 0o1777
    assert os.listdir(rootfs / "tmp") == ["new"]


@pytest.mark.parametrize(
    "path", [b"..", b"../../../escaped", b"dir/../..", b"/dir", b"dir/", b"di\0r", b"x" * 5000]
)
def test_a_forged_list_of_implied_directories_is_harmless(stage: Stage, path: bytes) -> None:
    below = stage.layer("dir/")
    os.chmod(below.store_path, 0o700)
    above = stage.layer("dir/", implied=(b"", path))
    outside = tree(stage.directory)

    rootfs = stage.mount(below, above)

    assert attributes(rootfs / "dir")[0] == 0o755
    assert stage.unmount() == ()
    changed = {line.split(b"/")[0] for line in tree(stage.directory).keys() ^ outside.keys()}
    assert changed <= {b"overlay"}


MODES = {"explicit": 0o711, "opaque": 0o750}
PATHS = ("a", "a/b", "a/b/c", "a/d", "e")
_KINDS = st.sampled_from(["absent", "explicit", "implied", "opaque", "emptied", "whiteout", "file"])
LAYERS = st.lists(st.fixed_dictionaries(dict.fromkeys(PATHS, _KINDS)), min_size=1, max_size=5)


def is_made(kinds: dict[str, str], path: str) -> bool:
    """Whether a layer has something there: all that it is in must be directories."""
    parents = [path[:length] for length, letter in enumerate(path) if letter == "/"]
    return kinds[path] != "absent" and all(
        kinds[one] not in ("absent", "whiteout", "file") for one in parents
    )


def unpacked_one_over_the_other(layers: list[dict[str, str]]) -> dict[str, int]:
    """The directories' modes, as umoci and containerd get them; a file has none, -1."""
    found: dict[str, int] = {}
    for kinds in layers:
        for path in PATHS:
            kind = kinds[path]
            if not is_made(kinds, path):
                continue
            was = found.get(path, -1)
            if kind in ("opaque", "emptied", "whiteout", "file") or was == -1:
                found = {one: mode for one, mode in found.items() if not one.startswith(f"{path}/")}
            match kind:
                case "explicit" | "opaque":
                    found[path] = MODES[kind]
                case "implied" | "emptied":
                    found[path] = 0o755 if was == -1 else was
                case "whiteout":
                    found.pop(path, None)
                case "file":
                    found[path] = -1
    return found


def kinds_of(**kinds: str) -> dict[str, str]:
    """What a layer has: paths with _ for /."""
    return dict.fromkeys(PATHS, "absent") | {path.replace("_", "/"): kind for path, kind in kinds.items()}


@example([kinds_of(a="explicit", a_b="explicit"), kinds_of(a="emptied", a_b="implied")])
@example([kinds_of(a="opaque", a_b="explicit"), kinds_of(a="implied", a_b="implied", a_b_c="file")])
@given(LAYERS)
@settings(max_examples=60)
def test_any_layers_look_as_if_unpacked_one_over_the_other(made: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        stage = Stage(Path(directory))
        layers: list[StoredLayer] = []
        for kinds in made:
            here = [path for path in PATHS if is_made(kinds, path)]
            implied = [path.encode() for path in here if kinds[path] in ("implied", "emptied")]
            layers.append(stage.layer(implied=(b"", *implied)))
            for path in here:
                place = f"{layers[-1].store_path}/{path}"
                match kinds[path]:
                    case "whiteout":
                        os.mknod(place, stat.S_IFCHR, 0)
                    case "file":
                        Path(place).touch()
                    case kind:
                        os.mkdir(place)
                        os.chmod(place, MODES.get(kind, 0o755))
                        if kind in ("opaque", "emptied"):
                            os.setxattr(place, "trusted.overlay.opaque", b"y")
        rootfs = stage.mount(*layers)
        try:
            found = {
                path: attributes(rootfs / path)[0] if (rootfs / path).is_dir() else -1
                for path in PATHS
                if (rootfs / path).exists()
            }
            assert found == unpacked_one_over_the_other(made)
        finally:
            assert stage.unmount() == ()


def test_a_missing_layer_is_a_named_error_and_leaves_no_mount(stage: Stage) -> None:
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


def test_a_bundle_is_mounted_in_the_opened_directory_not_at_its_path(stage: Stage) -> None:
    bundle = stage.directory / "bundle"
    (bundle / "rootfs").mkdir(parents=True)
    elsewhere = stage.directory / "elsewhere"
    (elsewhere / "rootfs").mkdir(parents=True)
    directory = os.open(bundle, os.O_RDONLY)
    bundle.rename(stage.directory / "moved")
    bundle.symlink_to(elsewhere)

    caller = Cancellation("pull")
    rootfs = f"{bundle}/rootfs"
    mount_rootfs([stage.layer("a")], str(stage.overlay), rootfs, directory, caller)
    write_runtime_config(str(bundle), rootfs, b"{}", directory, lambda _status: None, Limits(), caller)

    os.close(directory)
    assert os.listdir(stage.directory / "moved/rootfs") == ["a"]
    assert (stage.directory / "moved/config.json").exists()
    assert os.listdir(elsewhere) == ["rootfs"]
    assert not os.path.ismount(elsewhere / "rootfs")
    assert stage.unmount(stage.directory / "moved/rootfs") == ()


def implied_in_many_layers(stage: Stage) -> list[StoredLayer]:
    """Layers whose directories have no entries of their own, so that the upper directory must have them all."""
    names = [f"dir{number}" for number in range(20)]
    below = stage.layer(*(f"{name}/below" for name in names))
    above = [
        stage.layer(*(f"{name}/file{number}" for name in names), implied=tuple(map(os.fsencode, names)))
        for number in range(5)
    ]
    return [below, *above]


def test_creating_a_bundle_checks_for_cancellation_at_each_step(disk: Path) -> None:
    """At whichever check a caller leaves, nothing is written, and what is mounted can be undone."""
    stage = Stage(disk)
    layers = implied_in_many_layers(stage)
    config = b'{"config": {"User": "a", "Volumes": {"/dir1/new": {}, "/dir2": {}}}}'
    (Path(layers[0].store_path) / "etc").mkdir()
    (Path(layers[0].store_path) / "etc/passwd").write_bytes(b"a:x:1:2\n")
    checks = 0
    while True:
        checks += 1
        caller = CancelledAtCheck(checks)
        try:
            mount_layers(layers, stage.overlay, stage.rootfs, caller)
            write_config(disk, config, cancellation=caller)
        except Cancelled:
            assert not (disk / "config.json").exists()
            assert stage.unmount() == ()
            shutil.rmtree(stage.overlay)
            stage.overlay.mkdir()
        else:
            break

    assert stage.unmount() == ()
    # a layer, a directory to look for and one to make, a component of a path to follow
    assert checks > len(layers) + 20 + 20 + 8


def test_unmounting_waits_for_a_short_use_to_end(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    rootfs = stage.mount(stage.layer("a"))
    held = [os.open(rootfs, os.O_RDONLY)]

    def refused_once(path: str) -> None:
        try:
            unmount(path)
        except OSError:
            os.close(held.pop())
            raise

    monkeypatch.setattr(mounts, "unmount", refused_once)

    assert stage.unmount() == ()

    assert held == []
    assert not os.path.ismount(rootfs)


def test_unmounting_refuses_while_in_use_and_is_harmless_twice(stage: Stage) -> None:
    rootfs = stage.mount(stage.layer("a"))
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=rootfs, stdin=subprocess.PIPE) as user:
        (told,) = stage.unmount()
        user.communicate(b"\n")

    assert str(rootfs) in told
    assert stage.unmount() == ()
    assert stage.unmount() == ()
    assert str(rootfs) not in OverlayMounts().mounted()
