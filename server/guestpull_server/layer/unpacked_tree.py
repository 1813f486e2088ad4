"""A layer's directory as it lies on disk, read with no trust in it.

No symbolic link is followed, nothing but directories and regular files is opened, nothing blocks. A path is
entered component by component; the directories on the way to the current one stay open, because what is asked
for next mostly lies beside it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import Final, Self

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_SQUASHFS_MAGIC: Final = 0x73717368
_libc = ctypes.CDLL(None, use_errno=True)


class RootNotADirectory(Exception):
    """What should be a layer's directory is a link, a file, or anything else."""


class UnpackedTree:
    """The tree below a directory. A context manager.

    Raises:
        RootNotADirectory: there is something else.
        OSError: the directory cannot be opened.
    """

    def __init__(self, root: str) -> None:
        try:
            descriptor = os.open(root, _DIRECTORY)
        except NotADirectoryError:  # of a symbolic link, too
            raise RootNotADirectory from None
        self._open = [(b"", descriptor)]  # names and descriptors, from the root on
        self._path = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for _, descriptor in self._open:
            os.close(descriptor)
        self._open.clear()

    @property
    def is_squashfs(self) -> bool:
        """Whether it lies in a squashfs, which keeps times as 32 bits of whole seconds."""
        buffer = ctypes.create_string_buffer(256)
        if _libc.fstatfs(self._open[0][1], buffer) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) == _SQUASHFS_MAGIC

    def enter(self, path: bytes) -> int | None:
        """Make a directory the current one, and give its descriptor; None if it is no directory.

        The descriptor is valid until another directory is entered.
        """
        if path == self._path:
            return self._open[-1][1]
        names = path.split(b"/") if path else []
        kept = 1
        while kept < len(self._open) and kept <= len(names) and self._open[kept][0] == names[kept - 1]:
            kept += 1
        for _, descriptor in self._open[kept:]:
            os.close(descriptor)
        del self._open[kept:]
        self._path = b"/".join(names[: kept - 1])
        for name in names[kept - 1 :]:
            try:
                descriptor = os.open(name, _DIRECTORY, dir_fd=self._open[-1][1])
            except (FileNotFoundError, NotADirectoryError):
                return None
            self._open.append((name, descriptor))
            self._path = self._path + b"/" + name if self._path else name
        return self._open[-1][1]

    @staticmethod
    def status(directory: int, name: bytes) -> os.stat_result | None:
        """The attributes of what has a name in a directory; None if nothing has."""
        try:
            return os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None

    @staticmethod
    def open_file(directory: int, name: bytes) -> int:
        """Open what `status` just told to be a regular file; without waiting, should it be none any more.

        Raises:
            OSError: it cannot be opened.
        """
        return os.open(name, OPEN_FILE, dir_fd=directory)

    @staticmethod
    def xattrs(directory: int, name: bytes) -> dict[bytes, bytes]:
        """The xattrs of what has a name in a directory; links are not followed."""
        # there is no *at() for xattrs before Linux 6.13; the link in /proc is the directory that we hold
        path = b"/proc/self/fd/%d/%s" % (directory, name)
        names = list_xattrs(path, follow_symlinks=False)
        return {os.fsencode(one): os.getxattr(path, one, follow_symlinks=False) for one in names}

    @staticmethod
    def xattrs_of(descriptor: int) -> dict[bytes, bytes]:
        """The xattrs of an open file or directory."""
        names = list_xattrs(descriptor)
        return {os.fsencode(one): os.getxattr(descriptor, one) for one in names} if names else _NONE


_NONE: Final[dict[bytes, bytes]] = {}


def names_in(directory: int) -> list[bytes]:
    """The names in an open directory, in no order."""
    names = os.listdir(directory)
    # all at once: name by name it took a quarter of comparing a directory of plain files
    return os.fsencode("\0".join(names)).split(b"\0") if names else []


def list_xattrs(what: bytes | int, *, follow_symlinks: bool = True) -> list[str]:
    """The names of xattrs; none where the file system keeps none, as a squashfs in which nothing has any."""
    try:
        return os.listxattr(what, follow_symlinks=follow_symlinks)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return []
