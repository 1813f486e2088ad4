"""Tar-splits and proof: a directory is the layer, or what is changed is named."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import Cancelled, DeadlineExceeded, StorageFailed, WorkerFailed
from guestpull_server.layer import (
    Change,
    ChangeKind,
    LayerWorkers,
    implied_fingerprint,
    inspect_layer,
    verify_layer,
)
from guestpull_server.layer.tar_split import TarSplitReader, TarSplitWriter
from guestpull_server.models import Digest
from support.images import (
    Compression,
    Entry,
    RawTar,
    device,
    directory,
    fifo,
    file,
    files,
    hardlink,
    layer,
    layer_of_tar,
    opaque,
    sparse_file,
    symlink,
    tar_of,
    whiteout,
)
from support.peers import run
from support.unpacking import Unpacked, Unpacker
from support.waiting import PATIENCE, until

MTIME = 1_600_000_000


def verify(unpacked: Unpacked) -> list[Change]:
    """What the proof finds."""
    assert unpacked.tar_split is not None
    implied = implied_fingerprint(unpacked.result.implied_directories)
    digest = Digest(unpacked.layer.diff_id)
    return list(verify_layer(str(unpacked.root), str(unpacked.tar_split), digest, implied=implied))


def kinds(changes: list[Change]) -> set[tuple[bytes, ChangeKind]]:
    """Which path, and what of it."""
    return {(change.path, change.kind) for change in changes}


def _acl(*entries: tuple[int, int, int]) -> str:
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)
    return packed.decode("utf-8", "surrogateescape")


_NOBODY = 0xFFFFFFFF
_NAMED_ACL = _acl((1, 6, _NOBODY), (2, 7, 1000), (4, 4, _NOBODY), (16, 7, _NOBODY), (32, 0, _NOBODY))
_MINIMAL_ACL = _acl((1, 7, _NOBODY), (4, 5, _NOBODY), (32, 1, _NOBODY))

_RICH: list[Entry | RawTar] = [
    directory("./", mode=0o711, mtime=MTIME),
    directory("d", mode=0o2775, gid=7, mtime=MTIME + 1),
    file("d/f", b"f" * 700, mode=0o4755, uid=3, pax={"SCHILY.xattr.user.a": "b", "mtime": "1600000000.123456789"}),
    file("d/large", random.Random(1).randbytes(1_500_000)),
    file("d/empty", mtime=MTIME),
    symlink("s", "d", mtime=MTIME),
    file("s/through", b"through a link"),
    hardlink("h", "d/f"),
    hardlink("h2", "s/f"),
    hardlink("hs", "s"),
    whiteout("d/gone"),
    opaque("o"),
    file("o/.wh.with-content", b"literal" * 200),
    device("n", "char", 1, 3, mode=0o666),
    device("b", "block", 8, 1),
    device("zero", "char", 0, 0),
    fifo("p", mode=0o622),
    file("x" * 150, b"long"),
    file("implied/a/b", b"b"),
    file("acl", b"acl", pax={"SCHILY.xattr.system.posix_acl_access": _NAMED_ACL}),
    file("acl-minimal", b"acl", pax={"SCHILY.xattr.system.posix_acl_access": _MINIMAL_ACL}),
    directory("acl-directory", pax={"SCHILY.xattr.system.posix_acl_default": _NAMED_ACL}),
    file("acl-directory/inside", b"i"),
    directory("acl-directory", mode=0o700),
    file("dropped", b"d", pax={"SCHILY.xattr.trusted.overlay.redirect": "/x", "SCHILY.xattr.nonsense": "x"}),
    file("replaced", b"first"),
    file("replaced", b"second"),
    file("linked", b"kept by its other name"),
    hardlink("keeps", "linked"),
    file("linked", b"new"),
    directory("tree"),
    file("tree/2/b", b"lost b"),
    file("tree/1/a", b"lost a"),
    file("tree/c", b"lost c"),
    hardlink("tree/1/c", "tree/c"),
    file("tree", b"now a file"),
    whiteout("again"),
    directory("again", mtime=5),
    file("again/f", b"g"),
    whiteout("below"),
    file("below/f", b"h"),
    whiteout("all-gone"),
    whiteout("all-gone/inner"),
    file("flat"),
    whiteout("flat/inner"),
    file(".wh..wh.plnk/1.2", b"aufs"),
    sparse_file("sparse", {100_000: b"12345", 300_000: b"67890"}, 500_000),
    sparse_file("hole", {}, 70_000),
    sparse_file("lost-sparse", {50_000: b"abc"}, 90_000),
    file("lost-sparse", b"plain"),
]  # fmt: skip


@pytest.fixture
def rich(unpacker: Unpacker) -> Unpacked:
    return unpacker.unpack(*_RICH, tar_split=True)


# -- what is the layer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_a_layer_of_everything_is_proved(unpacker: Unpacker, compression: Compression) -> None:
    assert verify(unpacker.unpack(*_RICH, compression=compression, tar_split=True)) == []


@pytest.mark.parametrize("algorithm", ["sha512", "sha384"])
def test_a_layer_is_proved_by_any_digest_that_names_it(unpacker: Unpacker, algorithm: str) -> None:
    unpacked = unpacker.unpack(*_RICH, tar_split=True)
    diff_id = Digest(f"{algorithm}:{hashlib.new(algorithm, unpacked.layer.tar).hexdigest()}")
    assert verify_layer(str(unpacked.root), str(unpacked.tar_split), diff_id) == ()


@pytest.mark.parametrize(
    "tar",
    [
        b"",
        bytes(512),
        bytes(10240),
        tar_of([file("f", b"x" * 600)]).rstrip(b"\0"),
        tar_of([file("f", b"x")]) + b"what follows the end" * 1000,
    ],
)
def test_odd_tars_are_proved_to_their_last_byte(unpacker: Unpacker, tar: bytes) -> None:
    unpacked = unpacker.unpack_layer(layer_of_tar(tar), tar_split=True)
    assert verify(unpacked) == []


@pytest.mark.parametrize("tar_format", ["gnu", "pax", "oldgnu", "v7"])
def test_what_gnu_tar_wrote_is_proved(unpacker: Unpacker, disk: Path, tar_format: str) -> None:
    source = disk / "staging-source"
    (source / "etc" / "deep").mkdir(parents=True)
    (source / "etc" / "deep" / "file").write_bytes(b"x" * 10_000)
    (source / "etc" / "link").symlink_to("deep")
    with (source / "sparse").open("wb") as image:
        image.seek(10_000_000)
        image.write(b"end")
    options = ["--sparse"] if tar_format != "v7" else []
    command = ["tar", "-C", str(source), f"--format={tar_format}", *options, "-c", "."]
    tar = subprocess.run(command, check=True, capture_output=True).stdout
    assert verify(unpacker.unpack_layer(layer_of_tar(tar), tar_split=True)) == []


_PATHS = st.sampled_from(["a", "b", "a/b", "a/c", "b/c", "a/b/c", "./a", "c", "a/../b", "s", "s/a", "s/t"])
_TARGETS = st.sampled_from(["a", "b", "/a", "../b", "s", "a/b", "nowhere", "."])
_MAKERS = st.one_of(
    st.builds(
        file, _PATHS, st.binary(max_size=20), mode=st.sampled_from([0o644, 0o4755]), uid=st.integers(0, 2)
    ),
    st.builds(directory, _PATHS, mode=st.sampled_from([0o755, 0o2711, 0o1777]), gid=st.integers(0, 2)),
    st.builds(symlink, _PATHS, _TARGETS),
    st.builds(hardlink, _PATHS, _PATHS),
    st.builds(whiteout, _PATHS),
    st.builds(opaque, _PATHS),
    st.builds(fifo, _PATHS),
    st.builds(device, _PATHS, st.just("char"), st.integers(0, 1), st.integers(0, 1)),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(_MAKERS, max_size=12))
def test_any_layer_that_can_be_unpacked_is_proved(unpacker: Unpacker, entries: list[Entry]) -> None:
    one = layer(*entries, compression="none")
    root = unpacker.directory()
    tar_split = root.with_suffix(".tar_split")
    try:
        with unpacker.workers.unpack(
            str(root), "sha256", one.digest, tar_split_path=str(tar_split)
        ) as worker:
            worker.write(memoryview(one.blob))
            result = worker.finish()
    except Exception:  # noqa: BLE001 - what could not be unpacked needs no proof
        return
    finally:
        unpacker.check_canaries()
    implied = implied_fingerprint(result.implied_directories)
    found = verify_layer(str(root), str(tar_split), Digest(one.diff_id), implied=implied)
    shutil.rmtree(root.parent)
    assert found == ()


# -- what is not --------------------------------------------------------------------------------------------


def _keeping_times(path: Path, change: Callable[[Path], object]) -> None:
    status, above = path.lstat(), path.parent.lstat()
    change(path)
    if os.path.lexists(path):
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
    os.utime(path.parent, ns=(above.st_atime_ns, above.st_mtime_ns))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with path.open("r+b") as opened:
        opened.write(content)


def _fill_hole(path: Path) -> None:
    with path.open("r+b") as opened:
        opened.seek(200_000)
        opened.write(b"!")


def _becomes(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        make(path)

    return replace


def _device(mode: int) -> Callable[[Path], object]:
    return _becomes(lambda path: os.mknod(path, mode, os.makedev(1, 5)))


def _link_to(target: str) -> Callable[[Path], object]:
    return _becomes(lambda path: path.symlink_to(target))


def _xattr(name: str, value: bytes) -> Callable[[Path], object]:
    return lambda path: os.setxattr(path, name, value, follow_symlinks=False)


def _no_xattr(name: str) -> Callable[[Path], object]:
    return lambda path: os.removexattr(path, name, follow_symlinks=False)


def _copied(path: Path) -> None:
    shutil.copy2(path, f"{path}.new")
    os.rename(f"{path}.new", path)


_CAPABILITY = struct.pack("<5I", 0x02000001, 1, 0, 0, 0)
_TAMPERING: dict[str, tuple[str, Callable[[Path], object], ChangeKind]] = {
    "a byte": ("d/large", _flip, ChangeKind.CONTENT),
    "a byte of a small file": ("again/f", _flip, ChangeKind.CONTENT),
    "a byte of a linked file": ("keeps", _flip, ChangeKind.CONTENT),
    "a byte in a hole": ("sparse", _fill_hole, ChangeKind.CONTENT),
    "a byte in nothing but a hole": (
        "hole",
        lambda path: path.write_bytes(b"\1" * 70_000),
        ChangeKind.CONTENT,
    ),
    "a shorter file": ("d/large", lambda path: os.truncate(path, 1_000_000), ChangeKind.SIZE),
    "a longer file": ("d/large", lambda path: os.truncate(path, 1_600_000), ChangeKind.SIZE),
    "an empty file filled": ("d/empty", lambda path: path.write_bytes(b"x"), ChangeKind.SIZE),
    "a mode": ("again/f", lambda path: path.chmod(0o600), ChangeKind.MODE),
    "a setuid bit": ("d/f", lambda path: path.chmod(0o755), ChangeKind.MODE),
    "a directory's mode": ("implied", lambda path: path.chmod(0o777), ChangeKind.MODE),
    "an owner": ("again/f", lambda path: os.chown(path, 1, 0), ChangeKind.OWNER),
    "a group": ("d", lambda path: os.chown(path, 0, 8), ChangeKind.OWNER),
    "a link's owner": ("s", lambda path: os.lchown(path, 1, 1), ChangeKind.OWNER),
    "a link's target": ("s", _link_to("e"), ChangeKind.LINK_TARGET),
    "an xattr": ("d/f", _xattr("user.a", b"c"), ChangeKind.XATTR),
    "an xattr more": ("again/f", _xattr("user.more", b""), ChangeKind.XATTR),
    "an xattr less": ("d/f", _no_xattr("user.a"), ChangeKind.XATTR),
    "a capability": ("x" * 150, _xattr("security.capability", _CAPABILITY), ChangeKind.XATTR),
    "an ACL": ("acl", _no_xattr("system.posix_acl_access"), ChangeKind.XATTR),
    "opacity less": ("o", _no_xattr("trusted.overlay.opaque"), ChangeKind.XATTR),
    "opacity more": ("d", _xattr("trusted.overlay.opaque", b"y"), ChangeKind.XATTR),
    "a redirection": ("d", _xattr("trusted.overlay.redirect", b"/etc"), ChangeKind.XATTR),
    "an xattr of a device": ("n", _xattr("trusted.x", b"y"), ChangeKind.XATTR),
    "an xattr of a link": ("s", _xattr("trusted.x", b"y"), ChangeKind.XATTR),
    "a device's number": ("n", _device(0o20666), ChangeKind.DEVICE),
    "a whiteout's number": ("d/gone", _device(0o20000), ChangeKind.DEVICE),
    "a file that became a link": ("again/f", _link_to("/etc/passwd"), ChangeKind.TYPE),
    "a file that became a fifo": ("again/f", _becomes(os.mkfifo), ChangeKind.TYPE),
    "a file that became a device": ("again/f", _device(0o20644), ChangeKind.TYPE),
    "a file that became a directory": ("again/f", _becomes(Path.mkdir), ChangeKind.TYPE),
    "an empty file that became a fifo": ("d/empty", _becomes(os.mkfifo), ChangeKind.TYPE),
    "a file less": ("again/f", Path.unlink, ChangeKind.MISSING),
    "a link less": ("s", Path.unlink, ChangeKind.MISSING),
    "a whiteout less": ("d/gone", Path.unlink, ChangeKind.MISSING),
    "a directory less": ("implied", shutil.rmtree, ChangeKind.MISSING),
    "a directory that became a link": ("acl-directory", _link_to("d"), ChangeKind.MISSING),
    "a hard link broken": ("h", _copied, ChangeKind.HARD_LINKS),
    "a hard link more": (
        "acl-minimal",
        _becomes(lambda path: path.hardlink_to(path.parent / "acl")),
        ChangeKind.HARD_LINKS,
    ),
}


@pytest.mark.parametrize("name", _TAMPERING)
def test_a_change_is_named_even_where_times_are_as_they_were(rich: Unpacked, name: str) -> None:
    path, change, kind = _TAMPERING[name]
    _keeping_times(rich.root / path, change)
    found = kinds(verify(rich))
    assert (path.encode(), kind) in found or (
        kind in (ChangeKind.CONTENT, ChangeKind.HARD_LINKS) and kind in {one for _, one in found}
    )
    assert ChangeKind.TAR_SPLIT not in {one for _, one in found}


def test_a_change_of_time_alone_is_named(rich: Unpacked) -> None:
    for path in ("again/f", "d", "s", "n", "d/gone", "implied/a", "."):
        os.utime(rich.root / path, ns=(0, 1), follow_symlinks=False)
    assert kinds(verify(rich)) == {
        (path.encode(), ChangeKind.TIME) for path in ("again/f", "d", "s", "n", "d/gone", "implied/a", "")
    }


def test_a_file_more_is_named(rich: Unpacked) -> None:
    above = (rich.root / "d").stat()
    (rich.root / "d" / "evil").write_bytes(b"evil")
    os.utime(rich.root / "d", ns=(above.st_atime_ns, above.st_mtime_ns))
    assert kinds(verify(rich)) == {(b"d/evil", ChangeKind.EXTRA)}


def test_everything_that_was_changed_is_named_and_nothing_else(rich: Unpacked) -> None:
    (rich.root / "again/f").chmod(0o600)
    _keeping_times(rich.root / "d/large", _flip)
    os.setxattr(rich.root / "keeps", "user.x", b"y")
    assert kinds(verify(rich)) == {
        (b"again/f", ChangeKind.MODE),
        (b"d/large", ChangeKind.CONTENT),
        (b"keeps", ChangeKind.XATTR),
    }


def test_a_change_says_what_is_and_what_was(rich: Unpacked) -> None:
    (rich.root / "again/f").chmod(0o600)
    (found,) = verify(rich)
    assert str(found) == "again/f: mode: it is 0600, not 0644"


def test_another_layers_tar_split_proves_nothing(unpacker: Unpacker) -> None:
    one = unpacker.unpack(file("f", b"one"), tar_split=True)
    other = unpacker.unpack(file("f", b"two"), tar_split=True)
    assert verify_layer(str(one.root), str(other.tar_split), Digest(one.layer.diff_id)) != ()
    assert verify_layer(str(one.root), str(one.tar_split), Digest(other.layer.diff_id)) != ()


def test_a_directory_and_a_tar_split_that_agree_prove_nothing_without_the_diff_id(unpacker: Unpacker) -> None:
    evil = unpacker.unpack(file("bin/sh", b"evil"), tar_split=True)
    good = unpacker.unpack(file("bin/sh", b"good"), tar_split=True)
    found = verify_layer(str(evil.root), str(evil.tar_split), Digest(good.layer.diff_id))
    assert [change.kind for change in found] == [ChangeKind.DIFF_ID]


# -- the tar-split -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [(), (b"",), (b"", b"implied", b"implied/a", b"d")])
def test_directories_that_are_listed_wrongly_as_without_an_entry_are_reported(
    unpacker: Unpacker, workers: LayerWorkers, listed: tuple[bytes, ...]
) -> None:
    unpacked = unpacker.unpack(directory("d"), file("implied/a/b", b"b"), tar_split=True)
    assert set(unpacked.result.implied_directories) == {b"", b"implied", b"implied/a"}
    place = str(unpacked.root), str(unpacked.tar_split), Digest(unpacked.layer.diff_id)
    found = verify_layer(*place, implied=implied_fingerprint(listed))
    assert [change.kind for change in found] == [ChangeKind.IMPLIED]
    cancellation = Cancellation("verification")
    assert workers.verify(*place, cancellation, implied=implied_fingerprint(listed)) == found


@pytest.mark.parametrize(
    "entries",
    [
        [file("a/b/c", b"c"), directory("a/b")],
        [file("a/b/c", b"c"), whiteout("a/b"), opaque("a")],
        [whiteout("a"), file("a/b/c", b"c")],
        [file("a/b/c", b"c"), file("a/b", b"b"), file("x/y", b"y"), directory("./")],
        [symlink("s", "real/place"), file("s/f", b"f"), directory("real")],
        [file("a/f", b"f"), symlink("a", "t"), directory("a"), file("a/b/c", b"c")],
    ],
)
def test_the_proof_knows_which_directories_have_no_entry(unpacker: Unpacker, entries: list[Entry]) -> None:
    assert verify(unpacker.unpack(*entries, tar_split=True)) == []


def test_a_tar_split_is_for_its_owner_alone(rich: Unpacked) -> None:
    assert rich.tar_split is not None
    assert rich.tar_split.stat().st_mode & 0o7777 == 0o600


def test_a_tar_split_that_is_there_already_is_not_touched(unpacker: Unpacker) -> None:
    root = unpacker.directory()
    tar_split = root.with_suffix(".tar_split")
    tar_split.write_bytes(b"mine")
    with pytest.raises(StorageFailed, match="exists"):
        unpacker.workers.unpack(str(root), "sha256", "sha256:…", tar_split_path=str(tar_split))
    assert tar_split.read_bytes() == b"mine"


def test_a_tar_split_is_small(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(*files("d", count=2000, size=2000), compression="none", tar_split=True)
    assert unpacked.tar_split is not None
    assert unpacked.tar_split.stat().st_size < unpacked.layer.size / 100


def test_without_a_path_there_is_no_tar_split(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(*_RICH)
    assert sorted(unpacked.root.parent.iterdir()) == [unpacked.root]


@pytest.mark.parametrize("kept", [0, 10, 25, 30, 200, -1])
def test_a_tar_split_that_is_cut_short_is_reported(rich: Unpacked, kept: int) -> None:
    assert rich.tar_split is not None
    rich.tar_split.write_bytes(rich.tar_split.read_bytes()[:kept])
    assert [change.kind for change in verify(rich)] == [ChangeKind.TAR_SPLIT]


def test_an_altered_tar_split_never_passes_and_never_fails_otherwise(rich: Unpacked) -> None:
    assert rich.tar_split is not None
    whole = rich.tar_split.read_bytes()
    source = random.Random(11)
    for _ in range(300):
        altered = bytearray(whole)
        altered[source.randrange(len(altered))] = source.choice((0, 0xFF, source.randrange(256)))
        rich.tar_split.write_bytes(altered)
        assert verify(rich) or _headers(bytes(altered)) == _headers(whole)


def _headers(tar_split: bytes) -> bytes:
    """The headers that a tar-split has: another byte in a zstd frame may mean the same."""
    descriptor = os.memfd_create("tar-split")
    try:
        os.write(descriptor, tar_split)
        return b"".join(bytes(piece) for piece in TarSplitReader(descriptor).headers(1 << 30))
    finally:
        os.close(descriptor)


def test_a_tampered_file_cannot_be_hidden_by_its_sum(unpacker: Unpacker) -> None:
    good = unpacker.unpack(file("f", b"good"), tar_split=True)
    evil = unpacker.unpack(file("f", b"evil"), tar_split=True)
    _keeping_times(good.root / "f", lambda path: path.write_bytes(b"evil"))
    found = verify_layer(str(good.root), str(evil.tar_split), Digest(good.layer.diff_id))
    assert [change.kind for change in found] == [ChangeKind.DIFF_ID]


def test_a_tar_split_that_would_grow_without_end_is_refused(unpacker: Unpacker, disk: Path) -> None:
    unpacked = unpacker.unpack(file("f"), tar_split=True)
    bomb = disk / "staging-bomb"
    with bomb.open("wb") as opened:
        writer = TarSplitWriter(opened.fileno())
        for _ in range(64):
            writer.literal(memoryview(bytes(1 << 20)))
        writer.finish()
    small = Limits(max_layer_bytes=1 << 20, max_layer_entries=1000)
    found = verify_layer(str(unpacked.root), str(bomb), Digest(unpacked.layer.diff_id), limits=small)
    assert [change.kind for change in found] == [ChangeKind.TAR_SPLIT]


def test_a_tar_split_that_is_not_there_is_an_error(unpacker: Unpacker, disk: Path) -> None:
    unpacked = unpacker.unpack(file("f"))
    with pytest.raises(StorageFailed, match="No such file"):
        verify_layer(str(unpacked.root), str(disk / "missing"), Digest(unpacked.layer.diff_id))


def test_a_directory_that_is_not_there_is_an_error(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(file("f"), tar_split=True)
    shutil.rmtree(unpacked.root)
    with pytest.raises(StorageFailed, match="No such file"):
        verify(unpacked)


def test_a_link_in_the_place_of_the_directory_is_named(rich: Unpacked, disk: Path) -> None:
    rich.root.rename(disk / "staging-away")
    rich.root.symlink_to(disk / "staging-away")
    assert kinds(verify(rich)) == {(b"", ChangeKind.TYPE)}
    assert kinds(list(inspect_layer(str(rich.root)))) == {(b"", ChangeKind.TYPE)}


@pytest.mark.parametrize("put", [lambda path: path.symlink_to("/dev/null"), os.mkfifo, os.mkdir])
def test_what_is_in_the_place_of_the_tar_split_is_named(rich: Unpacked, put: Callable[[Path], None]) -> None:
    assert rich.tar_split is not None
    rich.tar_split.unlink()
    put(rich.tar_split)
    assert kinds(verify(rich)) == {(b"", ChangeKind.TAR_SPLIT)}


def test_reports_of_a_foreign_directory_are_bounded(unpacker: Unpacker) -> None:
    one = unpacker.unpack(*files("d", count=3000, size=1), compression="none", tar_split=True)
    other = unpacker.unpack(file("f"))
    assert len(verify_layer(str(other.root), str(one.tar_split), Digest(one.layer.diff_id))) <= 1000


def test_verification_does_not_follow_links_out_of_the_directory(rich: Unpacked, disk: Path) -> None:
    (disk / "staging-away").mkdir()
    os.rename(rich.root / "again", disk / "staging-away" / "again")
    (rich.root / "again").symlink_to(disk / "staging-away" / "again")
    assert ChangeKind.MISSING in {change.kind for change in verify(rich)}


def test_a_worker_finds_what_verification_finds(rich: Unpacked, workers: LayerWorkers) -> None:
    (rich.root / "again/f").chmod(0o600)
    os.setxattr(rich.root / ("x" * 150), "user.x", b"\xff\0")
    assert rich.tar_split is not None
    found = workers.verify(
        str(rich.root), str(rich.tar_split), Digest(rich.layer.diff_id), Cancellation("verification")
    )
    assert list(found) == verify(rich) != []


def test_a_worker_proves_what_is_readable_by_root_alone(unpacker: Unpacker, workers: LayerWorkers) -> None:
    private = [directory("d", mode=0, uid=5), file("d/f", b"f", mode=0, uid=5), directory("t")]
    marked = file("t/f", b"t", pax={"SCHILY.xattr.trusted.mark": "m"})
    unpacked = unpacker.unpack(*private, marked, opaque("t"), tar_split=True)
    digest = Digest(unpacked.layer.diff_id)
    cancellation = Cancellation("verification")
    assert workers.verify(str(unpacked.root), str(unpacked.tar_split), digest, cancellation) == ()


def test_a_worker_names_what_it_cannot_read(unpacker: Unpacker, workers: LayerWorkers) -> None:
    unpacked = unpacker.unpack(file("f"))
    with pytest.raises(StorageFailed, match="No such file"):
        workers.verify(
            str(unpacked.root), "/missing", Digest(unpacked.layer.diff_id), Cancellation("verification")
        )


def _verification_that_halts(
    unpacker: Unpacker, workers: LayerWorkers, cancellation: Cancellation
) -> tuple[Future[tuple[Change, ...]], list[int]]:
    """A verification whose worker is stopped in the middle, and that worker."""
    sizes = range(100)
    unpacked = unpacker.unpack(*(sparse_file(f"f{size}", {}, 1 << 20) for size in sizes), tar_split=True)
    for size in sizes:
        (unpacked.root / f"f{size}").write_bytes(bytes(1 << 20))
    verified = str(unpacked.root), str(unpacked.tar_split), Digest(unpacked.layer.diff_id)
    pool = ThreadPoolExecutor(1)
    attempts: list[Future[tuple[Change, ...]]] = []

    def is_stopped() -> list[int]:
        if not attempts or attempts[-1].done():  # the last one before it could be stopped
            attempts.append(pool.submit(workers.verify, *verified, cancellation))
        found = [worker for worker in _children(workers.pid) if _is_confined(worker)]
        for worker in found:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGSTOP)
        return found

    until("the worker that unpacked is gone", lambda: not _children(workers.pid))
    until("a worker is stopped", is_stopped)
    pool.shutdown(wait=False)
    return attempts[-1], _children(workers.pid)


def test_a_worker_ends_when_the_caller_leaves(unpacker: Unpacker, workers: LayerWorkers) -> None:
    cancellation = Cancellation("verification")
    verification, _ = _verification_that_halts(unpacker, workers, cancellation)

    cancellation.cancel()

    with pytest.raises(Cancelled):
        verification.result(PATIENCE)
    assert _children(workers.pid) == []


def test_a_worker_ends_when_the_callers_time_is_up(unpacker: Unpacker, workers: LayerWorkers) -> None:
    late = Cancellation("verification", time.monotonic() + 1)
    verification, _ = _verification_that_halts(unpacker, workers, late)

    with pytest.raises(DeadlineExceeded):
        verification.result(PATIENCE)
    assert _children(workers.pid) == []


def test_a_verifying_worker_that_dies_is_an_error(unpacker: Unpacker, workers: LayerWorkers) -> None:
    verification, (worker,) = _verification_that_halts(unpacker, workers, Cancellation("verification"))

    os.kill(worker, signal.SIGKILL)

    with pytest.raises(WorkerFailed, match="died"):
        verification.result(PATIENCE)


def _is_confined(worker: int) -> bool:
    try:
        return "NoNewPrivs:\t1" in Path(f"/proc/{worker}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_verifications_at_once_find_what_one_finds(rich: Unpacked) -> None:
    (rich.root / "again/f").chmod(0o600)
    found: list[list[Change]] = []
    threads = [threading.Thread(target=lambda: found.append(verify(rich))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 4


def test_verification_leaves_no_descriptors_and_changes_nothing(rich: Unpacked) -> None:
    nodes = rich.nodes
    descriptors = set(os.listdir("/proc/self/fd"))  # of which others may close some meanwhile
    _keeping_times(rich.root / "again/f", _flip)
    verify(rich)
    _keeping_times(rich.root / "again/f", _flip)
    assert set(os.listdir("/proc/self/fd")) <= descriptors
    assert rich.nodes == nodes


def verify_in_squashfs(unpacked: Unpacked, disk: Path) -> tuple[Change, ...]:
    """What the proof finds, with the layer's directory in a squashfs."""
    image, mounted = disk / "staging-image", disk / "staging-mounted"
    mounted.mkdir()
    run("mksquashfs", str(unpacked.root), str(image), "-quiet", "-no-progress")
    run("mount", "-t", "squashfs", "-o", "loop,ro", str(image), str(mounted))
    try:
        return verify_layer(str(mounted), str(unpacked.tar_split), Digest(unpacked.layer.diff_id))
    finally:
        run("umount", str(mounted))


