"""A layer's directory as it lies on disk, read with no trust in it.

No symbolic link is followed, nothing but directories and regular files is opened, nothing blocks. A path is
entered component by component; the directories on the way to the current one stay open, because what is asked
for next mostly lies beside it.
"""

from __future__ import annotations

import os
from typing import Final, Self

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
OPEN_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_COARSE_FILE_SYSTEMS: Final = frozenset({"squashfs"})  # they keep whole seconds


class UnpackedTree:
    """The tree below a directory. A context manager.

    Raises:
        OSError: the directory cannot be opened.
    """

    def __init__(self, root: str) -> None:
        self._open = [(b"", os.open(root, _DIRECTORY))]  # names and descriptors, from the root on
        self._path = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for _, descriptor in self._open:
            os.close(descriptor)
        self._open.clear()

    @property
    def has_nanoseconds(self) -> bool:
        """Whether the file system keeps times to the nanosecond."""
        status = os.fstat(self._open[0][1])
        return _file_system_of(os.major(status.st_dev), os.minor(status.st_dev)) not in _COARSE_FILE_SYSTEMS

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
        names = os.listxattr(path, follow_symlinks=False)
        return {os.fsencode(one): os.getxattr(path, one, follow_symlinks=False) for one in names}

    @staticmethod
    def xattrs_of(descriptor: int) -> dict[bytes, bytes]:
        """The xattrs of an open file or directory."""
        names = os.listxattr(descriptor)
        return {os.fsencode(one): os.getxattr(descriptor, one) for one in names} if names else _NONE


_NONE: Final[dict[bytes, bytes]] = {}


def _file_system_of(major: int, minor: int) -> str:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for mount in mounts:
            before, _, after = mount.partition(" - ")
            if before.split(" ")[2] == f"{major}:{minor}":
                return after.split(" ")[0]
    return ""
