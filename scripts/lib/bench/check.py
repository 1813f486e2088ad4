"""Compares a root filesystem with the image: every path, its attributes and its content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from bench.place import Refusal
from bench.tree import Kind, Node

_SHOWN: Final = 5  # differences named in an error


def check(rootfs: Path, nodes: Sequence[Node], directory_times: bool) -> None:
    """Compare a root filesystem, except its root directory, with the expected result.

    Args:
        rootfs: the result of a pull.
        nodes: the expected entries.
        directory_times: whether to compare the times of directories; not every tool restores them.

    Raises:
        Refusal: the root filesystem differs; the error names the first differences.
    """
    wrong: list[str] = []
    found = dict(_walk(rootfs))
    for node in nodes:
        state = found.pop(node.path, None)
        if state is None:
            wrong.append(f"{node.path} is missing")
        else:
            wrong += _differences(rootfs, node, state, directory_times)
    wrong += [f"{path} is not in the image" for path in found]
    if wrong:
        raise Refusal(f"{rootfs} has {len(wrong)} differences: {'; '.join(wrong[:_SHOWN])}")


def _differences(rootfs: Path, node: Node, found: os.stat_result, directory_times: bool) -> Iterator[str]:
    path = rootfs / node.path
    if _kind(found) != node.kind:
        yield f"{node.path} is not a {node.kind}"
        return
    if stat.S_IMODE(found.st_mode) != node.mode:
        yield f"{node.path} has mode {stat.S_IMODE(found.st_mode):o} instead of {node.mode:o}"
    if (found.st_uid, found.st_gid) != (node.uid, node.gid):
        yield f"{node.path} has owner {found.st_uid}:{found.st_gid} instead of {node.uid}:{node.gid}"
    if found.st_mtime_ns != node.mtime * 10**9 and (node.kind != "directory" or directory_times):
        yield f"{node.path} has time {found.st_mtime_ns} instead of {node.mtime * 10**9}"
    if _content(path, node.kind) != node.content:
        yield f"{node.path} has different content"
    if node.twin and not os.path.samestat(found, os.lstat(rootfs / node.twin)):
        yield f"{node.path} is not the same file as {node.twin}"


def _walk(rootfs: Path) -> Iterator[tuple[str, os.stat_result]]:
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(rootfs / below) as entries:
            for entry in entries:
                path = f"{below}{entry.name}"
                state = entry.stat(follow_symlinks=False)
                yield path, state
                if stat.S_ISDIR(state.st_mode):
                    waiting.append(f"{path}/")


def _kind(found: os.stat_result) -> Kind | None:
    if stat.S_ISREG(found.st_mode):
        return "file"
    if stat.S_ISDIR(found.st_mode):
        return "directory"
    return "symlink" if stat.S_ISLNK(found.st_mode) else None


def _content(path: Path, kind: Kind) -> str:
    match kind:
        case "file":
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        case "symlink":
            return str(path.readlink())
        case "directory":
            return ""
