"""Reads an image's files as a process would whose root directory is the image's rootfs.

All content is hostile. A link, absolute or with `..`, leads where it would lead inside a container, and never out
of the rootfs. Nothing is opened before it is known to be a regular file: opening a device has effects, and opening
a fifo blocks.

Links are followed here, one component at a time, instead of by openat2(2) with RESOLVE_IN_ROOT: while anything is
renamed or mounted anywhere on the machine, the kernel refuses to resolve a `..` (EAGAIN).

An image chooses how many links are followed, and how long each is: 40 links through 250 directories make 10,000
steps of a path of 100 bytes. So the steps of all lookups for one bundle are bounded together.
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

_NOWHERE: Final = (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_PIECE_BYTES: Final = 64 * 1024
_LINES_BETWEEN_CHECKS: Final = 1024
_MAX_PATH_BYTES: Final = 4095  # PATH_MAX, as the kernel counts it
_MAX_LINKS: Final = 40  # as many as the kernel follows


@dataclass(frozen=True, slots=True)
class Found:
    """Where a path leads.

    Args:
        path: absolute, without links.
        descriptor: what is there, opened with O_PATH; None if nothing is, and a directory could be made there.
    """

    path: str
    descriptor: int | None

    def status(self) -> os.stat_result | None:
        """The status of what is there; None if nothing is."""
        return None if self.descriptor is None else os.fstat(self.descriptor)

    def is_empty(self) -> bool:
        """Whether a directory that is there has no entries."""
        with os.scandir(f"/proc/self/fd/{self.descriptor}") as entries:
            return next(entries, None) is None


class ImageFiles:
    """The files of one image, for the making of one bundle.

    Args:
        rootfs: the mounted root filesystem.
        limits: bound the steps of all lookups together, and what is read.
        cancellation: checked at each step.
    """

    def __init__(self, rootfs: str, limits: Limits, cancellation: Cancellation) -> None:
        self._rootfs = rootfs
        self._limits = limits
        self._cancellation = cancellation
        self._steps_left = limits.max_lookup_steps

    def lines(self, path: str) -> Iterator[bytes]:
        """Read a regular file at once; returns its lines, or none if there is no such file.

        Raises:
            LimitExceeded: the file is too large, or it takes too many steps to find it.
            Cancelled: the caller left.
            DeadlineExceeded: the caller's time is up.
            OSError: the file cannot be read. That is not the same as its absence.
        """
        return self._checked(self._read(path))

    @contextmanager
    def found(self, path: str) -> Iterator[Found | None]:
        """Follow a path; gives None if it leads nowhere.

        It leads nowhere if it goes through a file or through more links than the kernel follows, or ends at a path
        that is too long or not text. A component that is missing, and those below it, count as they are named, as
        in Docker's and containerd's lookups: a runtime would make them.

        Raises:
            LimitExceeded: this bundle's lookups took too many steps, or a directory is too deep.
            Cancelled: the caller left.
            DeadlineExceeded: the caller's time is up.
            OSError: the operating system refuses.
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
            # without a file object, whose making is half of what reading a small file costs
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
            path: may be relative, and lead above the root, where the root is.
            names: the components of the place that the path leads to so far.
            opened: the root, and what has these names, as far as it exists. `..` goes back on this list and never
                asks the file system, so that nothing leads above the root, whatever is renamed meanwhile.
        """
        if len(os.fsencode(path)) > _MAX_PATH_BYTES:
            return None
        ahead = path.split("/")[::-1]
        links = 0
        while ahead:
            self._count_step()
            name = ahead.pop()
            if name == "..":
                _leave(names, opened)
            elif name not in ("", "."):
                try:
                    target = self._enter(name, names, opened, leads_on=bool(ahead))
                except OSError as error:
                    if error.errno in _NOWHERE:
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
                ahead += target.split("/")[::-1]
        place = "/" + "/".join(names)
        if not _is_text(place) or len(os.fsencode(place)) > _MAX_PATH_BYTES:
            return None
        return Found(place, opened[-1] if len(opened) > len(names) else None)

    def _enter(self, name: str, names: list[str], opened: list[int], *, leads_on: bool) -> str | None:
        """Go to what has a name in the last directory; returns the target instead if that is a link."""
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
        if leads_on and not stat.S_ISDIR(mode):
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
    """What has a name in a directory, opened with O_PATH and not followed; None if nothing has it."""
    try:
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None


def _leave(names: list[str], opened: list[int]) -> None:
    """Go up one directory; the root is its own parent."""
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
