"""What a layer's entries become: types, attributes, replacements, parents, whiteouts."""

from __future__ import annotations

import os
import random
import stat
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

from guestpull_server.errors import CorruptLayer
from guestpull_server.models import Decoder, Digest, StoredLayer
from guestpull_server.snapshot import OverlayMounts
from support.bundles import mount_layers
from support.images import (
    Compression,
    Entry,
    device,
    directory,
    entry,
    fifo,
    file,
    hardlink,
    layer,
    layer_of_tar,
    opaque,
    symlink,
    whiteout,
)
from support.trees import differences, tree
from support.unpacking import Unpacker

MTIME = 1_600_000_000


def _capability(effective: bool = True) -> str:
    """cap_net_bind_service=ep, as the kernel keeps it."""
    revision = 0x02000000 | effective
    return struct.pack("<5I", revision, 1 << 10, 0, 0, 0).decode("latin-1")


_ACL_OF_ANOTHER_USER = struct.pack(
    "<I" + "HHI" * 5, 2, 1, 7, 0xFFFFFFFF, 2, 7, 1000, 4, 7, 0xFFFFFFFF, 16, 7, 0xFFFFFFFF, 32, 7, 0xFFFFFFFF
)
"""u::rwx,u:1000:rwx,g::rwx,m::rwx,o::rwx, as the kernel keeps it."""


# -- types and attributes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_every_type_of_entry_is_made(unpacker: Unpacker, compression: Compression) -> None:
    unpacked = unpacker.unpack(
        directory("dir", mode=0o750, uid=1, gid=2, mtime=MTIME),
        file("dir/file", b"content", mode=0o640, uid=3, gid=4, mtime=MTIME + 1),
        symlink("dir/symlink", "../elsewhere", uid=5, gid=6, mtime=MTIME + 2),
        hardlink("hardlink", "dir/file"),
        device("char", "char", 1, 3, mode=0o666),
        device("block", "block", 259, 70000, mode=0o660),
        fifo("fifo", mode=0o622),
        compression=compression,
    )
    nodes = unpacked.nodes
    assert (nodes[b"dir"].kind, nodes[b"dir"].mode, nodes[b"dir"].uid, nodes[b"dir"].gid) == (
        "directory", 0o750, 1, 2
    )  # fmt: skip
    made = nodes[b"dir/file"]
    assert (made.kind, made.mode, made.uid, made.gid, made.mtime_ns) == (
        "file",
        0o640,
        3,
        4,
        (MTIME + 1) * 10**9,
    )
    assert unpacked.read("dir/file") == b"content"
    link = nodes[b"dir/symlink"]
    assert (link.kind, link.target, link.uid, link.gid, link.mtime_ns) == (
        "symlink", b"../elsewhere", 5, 6, (MTIME + 2) * 10**9
    )  # fmt: skip
    assert made.links == {b"dir/file", b"hardlink"}
    assert (nodes[b"char"].kind, nodes[b"char"].device, nodes[b"char"].mode) == (
        "character device",
        (1, 3),
        0o666,
    )
    assert (nodes[b"block"].kind, nodes[b"block"].device) == ("block device", (259, 70000))
    assert (nodes[b"fifo"].kind, nodes[b"fifo"].mode) == ("fifo", 0o622)


def test_the_result_tells_what_was_in_the_layer(unpacker: Unpacker) -> None:
    result = unpacker.unpack(file("a/b", b"12345"), file("c", b"67"), compression="zstd").result
    assert (result.decoder, result.size_bytes, result.entries) == (Decoder.ZSTD, 7, 2)
    assert result.implied_directories == (b"", b"a")


@pytest.mark.parametrize("owner", [0, 1000])
@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6711, 0o1644, 0o7777, 0o0])
def test_special_mode_bits_survive_owner_and_content(unpacker: Unpacker, mode: int, owner: int) -> None:
    nodes = unpacker.unpack(
        directory("d", mode=mode, uid=owner, gid=owner),
        file("f", b"x" * 100, mode=mode, uid=owner, gid=owner),
        entry("p", tarfile.FIFOTYPE, mode=mode, uid=owner, gid=owner),
    ).nodes
    assert {nodes[path].mode for path in (b"d", b"f", b"p")} == {mode}


