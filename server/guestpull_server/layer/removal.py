"""Making room for an entry: what an earlier one put in its place goes away.

In an order that is always the same: a record keeps the contents that are lost so, and whoever reads it must
know which is which.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TypeAlias

Lost: TypeAlias = Callable[[int], None]
"""Is given the descriptor of a file with content whose last name goes away."""


def remove_file(name: bytes, status: os.stat_result, lost: Lost | None) -> int:
    """Remove what is no directory; returns the bytes of content that go away with it."""
    gone = status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0
    if gone and lost is not None:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            lost(file)
        finally:
            os.close(file)
    os.unlink(name)
    return gone


def remove_directory(name: bytes, lost: Lost | None, removed: Callable[[bytes], None]) -> int:
    """Remove a directory with all that is in it: what is no directory first, by name; then each directory.

    Args:
        name: the directory.
        lost: see Lost.
        removed: is given the path, beginning with `name`, of each directory that is gone.

    Returns the bytes of content that go away.
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
                gone += remove_file(one.path, os.lstat(one.path), lost)
        if directories:
            left += reversed(directories)
        else:
            empty = left.pop()
            os.rmdir(empty)
            removed(empty)
    return gone
