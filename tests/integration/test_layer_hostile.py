"""Layers that mean harm: what archive/tar, containerd, umoci, Docker and tarfile were attacked by.

Each is unpacked beside canaries (`Unpacker`), which no entry may touch; most also show where the entry went
instead: into the layer.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import tarfile
from pathlib import Path

import pytest

from guestpull_server.errors import CorruptLayer, WorkerFailed
from guestpull_server.models import MiB
from support.images import (
    Entry,
    RawTar,
    device,
    directory,
    entry,
    fifo,
    file,
    hardlink,
    layer,
    opaque,
    symlink,
    whiteout,
)
from support.peers import run
from support.unpacking import CANARY, Unpacker, feed

UP = "../" * 20


# -- paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "../canary/file",
        f"{UP}etc/passwd",
        "/etc/passwd",
        "//etc//passwd",
        "./../etc/./passwd",
        "a/../../../etc/passwd",
        "etc/x/../passwd",
        "a/b/../../../../../etc/passwd",
        "/../../etc/passwd",
    ],
)
def test_a_path_out_of_the_layer_leads_into_it(unpacker: Unpacker, path: str) -> None:
    unpacked = unpacker.unpack(file(path, b"mine"))
    inside = "canary/file" if "canary" in path else "etc/passwd"
    assert unpacked.read(inside) == b"mine"


@pytest.mark.parametrize("made", [symlink, hardlink])
@pytest.mark.parametrize("path", ["..", ".", "/", "", "a/..", "../.."])
def test_the_root_cannot_become_a_link(unpacker: Unpacker, made: type[Entry], path: str) -> None:
    with pytest.raises(CorruptLayer):
        unpacker.unpack(directory("etc"), file("etc/passwd"), made(path, "/etc/passwd"))  # type: ignore[arg-type]


@pytest.mark.parametrize("one", [file("."), device("./", "char", 1, 3), fifo("..")])
def test_the_root_can_become_nothing_but_a_directory(unpacker: Unpacker, one: Entry) -> None:
    with pytest.raises(CorruptLayer, match="root of the layer"):
        unpacker.unpack(one)


def test_the_root_may_come_twice(unpacker: Unpacker) -> None:
    nodes = unpacker.unpack(directory("./", mode=0o700), file("f"), directory("/", mode=0o755)).nodes
    assert nodes[b""].mode == 0o755


# -- symlinks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["/", "..", UP, "/etc", f"{UP}etc", "/proc/self/root", "/proc/1/root", "/dev"]
)
def test_writing_through_a_symlink_stays_in_the_layer(unpacker: Unpacker, target: str) -> None:
    unpacked = unpacker.unpack(
        symlink("way", target), file("way/passwd", b"mine"), directory("way/d"), fifo("way/p")
    )
    assert unpacked.nodes[b"way"].kind == "symlink"
    assert any(path.endswith(b"passwd") for path in unpacked.paths)


def test_a_chain_of_symlinks_stays_in_the_layer(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(
        directory("etc"),
        directory("dummy"),
        symlink("dummy/etc", "/etc"),
        symlink("localetc", "./dummy/etc"),
        symlink("again", "localetc/../dummy/../localetc"),
        file("again/unbroken", b"mine"),
    )
    assert unpacked.read("etc/unbroken") == b"mine"


def test_a_symlink_that_is_changed_between_two_entries_is_seen(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(
        directory("a"), directory("b"), symlink("way", "a"), file("way/1"), symlink("way", "b"), file("way/2")
    )
    assert unpacked.paths == {b"a", b"b", b"way", b"a/1", b"b/2"}


def test_a_directory_that_becomes_a_symlink_after_it_was_entered_is_seen(unpacker: Unpacker) -> None:
    # the class of CVE-2018-1000xxx and of CVE-2025-4517: what was checked is no longer what is there
    unpacked = unpacker.unpack(
        file("d/e/1"), symlink("d", f"{UP}canary"), file("d/e/2"), file("d/file", b"mine"), file("d/e/3")
    )
    assert unpacked.paths == {b"d", b"canary", b"canary/e", b"canary/e/2", b"canary/e/3", b"canary/file"}


def test_a_file_over_a_symlink_replaces_the_link_not_its_target(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(file("target", b"kept"), symlink("link", "target"), file("link", b"new"))
    assert (unpacked.read("target"), unpacked.read("link")) == (b"kept", b"new")


def test_attributes_of_a_symlink_are_never_its_targets(unpacker: Unpacker) -> None:
    link = entry("link", tarfile.SYMTYPE, link="target", mode=0o777, uid=1, mtime=5)
    nodes = unpacker.unpack(file("target", mode=0o400), link).nodes
    assert (nodes[b"target"].mode, nodes[b"target"].uid, nodes[b"target"].mtime_ns) == (0o400, 0, 0)
    assert (nodes[b"link"].uid, nodes[b"link"].mtime_ns) == (1, 5 * 10**9)


def test_a_directory_entry_on_a_symlink_changes_nothing_behind_it(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(directory("d", mode=0o700), symlink("l", "d"), directory("l", mode=0o777))
    assert unpacked.nodes[b"d"].mode == 0o700
    assert unpacked.nodes[b"l"].kind == "directory"


# -- hard links ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["../canary/file", f"{UP}canary/file", "/canary/file", "/etc/passwd", f"{UP}etc/shadow"]
)
def test_a_hard_link_cannot_reach_out(unpacker: Unpacker, target: str) -> None:
    with pytest.raises(CorruptLayer, match="the layer has no file"):
        unpacker.unpack(hardlink("stolen", target))


@pytest.mark.parametrize(
    ("link", "target"),
    [
        (symlink("way", f"{UP}etc"), "way/passwd"),
        (symlink("way", "/etc"), "/way/passwd"),
        (symlink("d/way", "../../etc"), "d/way/passwd"),
        (symlink("way", "/proc/self/cwd/etc"), "way/passwd"),
    ],
)
def test_a_hard_link_through_a_symlink_cannot_reach_out(unpacker: Unpacker, link: Entry, target: str) -> None:
    with pytest.raises(CorruptLayer, match="the layer has no file"):
        unpacker.unpack(link, hardlink("stolen", target))


def test_a_hard_link_through_a_symlink_finds_the_layers_own_file(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(
        file("etc/passwd", b"inside"), symlink("d1", f"{UP}etc"), hardlink("mine", "/d1/passwd")
    )
    assert unpacked.read("mine") == b"inside"


def test_writing_to_a_hard_link_of_a_symlink_does_not_follow_it(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(
        symlink("a", f"{UP}canary/file"), hardlink("b", "a"), file("b", b"mine"), file("a", b"mine too")
    )
    assert (unpacked.read("a"), unpacked.read("b")) == (b"mine too", b"mine")


def test_replacing_one_of_two_names_does_not_write_to_the_other(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(file("a", b"first"), hardlink("b", "a"), file("b", b"second"))
    assert (unpacked.read("a"), unpacked.read("b")) == (b"first", b"second")


# -- whiteouts ----------------------------------------------------------------------------------------------


def test_a_whiteout_through_a_symlink_stays_in_the_layer(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(symlink("way", f"{UP}canary"), whiteout("way/file"))
    assert unpacked.is_whiteout("canary/file")


def test_an_opaque_marker_on_a_symlink_stays_in_the_layer(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(symlink("way", f"{UP}etc"), opaque("way"))
    assert unpacked.is_opaque("etc")


@pytest.mark.parametrize("path", ["../.wh.canary", f"{UP}canary/.wh.file", "/.wh.etc", "dne/../.wh.etc"])
def test_a_whiteout_cannot_delete_outside(unpacker: Unpacker, path: str) -> None:
    unpacker.unpack(file(path))


def test_a_whiteout_of_what_the_layer_made_deletes_nothing(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(directory("d"), file("d/f", b"kept"), whiteout("d"), whiteout("d/f"))
    assert unpacked.read("d/f") == b"kept"


def test_a_name_that_only_contains_the_prefix_is_a_name(unpacker: Unpacker) -> None:
    assert unpacker.unpack(file("a.wh.b"), file(".whx"), file("wh.x")).paths == {b"a.wh.b", b".whx", b"wh.x"}


# -- devices and overlayfs ----------------------------------------------------------------------------------


def test_nothing_is_written_to_a_device_that_a_file_replaces(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(device("null", "char", 1, 3), file("null", b"mine"))
    assert unpacked.read("null") == b"mine"


@pytest.mark.parametrize("one", [fifo("p"), device("p", "char", 1, 3)])
def test_nothing_waits_at_a_fifo_or_device(unpacker: Unpacker, one: Entry) -> None:
    unpacked = unpacker.unpack(one, hardlink("q", "p"), file("p", b"1"), file("q", b"2"))
    assert (unpacked.read("p"), unpacked.read("q")) == (b"1", b"2")


@pytest.mark.parametrize("number", [(1 << 12, 0), (0, 1 << 20), (-1, 0), (1 << 40, 1)])
def test_device_numbers_out_of_range_are_an_error(unpacker: Unpacker, number: tuple[int, int]) -> None:
    bad = device("d", "char", *number)
    with pytest.raises(CorruptLayer, match="numbers out of range"):
        unpacker.unpack_layer(layer(bad, tar_format=tarfile.GNU_FORMAT))


@pytest.mark.parametrize("prefix", ["trusted.overlay.", "user.overlay."])
@pytest.mark.parametrize("name", ["opaque", "redirect", "metacopy", "origin", "whiteout", "overlay.opaque"])
def test_xattrs_that_steer_overlayfs_are_dropped(unpacker: Unpacker, prefix: str, name: str) -> None:
    record = {f"SCHILY.xattr.{prefix}{name}": "/canary"}
    unpacked = unpacker.unpack(
        directory("d", pax=record),
        file("f", b"x", pax=record),
        directory("./", pax=record),
        directory("./d", pax=record),
    )
    assert not unpacked.is_opaque("d")
    assert _xattrs(unpacked.root) == _xattrs(unpacked.root / "d") == _xattrs(unpacked.root / "f") == []


def _xattrs(path: Path) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


@pytest.mark.parametrize("name", ["", "nonsense", "user.", "x" * 300, "user." + "n" * 300])
def test_xattr_names_that_cannot_be_are_an_error_or_dropped(unpacker: Unpacker, name: str) -> None:
    try:
        unpacked = unpacker.unpack(file("f", pax={f"SCHILY.xattr.{name}": "x"}))
    except CorruptLayer:
        return
    assert unpacked.result.dropped_xattrs == 1
    assert _xattrs(unpacked.root / "f") == []


# -- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["\\", "..\\..\\etc", "C:\\", "\n", "\x1b[31m", "-rf", "*", "...", " ", "…", "\udcff\udcfe", "a\rb"],
)
def test_odd_names_are_names(unpacker: Unpacker, name: str) -> None:
    assert unpacker.unpack(file(name)).paths == {name.encode(errors="surrogateescape")}


def test_a_name_of_255_bytes_is_a_name_and_of_256_an_error(unpacker: Unpacker) -> None:
    assert unpacker.unpack(file("n" * 255)).paths == {b"n" * 255}
    with pytest.raises(CorruptLayer, match="too long"):
        unpacker.unpack(file("n" * 256))


@pytest.mark.parametrize("record", ["path", "linkpath"])
def test_a_nul_in_a_path_is_an_error(unpacker: Unpacker, record: str) -> None:
    with pytest.raises(CorruptLayer, match="NUL"):
        unpacker.unpack(Entry(_with_pax(symlink("s", "t"), {record: "etc/passwd\0.txt"}).header))


def _with_pax(one: Entry, records: dict[str, str]) -> Entry:
    one.header.pax_headers = records
    return one


_IMPOSSIBLE = [
    {"uid": "-1"},
    {"gid": "4294967295"},
    {"uid": "99999999999"},
    {"mtime": "9" * 19},
    {"mtime": "-9223372036854775808.5"},
    {"atime": "-9223372036854775808.5"},
    {"size": "-5"},
    {"uid": "root"},
]


@pytest.mark.parametrize("record", _IMPOSSIBLE)
def test_numbers_out_of_range_are_an_error(unpacker: Unpacker, record: dict[str, str]) -> None:
    with pytest.raises(CorruptLayer):
        unpacker.unpack(_with_pax(file("f", uid=5), record))


@pytest.mark.parametrize("owner", [{"uid": "-1"}, {"gid": "4294967295"}, {"uid": "99999999999"}])
@pytest.mark.parametrize("path", ["d", "./"])
def test_owners_out_of_range_of_a_directory_that_is_there_are_an_error(
    unpacker: Unpacker, path: str, owner: dict[str, str]
) -> None:
    with pytest.raises(CorruptLayer, match="owner out of range"):
        unpacker.unpack(directory("d"), _with_pax(directory(path, uid=5), owner))


@pytest.mark.parametrize("seconds", [-(1 << 40), -1, 0, 1 << 33, 1 << 40, (1 << 63) // 10**9])
def test_any_time_is_a_time(unpacker: Unpacker, seconds: int) -> None:
    unpacked = unpacker.unpack(
        _with_pax(file("f"), {"mtime": str(seconds)}), _with_pax(directory("d"), {"mtime": str(seconds)})
    )
    assert unpacked.paths == {b"f", b"d"}


def test_a_deep_path_is_made(unpacker: Unpacker) -> None:
    deep = "/".join(["d" * 10] * 250)
    assert deep.encode() + b"/f" in unpacker.unpack(file(f"{deep}/f")).paths


def test_a_deep_tree_can_be_replaced(unpacker: Unpacker) -> None:
    deep = "/".join(["d"] * 250)
    assert unpacker.unpack(file(f"{deep}/f"), file("d", b"flat")).paths == {b"d"}


# -- code ---------------------------------------------------------------------------------------------------

_MODULE = b"open('/it-ran', 'w').close()"


def _modules(name: str) -> list[Entry]:
    """A module of this name, wherever this interpreter would look for it."""
    paths = [path.lstrip("/") for path in sys.path if path.startswith("/")]
    return [file(f"{path}/{name}.py", _MODULE) for path in paths]


def test_no_module_of_a_layer_is_run_when_its_gzip_stream_is_corrupt(unpacker: Unpacker) -> None:
    content = random.Random(0).randbytes(8 * MiB)  # the modules are on disk long before the end comes
    whole = layer(*_modules("gzip"), file("content", content))
    wrong_checksum = whole.blob[:-8] + bytes(4) + whole.blob[-4:]
    root = unpacker.directory()
    with unpacker.workers.unpack(str(root), "sha256", whole.digest) as worker:
        feed(worker, wrong_checksum)
        with pytest.raises(CorruptLayer, match="CRC"):
            worker.finish()
    assert (root / "content").exists()
    assert not (root / "it-ran").exists()


def test_a_confined_process_imports_nothing(disk: Path) -> None:
    unpacked = disk / "layer"
    for one in _modules("not_loaded_yet"):
        path = unpacked / one.header.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(one.content)
    script = """
