"""What kind of file system a path lies on, where that decides what can be done there."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

_OVERLAY_MAGIC: Final = 0x794C7630
_TMPFS_MAGIC: Final = 0x01021994
_RAMFS_MAGIC: Final = 0x858458F6

_libc = ctypes.CDLL(None, use_errno=True)


def is_volatile(path: str) -> bool:
    """Whether it lives in memory, where there is nothing that a power cut leaves.

    Raises:
        OSError: the operating system refuses.
    """
    return _magic(path) in (_TMPFS_MAGIC, _RAMFS_MAGIC)


def is_overlay(path: str) -> bool:
    """Whether it is an overlay: one that hides whiteouts, and takes neither new ones nor upper directories.

    Raises:
        OSError: the operating system refuses.
    """
    return _magic(path) == _OVERLAY_MAGIC


def is_read_only(path: str) -> bool:
    """Whether it is mounted read-only.

    Raises:
        OSError: the operating system refuses.
    """
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _magic(path: str) -> int:
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