def test_what_is_made_in_a_setgid_directory_has_the_group_that_its_entry_says(unpacker: Unpacker) -> None:
    nodes = unpacker.unpack(
        directory("d", mode=0o2775, gid=50),
        file("d/f", b"x"),
        directory("d/e"),
        file("d/implied/f"),
        symlink("d/s", "f"),
        fifo("d/p"),
    ).nodes
    assert {path: node.gid for path, node in nodes.items() if path.startswith(b"d/")} == {
        b"d/f": 0, b"d/e": 0, b"d/implied": 0, b"d/implied/f": 0, b"d/s": 0, b"d/p": 0
    }  # fmt: skip
    assert (nodes[b"d/e"].mode, nodes[b"d/implied"].mode, nodes[b"d"].gid) == (0o755, 0o755, 50)


def test_a_layer_takes_over_nothing_of_the_directory_that_it_is_unpacked_in(unpacker: Unpacker) -> None:
    content = layer(directory("d"), file("d/f"), file("implied/f"), symlink("s", "d"))
    root = unpacker.directory()
    os.setxattr(root, "system.posix_acl_default", _ACL_OF_ANOTHER_USER)
    os.setxattr(root, "system.posix_acl_access", _ACL_OF_ANOTHER_USER)
    os.chown(root, 7, 50)
    os.chmod(root, 0o2775)
    with unpacker.workers.unpack(str(root), "sha256", content.digest) as worker:
        worker.write(memoryview(content.blob))
        worker.finish()
    assert differences(tree(root), unpacker.unpack_layer(content).nodes) == []


def test_file_capabilities_and_other_xattrs_are_set(unpacker: Unpacker) -> None:
    records = {
        "SCHILY.xattr.security.capability": _capability(),
        "SCHILY.xattr.user.comment": "hello",
        "SCHILY.xattr.trusted.mark": "t",
    }
    nodes = unpacker.unpack(file("bin/ping", b"elf", mode=0o755, uid=7, pax=records)).nodes
    assert dict(nodes[b"bin/ping"].xattrs) == {
        "security.capability": _capability().encode("latin-1"),
        "user.comment": b"hello",
        "trusted.mark": b"t",
    }


def test_an_xattr_that_the_kernel_does_not_allow_there_is_dropped_and_counted(unpacker: Unpacker) -> None:
    record = {"SCHILY.xattr.user.x": "y"}
    result = unpacker.unpack(Entry(_with_pax(symlink("s", "t"), record).header)).result
    assert result.dropped_xattrs == 1


def _with_pax(one: Entry, records: dict[str, str]) -> Entry:
    one.header.pax_headers = records
    return one


def test_what_is_made_below_a_default_acl_has_no_acl_of_its_own(unpacker: Unpacker) -> None:
    # version 2; user::rwx group::r-x group:100:rwx mask::rwx other::---
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, permissions, who)
        for tag, permissions, who in (
            (1, 7, ~0 & 0xFFFFFFFF),
            (4, 5, ~0 & 0xFFFFFFFF),
            (8, 7, 100),
            (16, 7, ~0 & 0xFFFFFFFF),
            (32, 0, ~0 & 0xFFFFFFFF),
        )
    )
    records = {"SCHILY.xattr.system.posix_acl_default": acl.decode("utf-8", "surrogateescape")}
    nodes = unpacker.unpack(
        directory("d", pax=records), file("d/f", mode=0o644), directory("d/e", mode=0o755), file("d/i/f")
    ).nodes
    assert dict(nodes[b"d"].xattrs) == {"system.posix_acl_default": acl}
    for path in (b"d/f", b"d/e", b"d/i", b"d/i/f"):
        assert nodes[path].xattrs == ()
    assert [nodes[path].mode for path in (b"d/f", b"d/e", b"d/i")] == [0o644, 0o755, 0o755]