import os, sys
from guestpull_server.layer.confinement import confine
confine(sys.argv[1], os.getppid())
try:
    import not_loaded_yet
except ImportError:
    os.write(1, b"refused")
"""
    assert run(sys.executable, "-c", script, str(unpacked)).stdout == "refused"
    assert not (unpacked / "it-ran").exists()


def test_no_source_of_a_layer_is_read_when_an_error_is_told(unpacker: Unpacker) -> None:
    root = unpacker.directory()
    source = root / str(hashlib.__file__).lstrip("/")
    source.parent.mkdir(parents=True)
    source.write_text("# coding: whatever the layer likes")
    os.utime(source, (0, 1))  # reading it would change the first
    with (
        unpacker.workers.unpack(str(root), "sha0", "sha256:f00") as worker,
        pytest.raises(WorkerFailed, match=r"hashlib.py:\d+"),
    ):
        worker.finish()
    assert source.stat().st_atime == 0


@pytest.mark.parametrize("error_at", ["after files", "at once"])
def test_a_layer_that_turns_out_to_be_corrupt_says_so_by_name(unpacker: Unpacker, error_at: str) -> None:
    before = [file(f"f{number}", b"x") for number in range(100)] if error_at == "after files" else []
    garbage = RawTar(b"\xaa" * 512)
    with pytest.raises(CorruptLayer, match=r"octal number|checksum"):
        unpacker.unpack(*before, garbage)


def test_the_canaries_would_notice(unpacker: Unpacker, disk: Path) -> None:
    (disk / "canary" / "file").write_bytes(CANARY[::-1])
    with pytest.raises(AssertionError):
        unpacker.check_canaries()
