"""Looking at files of an image as a process would whose root directory is the image's rootfs.

Everything there is hostile. A link, absolute or by `..`, leads to where it would lead inside of a container, and
never out of it (openat2(2), RESOLVE_IN_ROOT). Nothing is opened before it is known to be a regular file: opening a
device is an act, and opening a fifo waits.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_SYS_OPENAT2: Final = 437  # the same on all architectures
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_IN_ROOT: Final = 0x10
_ABSENT: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_PIECE_BYTES: Final = 64 * 1024
_MAX_ATTEMPTS: Final = 128  # while others rename and mount; runc tries as often

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def read(rootfs: str, path: str, max_bytes: int) -> bytes | None:
    """The first `max_bytes` of a regular file; None where there is no such thing.

    Raises:
        OSError: it cannot be told, or cannot be read. That is not the same as its absence.
    """
    with _found(rootfs, path) as descriptor:
        if descriptor is None or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        # without a file object, whose making is half of what reading a small file costs
        file = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = b""
            while len(content) < max_bytes and (
                more := os.read(file, min(max_bytes - len(content), _PIECE_BYTES))
            ):
                content += more
            return content
        finally:
            os.close(file)


def status(rootfs: str, path: str) -> os.stat_result | None:
    """What is at a path, links followed; None where nothing is.

    Raises:
        OSError: it cannot be told.
    """
    with _found(rootfs, path) as descriptor:
        return None if descriptor is None else os.fstat(descriptor)


def has_entries(rootfs: str, path: str) -> bool:
    """Whether a directory has anything in it.

    Raises:
        OSError: it cannot be told.
    """
    with _found(rootfs, path) as descriptor:
        if descriptor is None:
            return False
        with os.scandir(f"/proc/self/fd/{descriptor}") as entries:
            return any(True for _ in entries)


@contextmanager
def _found(rootfs: str, path: str) -> Iterator[int | None]:
    """What is at a path, as an O_PATH descriptor; None where nothing is."""
    root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = _open_in_root(root, path)
    finally:
        os.close(root)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open_in_root(root: int, path: str) -> int | None:
    how = struct.pack("QQQ", os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    name = os.fsencode(path)
    if b"\0" in name:
        return None
    for _ in range(_MAX_ATTEMPTS):
        arguments = (ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(root), name, how, ctypes.c_size_t(len(how)))
        result = int(_libc.syscall(*arguments))
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number in _ABSENT:
            return None
        # EAGAIN: something, anywhere, was renamed or mounted while a `..` was resolved
        if number != errno.EAGAIN:
            break
    raise OSError(number, os.strerror(number), path)
