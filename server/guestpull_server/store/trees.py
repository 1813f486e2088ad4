"""Whole directories: deleted, measured. Whatever lies in them, no link is followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Final

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str) -> int:
    """Delete a file or a directory with all that is in it; returns the bytes of its regular files.

    Harmless where nothing is there.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return 0
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(path)
        return _own_bytes(status)
    freed = _descend(path, _remove_files, lambda name, parent: os.rmdir(name, dir_fd=parent))
    os.rmdir(path)
    return freed


def tree_bytes(path: str) -> int:
    """The bytes of the regular files below a path, each file counted once."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    linked: set[int] = set()

    def measure(directory: int) -> tuple[int, list[str]]:
        total = 0
        directories: list[str] = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    if status.st_nlink > 1:
                        if status.st_ino in linked:
                            continue
                        linked.add(status.st_ino)
                    total += status.st_size
        return total, directories

    return _descend(path, measure, None)


def _descend(
    path: str, enter: Callable[[int], tuple[int, list[str]]], leave: Callable[[str, int], None] | None
) -> int:
    """Go through a directory and all below it; returns the sum of what `enter` counts.

    Follows no links, and needs neither recursion nor more than two descriptors however deep a layer nests its
    directories. Nobody else may move directories within.

    Args:
        path: where to begin.
        enter: called with each directory, open; returns what it counts, and where to go on from there.
        leave: called for each directory but the first, when all below it is done, with its name and its
            parent, open.
    """
    here = os.open(path, _DIRECTORY)
    try:
        total, pending = enter(here)
        above: list[tuple[str, list[str]]] = []
        while pending or above:
            if pending:
                name = pending.pop()
                below = os.open(name, _DIRECTORY, dir_fd=here)
                above.append((name, pending))
                os.close(here)
                here = below
                count, pending = enter(here)
                total += count
            else:
                name, pending = above.pop()
                parent = os.open("..", _DIRECTORY, dir_fd=here)
                os.close(here)
                here = parent
                if leave is not None:
                    leave(name, here)
    finally:
        os.close(here)
    return total


def _remove_files(directory: int) -> tuple[int, list[str]]:
    """Delete all but the directories in a directory; returns the bytes freed, and the directories' names."""
    freed = 0
    directories: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
            else:
                freed += _own_bytes(entry.stat(follow_symlinks=False))
                os.unlink(entry.name, dir_fd=directory)
    return freed, directories


def _own_bytes(status: os.stat_result) -> int:
    """A file's length, shared among its hard links: it is freed with the last of them."""
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0
