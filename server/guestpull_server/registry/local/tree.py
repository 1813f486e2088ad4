"""A local image as a tree of files, read where they lie."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self


@dataclass(frozen=True, slots=True)
class Part:
    """Where the bytes of one file lie in an open file. A context manager; reading is thread-safe.

    Attributes:
        descriptor: the open file.
        offset: where they begin in it.
        size: how many they are.
        owns_descriptor: whether the open file is closed with it.
    """

    descriptor: int
    offset: int
    size: int
    owns_descriptor: bool = False

    def read_at(self, position: int, limit: int) -> bytes:
        """Bytes from a position on, at most `limit`; none at the end, or where the file has become shorter."""
        limit = min(limit, self.size - position)
        return os.pread(self.descriptor, limit, self.offset + position) if limit > 0 else b""

    def close(self) -> None:
        """Let go of it."""
        if self.owns_descriptor:
            os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


class Files(Protocol):
    """A tree of files."""

    def find(self, path: str) -> Part | None:
        """The file at a relative path, to be closed; None where there is no regular file."""


class Directory:
    """A tree in a directory."""

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
    """Open a file; nothing else, as a pipe or a device might never come to an end.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file")
