"""A layer worker's walls: its root is the layer's staging directory, its powers are those of unpacking.

After `confine`, no path, link or device node that the worker makes or follows can reach another file of this
machine, and nothing is imported any more: a module that is loaded only when it is needed would be looked for in
the layer, and run with all that a worker may do (Docker's CVE-2019-14271). A worker that were taken over by a bug
in a decompressor could still make device nodes within its directory; the daemon keeps staging directories 0700, so
that nobody else opens them.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITY_VERSION_3: Final = 0x20080522

_FOR_UNPACKING: Final = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,  # entries in directories that their owner may not write
    "CAP_FOWNER": 3,  # modes, times and xattrs of files that were given away
    "CAP_FSETID": 4,  # setuid and setgid survive writing
    "CAP_SYS_ADMIN": 21,  # xattrs trusted.* and security.*
    "CAP_MKNOD": 27,
    "CAP_SETFCAP": 31,  # security.capability
}
_FOR_READING: Final = {
    "CAP_DAC_READ_SEARCH": 2,  # whatever the modes are
    "CAP_SYS_ADMIN": 21,  # xattrs trusted.*
}


def confine(directory: str, parent: int) -> None:
    """Lock this process into `directory`, for good.

    Args:
        directory: becomes the root.
        parent: the process that must outlive this one: this one is killed when it ends.

    Raises:
        OSError: the kernel refused; the process must not go on.
    """
    _end_with(parent)
    sys.meta_path.clear()
    os.chroot(directory)
    os.chdir("/")
    os.umask(0)
    _give_up_all_but(_FOR_UNPACKING)


def confine_to_reading(parent: int) -> None:
    """Take from this process, for good, what reading a layer's directory does not need.

    Args:
        parent: the process that must outlive this one: this one is killed when it ends.

    Raises:
        OSError: the kernel refused; the process must not go on.
    """
    _end_with(parent)
    _give_up_all_but(_FOR_READING)


def _end_with(parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _give_up_all_but(kept: dict[str, int]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _keep_capabilities(kept)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _keep_capabilities(kept: dict[str, int]) -> None:
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    present = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, present))
    wanted = sum(1 << number for number in kept.values())
    permitted_low, permitted_high = (
        struct.unpack_from("I", present, 4)[0],
        struct.unpack_from("I", present, 16)[0],
    )
    low = (wanted & 0xFFFFFFFF) & permitted_low
    high = (wanted >> 32) & permitted_high
    _check(_libc.capset(header, struct.pack("6I", low, low, 0, high, high, 0)))


def _prctl(option: int, argument: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
