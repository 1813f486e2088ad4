"""Confines a layer worker: its root is the layer's staging directory, its capabilities are those of unpacking.

After `confine`, no path, link or device node that the worker makes or follows can reach another file of the
machine, and nothing can be imported: a module that is loaded late would be looked up in the layer and would run
with the worker's capabilities (Docker's CVE-2019-14271). A worker that a bug in a decompressor takes over could
still make device nodes in its directory, so the daemon keeps staging directories at mode 0700.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import Final

from guestpull_server.linux import limit_capabilities, prctl

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38

_FOR_UNPACKING: Final = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,  # write to directories that their owner cannot write to
    "CAP_FOWNER": 3,  # set modes, times and xattrs of other users' files
    "CAP_FSETID": 4,  # keep setuid and setgid when writing
    "CAP_SYS_ADMIN": 21,  # xattrs trusted.* and security.*
    "CAP_MKNOD": 27,
    "CAP_SETFCAP": 31,  # security.capability
}
_FOR_READING: Final = {
    "CAP_DAC_READ_SEARCH": 2,  # read regardless of modes
    "CAP_SYS_ADMIN": 21,  # xattrs trusted.*
}


def confine(directory: str, parent: int) -> None:
    """Lock this process into a directory, irrevocably.

    Args:
        directory: becomes the process's root.
        parent: the parent process; this process is killed when the parent ends.

    Raises:
        OSError: the kernel refused. The process must end.
    """
    _die_with(parent)
    sys.meta_path.clear()
    os.chroot(directory)
    os.chdir("/")
    os.umask(0)
    _drop_all_but(_FOR_UNPACKING)


def confine_to_reading(parent: int) -> None:
    """Drop, irrevocably, all capabilities but those for reading a layer's directory; otherwise like `confine`."""
    _die_with(parent)
    _drop_all_but(_FOR_READING)


def _die_with(parent: int) -> None:
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _drop_all_but(kept: dict[str, int]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_capabilities(sum(1 << number for number in kept.values()))
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
