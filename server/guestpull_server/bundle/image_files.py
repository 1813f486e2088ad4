"""Looking at files of an image as a process would whose root directory is the image's rootfs.

Everything there is hostile. A link, absolute or by `..`, leads to where it would lead inside of a container, and
never out of it. Nothing is opened before it is known to be a regular file: opening a device is an act, and opening
a fifo waits.

Links are followed here, a component at a time, rather than by openat2(2) with RESOLVE_IN_ROOT: the kernel gives up
on a `..` (EAGAIN) whenever anything is renamed or mounted anywhere on the machine, for as long as that goes on.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Final

_ABSENT: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_PIECE_BYTES: Final = 64 * 1024
_MAX_PATH_BYTES: Final = 4095  # PATH_MAX, as the kernel counts it
_MAX_LINKS: Final = 40  # as many as the kernel follows
_MAX_DEPTH: Final = 256  # open directories at a time; no layer is deeper unless max_path_depth was raised


def read(rootfs: str, path: str, max_bytes: int) -> bytes | None:
    """The first `max_bytes` of a regular file; None where there is no such thing.

    Raises:
        OSError: it cannot be told, or cannot be read. That is not the same as its absence.
    """
    with _found(rootfs, path) as descriptor:
        if descriptor is None or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        # without a file object, whose making is half of what reading a small file costs
        file = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = b""
            while len(content) < max_bytes and (
                more := os.read(file, min(max_bytes - len(content), _PIECE_BYTES))
            ):
                content += more
            return content
        finally:
            os.close(file)


def status(rootfs: str, path: str) -> os.stat_result | None:
    """What is at a path, links followed; None where nothing is.

    Raises:
        OSError: it cannot be told.
    """
    with _found(rootfs, path) as descriptor:
        return None if descriptor is None else os.fstat(descriptor)


class Contents(Enum):
    """What is in a directory, however deep."""

    NOTHING = "nothing"
    PLAIN = "directories, regular files and symbolic links"
    SPECIAL = "devices or fifos as well"


def contents(rootfs: str, path: str) -> Contents:
    """What is in a directory; nothing, if there is none.

    Raises:
        OSError: it cannot be told.
    """
    with _found(rootfs, path) as descriptor:
        if descriptor is None:
            return Contents.NOTHING
        found = Contents.NOTHING
        left = [f"/proc/self/fd/{descriptor}"]
        while left:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    found = Contents.PLAIN
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    elif not (entry.is_symlink() or entry.is_file(follow_symlinks=False)):
                        return Contents.SPECIAL
        return found


def resolved(rootfs: str, path: str) -> str | None:
    """Where a path leads: absolute, without links. What is missing lies where it would be made.

    None where links lead on and on, or to a path that is longer than any may be.

    Raises:
        OSError: it cannot be told.
    """
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        return None
    place: list[str] = []
    ahead = path.split("/")[::-1]
    links = 0
    while ahead:
        name = ahead.pop()
        if name == "..":
            del place[-1:]
        elif name not in ("", "."):
            directory = "/".join(place)
            if len(directory) > _MAX_PATH_BYTES:
                return None
            target = _link_target(rootfs, directory, name)
            if target is None:
                place.append(name)
                continue
            links += 1
            if links > _MAX_LINKS:
                return None
            if target.startswith("/"):
                place.clear()
            ahead += target.split("/")[::-1]
    return "/" + "/".join(place)


def _link_target(rootfs: str, directory: str, name: str) -> str | None:
    """What a link says; None for whatever is no link."""
    with _found(rootfs, directory) as descriptor:
        if descriptor is None or "\0" in name:
            return None
        try:
            return os.readlink(name, dir_fd=descriptor)
        except OSError as error:
            if error.errno in _ABSENT or error.errno == errno.EINVAL:
                return None
            raise


@contextmanager
def _found(rootfs: str, path: str) -> Iterator[int | None]:
    """What is at a path, as an O_PATH descriptor; None where nothing is."""
    way = [os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        yield way[-1] if _walk(way, path) else None
    finally:
        _leave(way, 0)


def _walk(way: list[int], path: str) -> bool:
    """Go along a path, links followed, and tell whether it leads anywhere; what is there is the way's end then.

    A way is the open directories from the root on. `..` goes back on it, and never asks the file system, so that
    nothing leads above the root, whatever is renamed meanwhile.
    """
    if "\0" in path or len(os.fsencode(path)) > _MAX_PATH_BYTES:
        return False
    ahead = path.split("/")[::-1]
    links = 0
    while ahead:
        name = ahead.pop()
        if name == "..":
            _leave(way, max(1, len(way) - 1))
        elif name not in ("", "."):
            try:
                target = _enter(way, name, leads_on=bool(ahead))
            except OSError as error:
                if error.errno in _ABSENT:
                    return False
                raise
            if target is None:
                continue
            links += 1
            if links > _MAX_LINKS:
                return False
            if target.startswith("/"):
                _leave(way, 1)
            ahead += target.split("/")[::-1]
    return True


def _enter(way: list[int], name: str, *, leads_on: bool) -> str | None:
    """Put what has a name in the last directory at the way's end; a link's target instead, if it is one."""
    entry = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=way[-1])
    mode = os.fstat(entry).st_mode
    if not stat.S_ISLNK(mode):
        way.append(entry)
        if leads_on and not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
        if len(way) > _MAX_DEPTH:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
        return None
    try:
        return os.readlink("", dir_fd=entry)
    finally:
        os.close(entry)


def _leave(way: list[int], length: int) -> None:
    while len(way) > length:
        os.close(way.pop())
