"""The files of a local image, in a directory or an archive."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self


@dataclass(frozen=True, slots=True)
class Part:
    """A range of an open file. A context manager; reading is thread-safe.

    Attributes:
        descriptor: the open file.
        offset: the start of the range.
        size: the length of the range.
        owns_descriptor: whether `close` closes the open file.
    """

    descriptor: int
    offset: int
    size: int
    owns_descriptor: bool = False

    def read_at(self, position: int, limit: int) -> bytes:
        """Return up to `limit` bytes at a position; empty at the end of the range or of the file."""
        limit = min(limit, self.size - position)
        return os.pread(self.descriptor, limit, self.offset + position) if limit > 0 else b""

    def close(self) -> None:
        """Close the file if the part owns it."""
        if self.owns_descriptor:
            os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


class Files(Protocol):
    """Access to files by path."""

    def find(self, path: str) -> Part | None:
        """Return the file at a relative path, which the caller closes; None if it is not a regular file."""


class Directory:
    """The Files of a directory."""

    def __init__(self, path: str) -> None:
        self._path = path

    def find(self, path: str) -> Part | None:
        """See Files."""
        try:
            descriptor = open_regular(os.path.join(self._path, path))
        except OSError:
            return None
        return Part(descriptor, 0, os.fstat(descriptor).st_size, owns_descriptor=True)


def open_regular(path: str) -> int:
    """Open a regular file. Pipes and devices are refused, because reading them can block forever.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file")
