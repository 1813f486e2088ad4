"""Reads the directory of a layer, which is untrusted.

No symbolic link is followed, only directories and regular files are opened, and nothing blocks. Paths are entered
component by component. The directories on the way to the current one stay open, because the next path is usually
near.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final, Self

from guestpull_server.errors import storage_errors
from guestpull_server.layer.changes import Change, ChangeKind, Changes, TooManyChanges
from guestpull_server.linux import filesystem_magic

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_MOST_CHANGES: Final = 1000
_SQUASHFS_MAGIC: Final = 0x73717368


class RootNotADirectory(Exception):
    """A link, a file or something else is in place of the layer's directory."""


class UnpackedTree:
    """The tree below a directory. A context manager.

    Raises:
        RootNotADirectory: there is something else.
        OSError: the directory cannot be opened.
    """

    def __init__(self, root: str) -> None:
        try:
            descriptor = os.open(root, _DIRECTORY)
        except NotADirectoryError:  # also raised for a symbolic link
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
        """Whether the directory is in a squashfs, which keeps times as 32 bits of whole seconds."""
        return filesystem_magic(self._open[0][1]) == _SQUASHFS_MAGIC

    def enter(self, path: bytes) -> int | None:
        """Make a directory the current one and return its descriptor; None if it is not a directory.

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
        """The attributes of a name in a directory; None if the name does not exist."""
        try:
            return os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None

    @staticmethod
    def xattrs(directory: int, name: bytes) -> dict[bytes, bytes]:
        """The xattrs of a name in a directory. Links are not followed."""
        # *at() calls for xattrs came with Linux 6.13; the link in /proc leads to the directory that is open
        path = b"/proc/self/fd/%d/%s" % (directory, name)
        names = list_xattrs(path, follow_symlinks=False)
        return {os.fsencode(one): os.getxattr(path, one, follow_symlinks=False) for one in names}

    @staticmethod
    def xattrs_of(descriptor: int) -> dict[bytes, bytes]:
        """The xattrs of an open file or directory."""
        names = list_xattrs(descriptor)
        return {os.fsencode(one): os.getxattr(descriptor, one) for one in names} if names else _NONE


_NONE: Final[dict[bytes, bytes]] = {}


def find_changes(directory: str, find: Callable[[UnpackedTree, Changes], None]) -> tuple[Change, ...]:
    """Open a layer's directory, let `find` look for changes, and return them, at most a thousand.

    Raises:
        StorageFailed: the directory cannot be read.
    """
    changes = Changes(_MOST_CHANGES)
    try:
        with storage_errors("verifying a layer", directory), UnpackedTree(directory) as tree:
            find(tree, changes)
    except TooManyChanges:
        pass
    except RootNotADirectory:
        changes.found.append(Change(b"", ChangeKind.TYPE, "it is not a directory"))
    return tuple(changes.found)


def names_in(directory: int) -> list[bytes]:
    """The names in an open directory, in no particular order."""
    names = os.listdir(directory)
    # encoding all names at once saves a quarter of the time to compare a directory of plain files
    return os.fsencode("\0".join(names)).split(b"\0") if names else []


def list_xattrs(what: bytes | int, *, follow_symlinks: bool = True) -> list[str]:
    """The names of xattrs; none if the file system has none, like a squashfs without any."""
    try:
        return os.listxattr(what, follow_symlinks=follow_symlinks)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return []
