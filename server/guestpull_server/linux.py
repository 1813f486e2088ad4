"""Linux system calls that Python's os module lacks.

Every room may use this module; no other module loads libc. Layer workers import it before they are confined, so it
imports only what they have loaded anyway.

Most functions are named after the system call that they make (section 2 of the manual). A failure is an OSError
with the call's errno.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_STATFS_BYTES: Final = 256  # more than the largest struct statfs
_CAPABILITY_VERSION_3: Final = 0x20080522
_CAPABILITY_WORDS: Final = 2  # of 32 bits; per set


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """Call a system call by number, for calls without a wrapper in older versions of glibc."""
    converted = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        raise _last_error()
    return result


def mount(source: str, target: str, filesystem: str, options: str) -> None:
    """Mount a file system, without flags."""
    arguments = [os.fsencode(text) for text in (source, target, filesystem)]
    _check(_libc.mount(*arguments, ctypes.c_ulong(0), os.fsencode(options)))


def umount2(path: str, flags: int) -> None:
    """Unmount a mount point, with the flags of umount2."""
    _check(_libc.umount2(os.fsencode(path), flags), path)


def unshare(flags: int) -> None:
    """Give the calling thread its own copy of what the flags name."""
    _check(_libc.unshare(flags))


def syncfs(descriptor: int, path: str) -> None:
    """Write a file system to its disk; `path` is for the error."""
    _check(_libc.syncfs(descriptor), path)


def filesystem_magic(file: str | int) -> int:
    """The `f_type` of statfs(2) or fstatfs(2), for a path or a descriptor."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if isinstance(file, int):
        _check(_libc.fstatfs(file, buffer))
    else:
        _check(_libc.statfs(os.fsencode(file), buffer), file)
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)


def prctl(option: int, argument: int) -> None:
    """Set an attribute of this process, by an option that takes one argument."""
    _check(_libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0))


def limit_capabilities(allowed: int) -> None:
    """Drop all permitted and effective capabilities outside of a bit mask, and all inheritable ones."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    # effective, permitted and inheritable ones: first the low words, then the high words
    sets = (ctypes.c_uint32 * (3 * _CAPABILITY_WORDS))()
    _check(_libc.capget(header, sets))
    for word in range(_CAPABILITY_WORDS):
        kept = allowed >> (32 * word) & sets[3 * word + 1]
        sets[3 * word : 3 * word + 3] = [kept, kept, 0]
    _check(_libc.capset(header, sets))


def _check(result: int, path: str | None = None) -> None:
    if result != 0:
        raise _last_error(path)


def _last_error(path: str | None = None) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)
