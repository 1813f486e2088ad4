"""Reads an image's files the way a process in a container would, without leaving the image's rootfs.

All content is hostile. A link, absolute or with `..`, is resolved inside the rootfs. Only a regular file is opened
for reading: opening a device can have side effects, and opening a fifo blocks.

Links are followed here, one component at a time. openat2(2) with RESOLVE_IN_ROOT is not usable: it fails with
EAGAIN on `..` while anything is renamed or mounted on the machine.

An image chooses the number and length of its links: 40 links through 250 directories turn a path of 100 bytes into
10,000 steps. The steps of all lookups for one bundle therefore share one limit.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import LimitExceeded

_DEAD_END_ERRORS: Final = (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_PIECE_BYTES: Final = 64 * 1024
_LINES_BETWEEN_CHECKS: Final = 1024
_MAX_PATH_BYTES: Final = 4095  # PATH_MAX without the final NUL
_MAX_LINKS: Final = 40  # the kernel's MAXSYMLINKS


@dataclass(frozen=True, slots=True)
class Found:
    """The result of following a path.

    Args:
        path: absolute, without links.
        descriptor: the file, opened with O_PATH; None if it does not exist and could be created as a directory.
    """

    path: str
    descriptor: int | None

    def status(self) -> os.stat_result | None:
        """The status of the file; None if it does not exist."""
        return None if self.descriptor is None else os.fstat(self.descriptor)

    def is_empty(self) -> bool:
        """Whether an existing directory has no entries."""
        with os.scandir(f"/proc/self/fd/{self.descriptor}") as entries:
            return next(entries, None) is None


class ImageFiles:
    """The files of one image, read while one bundle is created.

    Args:
        rootfs: the mounted root filesystem.
        limits: bounds on the steps of all lookups together, and on the size of a file.
        cancellation: checked at each step.
    """

    def __init__(self, rootfs: str, limits: Limits, cancellation: Cancellation) -> None:
        self._rootfs = rootfs
        self._limits = limits
        self._cancellation = cancellation
        self._steps_left = limits.max_lookup_steps

    def lines(self, path: str) -> Iterator[bytes]:
        """Read a regular file immediately and return its lines; none if the file does not exist.

        Raises:
            LimitExceeded: the file is too large, or finding it takes too many steps.
            Cancelled: the caller cancelled.
            DeadlineExceeded: the deadline has passed.
            OSError: the file exists but cannot be read.
        """
        return self._checked(self._read(path))

    @contextmanager
    def found(self, path: str) -> Iterator[Found | None]:
        """Follow a path; yield None if it cannot be resolved.

        A path cannot be resolved if it passes through a file or through more links than the kernel follows, or if
        the resulting path is too long or not UTF-8. Missing components are taken literally, as in Docker's and
        containerd's lookups: a runtime would create them.

        Raises:
            LimitExceeded: the lookups for this bundle took too many steps, or a directory is too deep.
            Cancelled: the caller cancelled.
            DeadlineExceeded: the deadline has passed.
            OSError: a system call failed.
        """
        names: list[str] = []
        opened = [os.open(self._rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
        try:
            yield self._follow(path, names, opened)
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _checked(self, content: bytes) -> Iterator[bytes]:
        for number, line in enumerate(io.BytesIO(content)):
            if number % _LINES_BETWEEN_CHECKS == 0:
                self._cancellation.check()
            yield line

    def _read(self, path: str) -> bytes:
        with self.found(path) as found:
            status = found.status() if found is not None else None
            if found is None or status is None or not stat.S_ISREG(status.st_mode):
                return b""
            limit = self._limits.max_read_bytes
            if status.st_size > limit:
                raise LimitExceeded(f"the size of the image's /{path}", "max_read_bytes", limit)
            # os.read instead of a file object, whose creation is half the cost of reading a small file
            file = os.open(f"/proc/self/fd/{found.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                content = bytearray()
                while len(content) < status.st_size and (more := os.read(file, _PIECE_BYTES)):
                    content += more
                return bytes(content)
            finally:
                os.close(file)

    def _follow(self, path: str, names: list[str], opened: list[int]) -> Found | None:
        """Follow a path from the root.

        Args:
            path: may be relative. `..` in the root stays in the root.
            names: the components of the resolved path so far.
            opened: the root and the existing ones of these components, opened. `..` pops this list instead of
                opening `..`, so a concurrent rename cannot lead out of the root.
        """
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            return None
        remaining = path.split("/")[::-1]
        links = 0
        while remaining:
            self._count_step()
            name = remaining.pop()
            if name == "..":
                _leave(names, opened)
            elif name not in ("", "."):
                try:
                    target = self._enter(name, names, opened, must_be_directory=bool(remaining))
                except OSError as error:
                    if error.errno in _DEAD_END_ERRORS:
                        return None
                    raise
                if target is None:
                    continue
                links += 1
                if links > _MAX_LINKS:
                    return None
                if target.startswith("/"):
                    while names:
                        _leave(names, opened)
                remaining += target.split("/")[::-1]
        place = "/" + "/".join(names)
        if not _is_text(place) or len(os.fsencode(place)) > _MAX_PATH_BYTES:
            return None
        return Found(place, opened[-1] if len(opened) > len(names) else None)

    def _enter(
        self, name: str, names: list[str], opened: list[int], *, must_be_directory: bool
    ) -> str | None:
        """Enter a component of the last directory; if it is a link, return its target instead."""
        entry = _open_entry(name, opened[-1]) if len(opened) > len(names) and "\0" not in name else None
        if entry is None:
            names.append(name)
            return None
        mode = os.fstat(entry).st_mode
        if stat.S_ISLNK(mode):
            try:
                return os.readlink("", dir_fd=entry)
            finally:
                os.close(entry)
        names.append(name)
        opened.append(entry)
        if must_be_directory and not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
        if len(names) > self._limits.max_path_depth:
            raise LimitExceeded(
                "the depth of a path in the image", "max_path_depth", self._limits.max_path_depth
            )
        return None

    def _count_step(self) -> None:
        self._cancellation.check()
        self._steps_left -= 1
        if self._steps_left < 0:
            raise LimitExceeded(
                "the number of steps to look up the image's users and volumes",
                "max_lookup_steps",
                self._limits.max_lookup_steps,
            )


def _open_entry(name: str, directory: int) -> int | None:
    """Open a directory's entry with O_PATH and O_NOFOLLOW; None if it does not exist."""
    try:
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None


def _leave(names: list[str], opened: list[int]) -> None:
    """Go to the parent directory; the root is its own parent."""
    if names:
        if len(opened) > len(names):
            os.close(opened.pop())
        names.pop()


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
