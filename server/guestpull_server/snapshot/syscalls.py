"""System calls for mounting: fsopen(2), fsconfig(2), fsmount(2), move_mount(2), mount(2) and umount2(2).

Python lacks them, and glibc has wrappers for the new ones only since 2.36. Those are called by number, which is
the same on all architectures. Failures are OSErrors; the log of a file system context says more.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from guestpull_server import linux

_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432

_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_FSMOUNT_CLOEXEC: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_CLONE_FS: Final = 0x200
_MAX_LOG_LINES: Final = 16


class FilesystemContext:
    """A file system context, as a context manager: configure it, create the superblock, mount it.

    Raises:
        OSError: the kernel does not support the file system, or the caller may not mount.
    """

    def __init__(self, filesystem: str) -> None:
        self._descriptor = linux.syscall(_SYS_FSOPEN, os.fsencode(filesystem), _FSOPEN_CLOEXEC)

    def set(self, key: str, value: str) -> None:
        """Set a parameter; raise OSError if the kernel rejects it."""
        linux.syscall(
            _SYS_FSCONFIG, self._descriptor, _FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0
        )

    def create(self) -> None:
        """Create the superblock; raise OSError if the kernel rejects the combination of parameters."""
        linux.syscall(_SYS_FSCONFIG, self._descriptor, _FSCONFIG_CMD_CREATE, None, None, 0)

    def mount_at(self, directory: int) -> None:
        """Mount the file system on a directory, given by descriptor."""
        mount = linux.syscall(_SYS_FSMOUNT, self._descriptor, _FSMOUNT_CLOEXEC, 0)
        try:
            flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
            linux.syscall(_SYS_MOVE_MOUNT, mount, b"", directory, b"", flags)
        finally:
            os.close(mount)

    def log(self) -> str:
        """Read the kernel's messages about this context since the last call; empty if there are none."""
        lines: list[str] = []
        with suppress(OSError):
            while len(lines) < _MAX_LOG_LINES:
                # one message per read, such as "e overlay: text"
                lines.append(os.read(self._descriptor, 4096).decode(errors="replace").strip()[2:])
        return "; ".join(line for line in lines if line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def unmount(path: str, *, detach: bool = False) -> None:
    """Unmount the mount at a path, without following links; raise OSError if nothing is mounted there.

    Args:
        path: the mount point.
        detach: unmount even if it is in use, and leave it to its users; otherwise, use is an OSError.
    """
    linux.umount2(path, _UMOUNT_NOFOLLOW | (_MNT_DETACH if detach else 0))


def mount_from_directory(directory: str, source: str, target: str, filesystem: str, options: str) -> None:
    """Call mount(2) with options whose relative paths start at `directory`.

    The working directory is shared by all threads of a process, so the call is made in a new thread that has
    unshared it (unshare(2), CLONE_FS).

    Raises:
        OSError: a system call failed.
    """
    failures: list[OSError] = []

    def mount() -> None:
        try:
            linux.unshare(_CLONE_FS)
            os.chdir(directory)
            linux.mount(source, target, filesystem, options)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=mount, name="mount")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
