"""The system calls of mounting, as fsopen(2), fsconfig(2), fsmount(2), move_mount(2) and umount2(2) describe them.

Python has none of them, and glibc has wrappers only since 2.36: they are called by number, which is the same on
all architectures for calls as young as these. Errors are OSErrors; a file system context tells more in its log.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

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
    """A file system that is being configured; a context manager.

    Raises:
        OSError: the kernel has no such file system, or the caller may not mount.
    """

    def __init__(self, filesystem: str) -> None:
        self._descriptor = _call(_SYS_FSOPEN, os.fsencode(filesystem), _FSOPEN_CLOEXEC)

    def set(self, key: str, value: str) -> None:
        """Set a parameter; OSError if the kernel does not take it."""
        _call(_SYS_FSCONFIG, self._descriptor, _FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)

    def create(self) -> None:
        """Make the superblock of what was configured; OSError if the parameters do not do."""
        _call(_SYS_FSCONFIG, self._descriptor, _FSCONFIG_CMD_CREATE, None, None, 0)

    def mount_at(self, directory: int) -> None:
        """Mount it on a directory that is open, whatever its path is by now."""
        mount = _call(_SYS_FSMOUNT, self._descriptor, _FSMOUNT_CLOEXEC, 0)
        try:
            flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
            _call(_SYS_MOVE_MOUNT, mount, b"", directory, b"", flags)
        finally:
            os.close(mount)

    def log(self) -> str:
        """What the kernel has said about this context since it was last asked; empty if nothing."""
        lines: list[str] = []
        with suppress(OSError):
            while len(lines) < _MAX_LOG_LINES:
                # "e overlay: text"; one message a read
                lines.append(os.read(self._descriptor, 4096).decode(errors="replace").strip()[2:])
        return "; ".join(line for line in lines if line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def unmount(path: str, *, detach: bool = False) -> None:
    """Unmount what is mounted at a path, following no link; OSError if that is nothing.

    Args:
        path: where it is mounted.
        detach: also if it is in use, which is an OSError otherwise; it ends with its last user then.
    """
    if _libc.umount2(os.fsencode(path), _UMOUNT_NOFOLLOW | (_MNT_DETACH if detach else 0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def mount_from_directory(directory: str, source: str, target: str, filesystem: str, options: str) -> None:
    """mount(2), with relative paths in its options that begin at `directory`.

    A working directory belongs to the process, but a thread may have one of its own (unshare(2), CLONE_FS): this
    is done in a thread that ends with the call.

    Raises:
        OSError: the kernel refuses.
    """
    failures: list[OSError] = []

    def mount() -> None:
        try:
            if _libc.unshare(_CLONE_FS) != 0:
                raise _last_error()
            os.chdir(directory)
            arguments = [os.fsencode(text) for text in (source, target, filesystem)]
            if _libc.mount(*arguments, ctypes.c_ulong(0), os.fsencode(options)) != 0:
                raise _last_error()
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=mount, name="mount")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _call(number: int, *arguments: int | bytes | None) -> int:
    converted = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
