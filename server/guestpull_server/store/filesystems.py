"""What kind of file system a path lies on, where that decides what can be done there."""

from __future__ import annotations

import os
from typing import Final

from guestpull_server.linux import filesystem_magic

_OVERLAY_MAGIC: Final = 0x794C7630
_TMPFS_MAGIC: Final = 0x01021994
_RAMFS_MAGIC: Final = 0x858458F6


def is_volatile(path: str) -> bool:
    """Whether it lives in memory, where there is nothing that a power cut leaves.

    Raises:
        OSError: the operating system refuses.
    """
    return filesystem_magic(path) in (_TMPFS_MAGIC, _RAMFS_MAGIC)


def is_overlay(path: str) -> bool:
    """Whether it is an overlay: one that hides whiteouts, and takes neither new ones nor upper directories.

    Raises:
        OSError: the operating system refuses.
    """
    return filesystem_magic(path) == _OVERLAY_MAGIC


def is_read_only(path: str) -> bool:
    """Whether it is mounted read-only.

    Raises:
        OSError: the operating system refuses.
    """
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
