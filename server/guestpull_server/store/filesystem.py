"""Read files, delete and measure trees, and identify file systems. The content is not trusted."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from typing import Final

from guestpull_server.errors import storage_errors
from guestpull_server.linux import filesystem_magic

OVERLAY_BELOW_WORK_DIR: Final = (
    "lies on overlayfs, which supports neither whiteouts nor upper directories and hides the whiteouts of the "
    "layers below it: layers that delete files are unpacked or shown wrong, and bundles cannot be mounted"
)
WORK_DIR_REMEDY: Final = (
    "Use a work directory on tmpfs, and list this directory in additional_stores by the path where its own image "
    "is mounted"
)
OVERLAY_BELOW_STORE: Final = (
    "it lies on overlayfs, which hides the whiteouts and opaque directories of the layers below it, so a wrong "
    "rootfs would be mounted. Mount the image that holds the store, or bind-mount what is below the overlay, at"
)

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_OVERLAY_MAGIC: Final = 0x794C7630
_TMPFS_MAGIC: Final = 0x01021994
_RAMFS_MAGIC: Final = 0x858458F6


# -- files --------------------------------------------------------------------------------------------------


class NotAFile(Exception):
    """A path is not a regular file; the message says what it is."""


def read_file(path: str, *, directory: int | None = None) -> bytes | None:
    """Return the content of a regular file, or None if the path does not exist.

    Never blocks: a fifo is refused instead of waited for.

    Args:
        path: the file.
        directory: a descriptor of the directory that a relative path starts from.

    Raises:
        NotAFile: the path is a directory, a fifo, a device, or a broken link.
        OSError: the operating system refuses.
    """
    try:
        descriptor = os.open(path, _FILE, dir_fd=directory)
    except FileNotFoundError:
        if _is_link(path, directory):
            raise NotAFile("it is a broken link") from None
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise NotAFile(error.strerror or str(error)) from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotAFile(
                "it is a directory" if stat.S_ISDIR(status.st_mode) else "it is not a regular file"
            )
        content = os.read(descriptor, status.st_size + 1)
        if len(content) != status.st_size:  # it is larger than one read returns, or is being written
            with open(descriptor, "rb", closefd=False) as file:
                file.seek(0)
                content = file.read()
        return content
    finally:
        os.close(descriptor)


def is_directory(path: str) -> bool:
    """Return whether a path is a directory, and not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _is_link(path: str, directory: int | None) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(path, dir_fd=directory).st_mode)
    except OSError:
        return False


# -- trees --------------------------------------------------------------------------------------------------


def remove_tree(path: str) -> int:
    """Delete a file, or a directory and everything in it; return the size of its regular files in bytes.

    Does nothing if the path does not exist.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return 0
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(path)
        return _freed_bytes(status)
    freed = _walk(path, _remove_files, lambda name, parent: os.rmdir(name, dir_fd=parent))
    os.rmdir(path)
    return freed


def tree_bytes(path: str) -> int:
    """Return the size of the regular files below a path in bytes; count hard links once."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    linked: set[int] = set()

    def measure(directory: int) -> tuple[int, list[str]]:
        total = 0
        directories: list[str] = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    if status.st_nlink > 1:
                        if status.st_ino in linked:
                            continue
                        linked.add(status.st_ino)
                    total += status.st_size
        return total, directories

    return _walk(path, measure, None)


def _walk(
    path: str, enter: Callable[[int], tuple[int, list[str]]], leave: Callable[[str, int], None] | None
) -> int:
    """Walk a directory tree and return the sum of what `enter` counts.

    Follows no links. Uses neither recursion nor more than two descriptors, however deep the directories nest.
    Nobody else may move directories within the tree.

    Args:
        path: the root of the tree.
        enter: called with a descriptor of each directory; returns its count and the subdirectories to visit.
        leave: called after everything below a directory is done, with the directory's name and a descriptor of
            its parent; not called for the root.
    """
    here = os.open(path, _DIRECTORY)
    try:
        total, pending = enter(here)
        above: list[tuple[str, list[str]]] = []
        while pending or above:
            if pending:
                name = pending.pop()
                below = os.open(name, _DIRECTORY, dir_fd=here)
                above.append((name, pending))
                os.close(here)
                here = below
                count, pending = enter(here)
                total += count
            else:
                name, pending = above.pop()
                parent = os.open("..", _DIRECTORY, dir_fd=here)
                os.close(here)
                here = parent
                if leave is not None:
                    leave(name, here)
    finally:
        os.close(here)
    return total


def _remove_files(directory: int) -> tuple[int, list[str]]:
    """Delete everything in a directory but subdirectories; return the bytes freed and the subdirectories."""
    freed = 0
    directories: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
            else:
                freed += _freed_bytes(entry.stat(follow_symlinks=False))
                os.unlink(entry.name, dir_fd=directory)
    return freed, directories


def _freed_bytes(status: os.stat_result) -> int:
    """Return the bytes that deleting this name frees: a file's space is freed with its last hard link."""
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0


# -- file systems -------------------------------------------------------------------------------------------


def is_volatile(path: str) -> bool:
    """Return whether a path lies in memory (tmpfs, ramfs), where nothing survives a power cut.

    Raises:
        OSError: the operating system refuses.
    """
    return filesystem_magic(path) in (_TMPFS_MAGIC, _RAMFS_MAGIC)


def is_read_only(path: str) -> bool:
    """Return whether a path is mounted read-only.

    Raises:
        OSError: the operating system refuses.
    """
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def overlay_below(directories: Iterable[str]) -> str | None:
    """Return the first of these directories that lies on overlayfs, or None. Ignores those that do not exist.

    Overlayfs hides the whiteouts and opaque directories of the layers below it, so files that a layer deletes
    reappear without notice. It accepts neither new whiteouts nor upper directories. The root file system of a
    guest is often an overlay.

    Raises:
        StorageFailed: the operating system refuses.
    """
    for directory in dict.fromkeys(directories):
        with storage_errors("asking for the file system", directory):
            if os.path.isdir(directory) and filesystem_magic(directory) == _OVERLAY_MAGIC:
                return directory
    return None