def test_a_layer_in_squashfs_is_proved_to_the_second(unpacker: Unpacker, disk: Path) -> None:
    kept = [one for one in _RICH if not (isinstance(one, Entry) and "acl" in one.header.name)]
    assert verify_in_squashfs(unpacker.unpack(*kept, tar_split=True), disk) == ()


def test_a_squashfs_in_which_nothing_has_xattrs_is_proved(unpacker: Unpacker, disk: Path) -> None:
    plain = [directory("d"), file("d/f", b"content"), file("d/empty"), symlink("d/s", "f"), fifo("p")]
    assert verify_in_squashfs(unpacker.unpack(*plain, tar_split=True), disk) == ()


@pytest.mark.parametrize("mtime", [(1 << 32) + 5, -5])
def test_a_time_that_squashfs_has_no_bits_for_is_compared_by_those_that_it_has(
    unpacker: Unpacker, disk: Path, mtime: int
) -> None:
    unpacked = unpacker.unpack(file("f", b"content", pax={"mtime": str(mtime)}), tar_split=True)
    assert verify_in_squashfs(unpacked, disk) == ()


# -- without a tar-split -----------------------------------------------------------------------------------


def test_a_layer_without_a_tar_split_may_be_one(unpacker: Unpacker) -> None:
    assert inspect_layer(str(unpacker.unpack(*_RICH).root)) == ()


def test_what_no_layer_has_is_found_without_a_tar_split(unpacker: Unpacker) -> None:
    root = unpacker.unpack(directory("d"), file("d/f", b"x")).root
    (root / "d" / ".wh.gone").touch()
    os.setxattr(root / "d", "trusted.overlay.redirect", b"/etc")
    os.setxattr(root / "d" / "f", "trusted.overlay.metacopy", b"")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(root / "socket"))
    assert kinds(list(inspect_layer(str(root)))) == {
        (b"d/.wh.gone", ChangeKind.EXTRA),
        (b"d", ChangeKind.XATTR),
        (b"d/f", ChangeKind.XATTR),
        (b"socket", ChangeKind.TYPE),
    }