def test_times_are_set_to_the_nanosecond(unpacker: Unpacker) -> None:
    records = {"mtime": "1700000000.123456789"}
    nodes = unpacker.unpack(file("f", pax=records), directory("d", pax=records), file("d/f", b"later")).nodes
    assert nodes[b"f"].mtime_ns == nodes[b"d"].mtime_ns == 1_700_000_000_123_456_789


def test_a_directory_has_its_time_whatever_is_made_in_it_afterwards(unpacker: Unpacker) -> None:
    nodes = unpacker.unpack(
        directory("a", mtime=MTIME),
        directory("a/b", mtime=MTIME + 1),
        file("a/b/1"),
        file("other/2"),
        file("a/3"),
        file("a/b/4"),
        whiteout("a/b/5"),
    ).nodes
    assert (nodes[b"a"].mtime_ns, nodes[b"a/b"].mtime_ns) == (MTIME * 10**9, (MTIME + 1) * 10**9)


def test_the_root_has_the_attributes_of_its_entry(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(
        file("before"), directory("./", mode=0o1711, uid=8, gid=9, mtime=MTIME), file("after")
    )
    root = unpacked.nodes[b""]
    assert (root.mode, root.uid, root.gid, root.mtime_ns) == (0o1711, 8, 9, MTIME * 10**9)
    assert unpacked.result.implied_directories == ()


def test_the_same_layer_is_the_same_directory_whenever_it_is_unpacked(unpacker: Unpacker) -> None:
    entries = [file("a/b"), whiteout("c/d"), opaque("e"), symlink("f/g", "h"), directory("d"), file("d/x")]
    first = unpacker.unpack(*entries)
    second = unpacker.unpack(*entries)
    assert differences(first.nodes, second.nodes) == []


def test_files_of_all_sizes_have_every_byte(unpacker: Unpacker) -> None:
    source = random.Random(3)
    sizes = [0, 1, 511, 512, 513, 4096, 524_287, 524_288, 524_289, 3_000_001]
    unpacked = unpacker.unpack(*(file(f"f{size}", source.randbytes(size)) for size in sizes))
    source = random.Random(3)
    assert all(unpacked.read(f"f{size}") == source.randbytes(size) for size in sizes)


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_sparse_files_are_sparse_on_disk(unpacker: Unpacker, disk: Path, tar_format: str) -> None:
    source = disk / "staging-source"
    source.mkdir()
    with (source / "disk.img").open("wb") as image:
        for start in (0, 5_000_000, 90_000_000):
            image.seek(start)
            image.write(os.urandom(8192))
        image.truncate(100_000_000)
    tar = _gnu_tar("-C", str(source), "--sparse", f"--format={tar_format}", "-c", ".")
    unpacked = unpacker.unpack_layer(layer_of_tar(tar))
    assert unpacked.read("disk.img") == (source / "disk.img").read_bytes()
    assert (unpacked.root / "disk.img").stat().st_blocks * 512 < 1_000_000


def _gnu_tar(*options: str, tar: bytes = b"") -> bytes:
    return subprocess.run(["tar", *options], input=tar, check=True, capture_output=True).stdout


@pytest.mark.parametrize("tar_format", ["gnu", "pax", "oldgnu"])
def test_a_tree_is_unpacked_as_gnu_tar_unpacks_it(unpacker: Unpacker, disk: Path, tar_format: str) -> None:
    source, theirs = disk / "staging-source", disk / "staging-theirs"
    deep = source / ("n" * 120) / ("m" * 140)
    deep.mkdir(parents=True)
    theirs.mkdir()
    (deep / "file").write_bytes(b"x" * 70_000)
    (deep / os.fsdecode(b"\xff raw")).write_bytes(b"y")
    (source / "link").symlink_to("l" * 200)
    (source / "hard").hardlink_to(deep / "file")
    os.mkfifo(source / "pipe", 0o600)
    os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (source / "setuid").write_bytes(b"s")
    os.chown(source / "setuid", 12, 34)
    (source / "setuid").chmod(0o6755)
    if tar_format == "pax":
        os.setxattr(source / "setuid", "user.note", b"\0\1\xff")
    xattrs = ["--xattrs", "--xattrs-include=*"]
    keep = xattrs if tar_format == "pax" else []
    tar = _gnu_tar("-C", str(source), f"--format={tar_format}", *keep, "-c", ".")
    _gnu_tar("-C", str(theirs), *xattrs, "--numeric-owner", "-xp", tar=tar)
    ours = unpacker.unpack_layer(layer_of_tar(tar))
    assert differences(ours.nodes, tree(theirs)) == []


# -- entries that replace others ----------------------------------------------------------------------------

_MAKERS: dict[str, tuple[Entry, ...]] = {
    "file": (file("x", b"old", mode=0o600, uid=9),),
    "empty directory": (directory("x", mode=0o700, uid=9),),
    "directory": (directory("x"), file("x/a/b/c", b"c"), symlink("x/s", "a"), directory("x/e")),
    "symlink": (symlink("x", "target"),),
    "symlink to a directory": (directory("dir"), file("dir/kept"), symlink("x", "dir")),
    "dangling absolute symlink": (symlink("x", "/nowhere/at/all"),),
    "hard link": (file("other", b"shared"), hardlink("x", "other")),
    "device": (device("x", "char", 1, 3),),
    "whiteout": (whiteout("x"),),
    "fifo": (fifo("x"),),
}
_REPLACEMENTS: dict[str, tuple[Entry, str]] = {
    "file": (file("x", b"new", mode=0o644), "file"),
    "directory": (directory("x", mode=0o711), "directory"),
    "symlink": (symlink("x", "new-target"), "symlink"),
    "hard link": (hardlink("x", "first"), "file"),
    "device": (device("x", "block", 7, 0), "block device"),
    "fifo": (fifo("x", mode=0o644), "fifo"),
}


@pytest.mark.parametrize("old", _MAKERS.values(), ids=_MAKERS.keys())
@pytest.mark.parametrize("new", _REPLACEMENTS.values(), ids=_REPLACEMENTS.keys())
def test_a_later_entry_replaces_an_earlier_one(
    unpacker: Unpacker, old: tuple[Entry, ...], new: tuple[Entry, str]
) -> None:
    replacement, kind = new
    unpacked = unpacker.unpack(file("first", b"first"), *old, replacement)
    node = unpacked.nodes[b"x"]
    assert node.kind == kind
    if kind == "file":
        assert unpacked.read("x") == (b"new" if replacement.content else b"first")
    if kind == "directory":
        assert node.mode == 0o711
    else:
        assert not any(path.startswith(b"x/") for path in unpacked.paths)
    for path, kept in ((b"dir/kept", b""), (b"other", b"shared")):
        if path in unpacked.nodes:
            assert unpacked.read(path.decode()) == kept
    assert b"target" not in unpacked.nodes


def test_a_directory_over_a_directory_keeps_what_is_in_it(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(directory("d"), file("d/f", b"kept"), directory("d", mode=0o700, uid=3))
    assert unpacked.read("d/f") == b"kept"
    assert (unpacked.nodes[b"d"].mode, unpacked.nodes[b"d"].uid) == (0o700, 3)


def test_a_file_in_place_of_a_whiteout_hides_the_lower_one_by_itself(unpacker: Unpacker) -> None:
    assert unpacker.unpack(whiteout("f"), file("f", b"new")).read("f") == b"new"


def test_an_entry_below_a_replaced_directory_makes_it_anew(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(file("d/a/1"), symlink("d", "elsewhere"), directory("d"), file("d/a/2"))
    assert unpacked.paths == {b"d", b"d/a", b"d/a/2"}


# -- parents ------------------------------------------------------------------------------------------------


def test_missing_parents_are_made_and_told(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(file("a/b/c/file", b"x"), directory("a/b", mode=0o700, mtime=MTIME))
    assert unpacked.result.implied_directories == (b"", b"a", b"a/b/c")
    implied = unpacked.nodes[b"a/b/c"]
    assert (implied.mode, implied.uid, implied.gid, implied.mtime_ns) == (0o755, 0, 0, 0)
    assert (unpacked.nodes[b"a/b"].mode, unpacked.nodes[b"a/b"].mtime_ns) == (0o700, MTIME * 10**9)


def test_an_implied_directory_that_is_replaced_is_no_longer_told(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(file("a/b/c"), file("a", b"file"))
    assert unpacked.result.implied_directories == (b"",)


@pytest.mark.parametrize("target", ["usr/lib", "/usr/lib", "./usr/../usr/lib", "../../usr/lib", "first"])
def test_parents_that_are_symlinks_are_followed_within_the_layer(unpacker: Unpacker, target: str) -> None:
    unpacked = unpacker.unpack(
        directory("usr"),
        directory("usr/lib"),
        symlink("first", "usr/lib"),
        symlink("lib", target),
        file("lib/x", b"x"),
    )
    assert unpacked.read("usr/lib/x") == b"x"
    assert unpacked.nodes[b"lib"].kind == "symlink"


def test_a_symlink_to_nowhere_as_a_parent_leads_to_a_new_directory(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(symlink("lib", "/usr/lib"), file("lib/x", b"x"))
    assert unpacked.read("usr/lib/x") == b"x"


@pytest.mark.parametrize("parent", [file("p", b"x"), fifo("p"), device("p", "char", 1, 3)])
def test_a_parent_that_is_no_directory_is_an_error(unpacker: Unpacker, parent: Entry) -> None:
    with pytest.raises(CorruptLayer, match="is not a directory, but has entries"):
        unpacker.unpack(parent, file("p/x"))


@pytest.mark.parametrize(
    "links", [[symlink("a", "a")], [symlink("a", "b"), symlink("b", "a")], [symlink("a", "a/x")]]
)
def test_links_that_never_end_are_an_error(unpacker: Unpacker, links: list[Entry]) -> None:
    with pytest.raises(CorruptLayer):
        unpacker.unpack(*links, file("a/x"))


def _chain(links: int) -> list[Entry]:
    return [*(symlink(f"l{number}", f"l{number + 1}") for number in range(links)), directory(f"l{links}")]


def test_a_parent_may_lie_behind_as_many_links_as_containerd_follows(unpacker: Unpacker) -> None:
    assert b"l255/f" in unpacker.unpack(*_chain(255), file("l0/f")).paths


@pytest.mark.parametrize("links", [256, 1500])
def test_a_parent_behind_more_links_is_an_error(unpacker: Unpacker, links: int) -> None:
    with pytest.raises(CorruptLayer, match="'/l0' leads through more than 255 links"):
        unpacker.unpack(*_chain(links), file("l0/f"))


def test_implied_directories_below_one_that_is_replaced_are_no_longer_told(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(
        file("p/a/b/c/f"), directory("p/a/e"), file("p/a/e/g/f"), file("p/ab/f"), file("p/a")
    )
    assert unpacked.result.implied_directories == (b"", b"p", b"p/ab")


@pytest.mark.parametrize("target", ["missing/../d", "../../d/.", "/x/y/../../d/", "f/../d", "d//"])
def test_a_link_leads_where_its_target_says(unpacker: Unpacker, target: str) -> None:
    unpacked = unpacker.unpack(directory("d"), file("f"), symlink("l", target), file("l/x"))
    assert unpacked.paths == {b"d", b"d/x", b"f", b"l"}


# -- whiteouts ----------------------------------------------------------------------------------------------


def test_a_whiteout_is_overlayfs_whiteout(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(directory("etc"), whiteout("etc/passwd"), whiteout("top"))
    assert unpacked.is_whiteout("etc/passwd")
    assert unpacked.is_whiteout("top")
    assert unpacked.paths == {b"etc", b"etc/passwd", b"top"}


def test_an_opaque_directory_is_overlayfs_opaque_directory(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(directory("etc"), opaque("etc"), file("etc/kept", b"k"))
    assert unpacked.is_opaque("etc")
    assert unpacked.paths == {b"etc", b"etc/kept"}


def test_a_whiteout_makes_the_directory_that_it_stands_in(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(whiteout("usr/share/doc"), opaque("var/cache"))
    assert unpacked.is_whiteout("usr/share/doc")
    assert unpacked.is_opaque("var/cache")
    assert unpacked.result.implied_directories == (b"", b"usr", b"usr/share", b"var", b"var/cache")


@pytest.mark.parametrize("order", [0, 1])
def test_a_whiteout_speaks_of_lower_layers_only_wherever_it_stands(unpacker: Unpacker, order: int) -> None:
    entries = [whiteout("f"), file("f", b"this layer's")]
    assert unpacker.unpack(*entries[:: 1 - 2 * order]).read("f") == b"this layer's"


@pytest.mark.parametrize("order", [0, 1])
def test_a_directory_with_a_whiteout_of_the_same_name_hides_the_lower_one(
    unpacker: Unpacker, order: int
) -> None:
    entries = [whiteout("d"), directory("d", mode=0o711)]
    unpacked = unpacker.unpack(*entries[:: 1 - 2 * order], file("d/f"))
    assert unpacked.is_opaque("d")
    assert unpacked.nodes[b"d"].mode == 0o711


def test_entries_below_a_whiteout_of_the_same_layer_hide_the_lower_directory(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(whiteout("d"), file("d/f", b"new"))
    assert unpacked.is_opaque("d")
    assert unpacked.read("d/f") == b"new"
    assert unpacked.result.implied_directories == (b"",)


@pytest.mark.parametrize("inner", [whiteout("gone/inner"), whiteout("gone/deep/inner"), opaque("gone")])
def test_what_is_gone_stays_gone_when_something_in_it_is_gone_as_well(
    unpacker: Unpacker, inner: Entry
) -> None:
    # what Docker once wrote of `rm -rf gone`
    unpacked = unpacker.unpack(whiteout("gone"), inner, file("there"))
    assert (unpacked.paths, unpacked.is_whiteout("gone")) == ({b"gone", b"there"}, True)


@pytest.mark.parametrize("replacement", [file("d", b"now a file"), symlink("d", "f"), fifo("d")])
def test_what_replaces_a_directory_stays_when_something_in_that_is_gone(
    unpacker: Unpacker, replacement: Entry
) -> None:
    # what `umoci repack` writes where a directory became a file
    unpacked = unpacker.unpack(file("f"), replacement, whiteout("d/inner"), file("there"))
    assert unpacked.paths == {b"f", b"d", b"there"}
    assert unpacked.nodes[b"d"].kind == unpacker.unpack(replacement).nodes[b"d"].kind


@pytest.mark.parametrize("order", [0, 1])
def test_an_opaque_marker_keeps_what_this_layer_has_wherever_it_stands(
    unpacker: Unpacker, order: int
) -> None:
    entries = [opaque("d"), file("d/f", b"kept")]
    unpacked = unpacker.unpack(directory("d"), *entries[:: 1 - 2 * order])
    assert unpacked.is_opaque("d")
    assert unpacked.read("d/f") == b"kept"


@pytest.mark.parametrize(
    "gone", [whiteout("d/gone"), device("d/gone", "char", 0, 0)], ids=["oci", "overlayfs"]
)
def test_what_is_gone_is_not_even_listed_where_no_other_layer_has_the_directory(
    unpacker: Unpacker, disk: Path, gone: Entry
) -> None:
    one = unpacker.unpack(directory("d"), file("d/there"), gone)
    digest = Digest(one.layer.digest)
    rootfs = disk / "staging-rootfs"
    overlay = disk / "staging-overlay"
    for made in (rootfs, overlay):
        made.mkdir()
    mount_layers([StoredLayer(digest, one.result.diff_id, Decoder.GZIP, str(one.root))], overlay, rootfs)
    try:
        assert os.listdir(rootfs / "d") == ["there"]
    finally:
        OverlayMounts().unmount(str(rootfs), str(overlay))


def test_a_root_may_be_opaque(unpacker: Unpacker) -> None:
    assert unpacker.unpack(file(".wh..wh..opq"), file("f")).is_opaque("")


@pytest.mark.parametrize("name", [".wh..wh.plnk", ".wh..wh.aufs", ".wh..wh.orph"])
def test_what_aufs_kept_for_itself_is_skipped(unpacker: Unpacker, name: str) -> None:
    unpacked = unpacker.unpack(directory(name), file(f"{name}/123.456", b"x"), file(f"d/{name}/f"), file("f"))
    assert unpacked.paths == {b"f"}


def test_a_whiteout_may_come_twice(unpacker: Unpacker) -> None:
    assert unpacker.unpack(whiteout("f"), whiteout("f")).is_whiteout("f")


def test_a_whiteout_may_have_content_and_any_type(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(
        file(".wh.a", b"content" * 1000), directory(".wh.b"), symlink(".wh.c", "d"), file("e")
    )
    assert all(unpacked.is_whiteout(name) for name in "abc")


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh.", "d/.wh.."])
def test_a_whiteout_of_nothing_or_of_a_directory_itself_is_an_error(unpacker: Unpacker, name: str) -> None:
    with pytest.raises(CorruptLayer, match="names nothing that could be gone"):
        unpacker.unpack(directory("d"), file(name))


# -- hard links ---------------------------------------------------------------------------------------------


def test_a_hard_link_keeps_its_file_when_the_name_is_replaced(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(file("a", b"old"), hardlink("b", "a"), file("a", b"new"))
    assert (unpacked.read("a"), unpacked.read("b")) == (b"new", b"old")


def test_a_hard_link_to_a_replaced_name_is_the_new_file(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(file("a", b"old"), file("a", b"new"), hardlink("b", "a"))
    assert unpacked.nodes[b"b"].links == {b"a", b"b"}
    assert unpacked.read("b") == b"new"


def test_a_hard_link_to_a_symlink_is_the_symlink(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(symlink("a", "nowhere"), hardlink("b", "a"))
    assert (unpacked.nodes[b"b"].kind, unpacked.nodes[b"b"].target) == ("symlink", b"nowhere")


def test_a_hard_link_that_comes_twice_is_one(unpacker: Unpacker) -> None:
    unpacked = unpacker.unpack(file("a", b"x"), hardlink("b", "a"), hardlink("b", "a"))
    assert unpacked.nodes[b"a"].links == {b"a", b"b"}


def test_the_attributes_of_a_hard_links_own_header_mean_nothing(unpacker: Unpacker) -> None:
    link = entry("b", tarfile.LNKTYPE, link="a", mode=0o777, uid=5, mtime=MTIME)
    node = unpacker.unpack(file("a", b"x", mode=0o600), link).nodes[b"a"]
    assert (node.mode, node.uid, node.mtime_ns) == (0o600, 0, 0)


@pytest.mark.parametrize(
    "entries",
    [
        [hardlink("b", "missing")],
        [hardlink("b", "b")],
        [hardlink("b", "later"), file("later")],
        [directory("d"), hardlink("b", "d")],
        [directory("d"), hardlink("d/b", "d")],
        [hardlink("b", "")],
        [hardlink("b", "/")],
        [file("f"), hardlink("b", "f/x")],
    ],
)
def test_a_hard_link_to_what_is_no_file_of_the_layer_is_an_error(
    unpacker: Unpacker, entries: list[Entry]
) -> None:
    with pytest.raises(CorruptLayer, match="hard link"):
        unpacker.unpack(*entries)


# -- plain layers -------------------------------------------------------------------------------------------


def test_a_plain_layer_that_the_caller_checks_is_not_hashed_twice(unpacker: Unpacker) -> None:
    one = layer(file("f", b"x"), compression="none")
    assert unpacker.unpack_layer(one, skip_plain_hash=True).result.diff_id == one.digest


def test_a_compressed_layer_is_hashed_whatever_the_caller_checks(unpacker: Unpacker) -> None:
    one = layer(file("f", b"x"))
    assert unpacker.unpack_layer(one, skip_plain_hash=True).result.diff_id == one.diff_id != one.digest


def test_an_empty_layer_is_an_empty_directory(unpacker: Unpacker) -> None:
    assert unpacker.unpack().paths == set()
    assert unpacker.unpack_layer(layer_of_tar(b"", compression="none")).paths == set()
