"""Small but realistic images: a base that runs, and a layer with every kind of entry."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from support.images import (
    Layer,
    device,
    directory,
    fifo,
    file,
    files,
    hardlink,
    layer,
    opaque,
    symlink,
    whiteout,
)

BUSYBOX: Final = Path("/bin/busybox")
_CAPABILITY: Final = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
"""security.capability of cap_net_bind_service=p (a vfs_cap_data of version 2)."""


def runnable() -> Layer:
    """A base layer with a shell, users and groups."""
    applets = ("sh", "ls", "cat", "id", "echo", "sleep", "touch", "stat", "true", "env", "pwd")
    return layer(
        directory("bin"),
        file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755, mtime=1_700_000_000.25),
        *(symlink(f"bin/{applet}", "busybox", mtime=1_700_000_001) for applet in applets),
        directory("etc"),
        file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nshop:x:1234:1235:shop:/srv:/bin/sh\n"),
        file("etc/group", b"root:x:0:\nshop:x:1235:\naudit:x:2000:root,shop\n"),
        directory("root", mode=0o700),
        directory("tmp", mode=0o1777, mtime=1_600_000_000),
        directory("srv", uid=1234, gid=1235),
    )


def everything() -> Layer:
    """A layer with each kind of entry and attribute."""
    return layer(
        directory("all", mode=0o2775, uid=12, gid=34, mtime=1_234_567_890.5),
        file("all/setuid", b"#!", mode=0o4755, mtime=1.5),
        file("all/setgid", b"#!", mode=0o2755, uid=3, gid=4),
        file("all/capable", b"#!", mode=0o755, pax={"SCHILY.xattr.security.capability": _CAPABILITY}),
        file("all/noted", b"x", pax={"SCHILY.xattr.user.note": "remember"}),
        file("all/exact", b"t", pax={"mtime": "1600000000.123456789"}),
        file("all/" + "long" * 50, b"long name"),
        file("all/empty"),
        file("all/odd \n\t\\ \udcff name", b"odd"),
        file("all/big", bytes(range(256)) * 10_000),
        hardlink("all/hard", "all/big"),
        hardlink("all/harder", "all/hard"),
        symlink("all/soft", "/etc/passwd", uid=5, gid=6, mtime=1_000_000_000),
        symlink("all/dangling", "../../../nowhere"),
        device("all/null", "char", 1, 3, mode=0o666),
        device("all/loop", "block", 7, 0, mode=0o660),
        fifo("all/pipe", mode=0o640),
        file("no/entry/for/parents", b"implied"),
        directory("closed", mode=0o000),
        file("closed/inside", b"hidden"),
    )


def changes() -> Layer:
    """A layer on top of both: it deletes, replaces and hides entries, and adds some without their directories."""
    return layer(
        whiteout("all/setuid"),
        file("all/empty", b"not any more", mode=0o600),
        directory("no"),
        opaque("no"),
        file("no/longer", b"instead"),
        file("tmp/inside", b"the directory keeps its mode"),
        file("srv/inside", b"the directory keeps its owner"),
        symlink("closed", "tmp"),
        *files("usr/share/many", count=300, size=200),
    )
