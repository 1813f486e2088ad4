"""Removes what an earlier entry made, so that a later entry can take its place.

The order is always the same: a tar-split keeps the contents of replaced files in this order.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TypeAlias

Keep: TypeAlias = Callable[[int], None]
"""Called with the descriptor of a file with content before its last name is removed."""


def remove_file(name: bytes, status: os.stat_result, keep: Keep | None) -> int:
    """Remove anything but a directory; returns how many bytes of content go with it."""
    gone = status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0
    if gone and keep is not None:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            keep(file)
        finally:
            os.close(file)
    os.unlink(name)
    return gone


def remove_directory(name: bytes, keep: Keep | None, removed: Callable[[bytes], None]) -> int:
    """Remove a directory with everything in it: in each directory files by name, then directories by name.

    Args:
        name: the directory.
        keep: see Keep.
        removed: called with the path of each directory that is gone; the path begins with `name`.

    Returns how many bytes of content go with it.
    """
    gone = 0
    left = [name]
    while left:
        with os.scandir(left[-1]) as found:
            inside = sorted(found, key=lambda one: one.name)
        directories = []
        for one in inside:
            if one.is_dir(follow_symlinks=False):
                directories.append(one.path)
            else:
                gone += remove_file(one.path, os.lstat(one.path), keep)
        if directories:
            left += reversed(directories)
        else:
            empty = left.pop()
            os.rmdir(empty)
            removed(empty)
    return gone
