"""Reads file trees as values, and compares them entry by entry.

    assert differences(tree(rootfs), tree(other)) == []

An entry has everything that a container can notice: type, mode, owner, time, link target, device number, extended
attributes, content, and the other names of the same file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, fields

_OVERLAY_XATTRS = ("trusted.overlay.", "user.overlay.")


@dataclass(frozen=True)
class Node:
    """One entry of a tree."""

    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    content: str = ""
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[str, bytes], ...] = ()
    links: frozenset[bytes] = frozenset()


_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def tree(root: str | os.PathLike[str]) -> dict[bytes, Node]:
    """All entries of a directory, including itself as b"", by relative path."""
    top = os.fsencode(root)
    paths = [b""]
    for directory, names, files in os.walk(top):
        inside = os.path.relpath(directory, top)
        prefix = b"" if inside == b"." else inside + b"/"
        paths += [prefix + name for name in (*names, *files)]
    statuses = {path: os.lstat(os.path.join(top, path) if path else top) for path in paths}
    names_of: dict[tuple[int, int], set[bytes]] = {}
    for path, status in statuses.items():
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            names_of.setdefault((status.st_dev, status.st_ino), set()).add(path)
    return {
        path: _node(os.path.join(top, path) if path else top, status, names_of)
        for path, status in statuses.items()
    }


def _node(path: bytes, status: os.stat_result, names_of: Mapping[tuple[int, int], set[bytes]]) -> Node:
    kind = stat.S_IFMT(status.st_mode)
    content = ""
    if kind == stat.S_IFREG:
        with open(path, "rb") as file:
            content = f"{status.st_size} bytes, {hashlib.file_digest(file, 'sha256').hexdigest()}"
    names = os.listxattr(path, follow_symlinks=False)
    return Node(
        kind=_KINDS[kind],
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        content=content,
        target=os.readlink(path) if kind == stat.S_IFLNK else b"",
        device=(os.major(status.st_rdev), os.minor(status.st_rdev))
        if kind in (stat.S_IFCHR, stat.S_IFBLK)
        else (0, 0),
        xattrs=tuple(
            (name, os.getxattr(path, name, follow_symlinks=False))
            for name in sorted(names)
            if not name.startswith(_OVERLAY_XATTRS)
        ),
        links=frozenset(names_of.get((status.st_dev, status.st_ino), ())),
    )


def differences(
    ours: Mapping[bytes, Node], theirs: Mapping[bytes, Node], *, ignoring: frozenset[str] = frozenset()
) -> list[str]:
    """The differences, one line each; `ignoring` names fields of Node."""
    found: list[str] = []
    for path in sorted(ours.keys() | theirs.keys()):
        name = path.decode(errors="backslashreplace") or "/"
        one, other = ours.get(path), theirs.get(path)
        if one is None or other is None:
            found.append(f"{name}: only in {'theirs' if one is None else 'ours'}")
            continue
        for field in fields(Node):
            mine, his = getattr(one, field.name), getattr(other, field.name)
            if field.name not in ignoring and mine != his:
                found.append(f"{name}: {field.name} is {mine!r}, not {his!r}")
    return found
