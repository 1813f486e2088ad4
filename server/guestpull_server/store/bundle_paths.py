"""Bundle paths: which ones are allowed, and how their directories are made and left.

The directories belong to the caller. Without `bundle_roots` any absolute path will do, as containerd has it for
root. With them, a bundle lies below one of these, and no link on the way from there is followed.

A bundle is known by its real path: links are resolved once, when it is asked for, and none is followed afterwards,
neither when the bundle is made nor when what we put into it is taken out again. All that is done there is done in
the directory that was opened, whatever has its path by then. No bundle is made where another user of the machine
could replace it (bundle_owners.py); one that exists is released wherever it is.

No bundle lies in what is the store's own: its directories would become part of a layer, for everyone who uses it.

A bundle's directory that we make is 0700, as containerd's are since CVE-2021-41103: an image may hold setuid files
and devices, which no other user of this machine may reach. Directories above it are 0755, and one that is there
already is as its owner wants it.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from guestpull_server.errors import BundleExists, InvalidBundlePath
from guestpull_server.models import RUNTIME_CONFIG
from guestpull_server.store.bundle_owners import real_path, refuse_others

ROOTFS: Final = "rootfs"
_MAX_PATH_BYTES: Final = 4000  # PATH_MAX, less room for what we put into the bundle
_MAX_NAME_BYTES: Final = 255  # NAME_MAX
_ROOT: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY: Final = _ROOT | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class BundlePath:
    """Where a bundle is: `told`, as its caller writes it, in its normal form, and `real`, without any link."""

    told: str
    real: str

    @property
    def rootfs(self) -> str:
        """Where its file system is mounted, as the caller would write it."""
        return os.path.join(self.told, ROOTFS)

    @property
    def real_rootfs(self) -> str:
        """The same as the kernel has it in its list of mounts."""
        return os.path.join(self.real, ROOTFS)


def can_be(path: str) -> bool:
    """Whether the operating system has room for such a path; to resolve others takes long."""
    name_bytes = max(len(os.fsencode(name)) for name in path.split("/"))
    return "\0" not in path and len(os.fsencode(path)) <= _MAX_PATH_BYTES and name_bytes <= _MAX_NAME_BYTES


class BundlePaths:
    """The paths that bundles may have.

    Args:
        roots: directories that bundles must be in; none: any directory will do.
        stores: directories that no bundle may be, although it may be in them.
        stores_own: directories and files that bundles must neither be nor be in.
    """

    def __init__(
        self, roots: Sequence[str] = (), stores: Sequence[str] = (), stores_own: Sequence[str] = ()
    ) -> None:
        self._roots = [os.path.normpath(root) for root in roots]
        self._stores = [os.path.realpath(store) for store in stores]
        self._stores_own = [os.path.realpath(own) for own in stores_own]
        self._making = threading.Lock()

    def checked(self, bundle_path: str) -> BundlePath:
        """A bundle's path, if it may have it.

        Raises:
            InvalidBundlePath: it is not absolute, too long, outside of the roots, the root itself, or the store's;
                or another user could replace it.
        """
        if not bundle_path.startswith("/"):
            raise InvalidBundlePath(bundle_path, "it is not absolute")
        if not can_be(bundle_path):
            raise InvalidBundlePath(bundle_path[:200], "no directory can have it")
        if ".." in bundle_path.split("/"):
            raise InvalidBundlePath(bundle_path, "it has a .. in it")
        path = self._resolved_by(real_path, bundle_path)
        if path.told == "/" or path.real == "/":
            raise InvalidBundlePath(bundle_path, "it is the root directory")
        if self._roots and self._root_of(path.told) is None:
            raise InvalidBundlePath(
                path.told, f"it is not below any of bundle_roots ({', '.join(self._roots)})"
            )
        if path.real in self._stores:
            raise InvalidBundlePath(path.told, "it is the directory of a store")
        for own in self._stores_own:
            if f"{path.real}/".startswith(f"{own}/"):
                raise InvalidBundlePath(path.told, f"it is in the store's own {own}")
        if not _is_text(path.real):
            raise InvalidBundlePath(path.told, "a link in it leads to a name that is no text")
        return path

    def resolved(self, absolute_path: str) -> BundlePath:
        """A path with its links resolved, those that may be followed."""
        return self._resolved_by(lambda path, _told: os.path.realpath(path), absolute_path)

    def missing(self, path: BundlePath) -> int:
        """How many directories must be made for a bundle to have its own.

        Raises:
            InvalidBundlePath: a file, or a link that may not be followed, is in the way.
            OSError: the operating system refuses.
        """
        names = _names(path.real)
        with _opened("/") as walk:
            for index, name in enumerate(names):
                try:
                    walk.step(name, path)
                except FileNotFoundError:
                    return len(names) - index
        return 0

    def make(self, path: BundlePath) -> None:
        """Make the directories of a bundle and of its rootfs; harmless where they are there.

        Raises:
            InvalidBundlePath: a file, or a link that may not be followed, is in the way; or another user could
                replace a directory.
            OSError: the operating system refuses.
        """
        *parents, last = _names(path.real)
        place = "/"
        with self._making, _opened(place) as walk:
            for name, mode in (*((parent, 0o755) for parent in parents), (last, 0o700), (ROOTFS, 0o755)):
                with suppress(FileExistsError):
                    os.mkdir(name, mode, dir_fd=walk.descriptor)
                walk.step(name, path)
                place = os.path.join(place, name)
                refuse_others(path.told, place, os.fstat(walk.descriptor))

    def refuse_used(self, path: BundlePath) -> None:
        """Make sure that a bundle's directory, if it is there, has neither config.json nor a root filesystem.

        Raises:
            BundleExists: it has.
            InvalidBundlePath: a file, or a link that may not be followed, is in the way.
            OSError: the operating system refuses.
        """
        with suppress(FileNotFoundError), self.opened(path) as bundle:
            if _exists(RUNTIME_CONFIG, bundle):
                raise BundleExists(path.told, f"it holds a {RUNTIME_CONFIG}")
            if not _exists(ROOTFS, bundle):
                return
            status = os.lstat(ROOTFS, dir_fd=bundle)
            if not stat.S_ISDIR(status.st_mode):
                raise BundleExists(path.told, "its rootfs is a file or a link")
            if status.st_dev != os.fstat(bundle).st_dev:
                raise BundleExists(path.told, "its rootfs is mounted")
            rootfs = os.open(ROOTFS, _DIRECTORY, dir_fd=bundle)
            try:
                if os.listdir(rootfs):
                    raise BundleExists(path.told, "its rootfs is not empty")
            finally:
                os.close(rootfs)

    def leave(self, path: BundlePath, *, made: int, is_ours: Callable[[os.stat_result], bool]) -> None:
        """Take out of a bundle's directory what we put there; harmless to repeat.

        What is not empty holds something that is not ours, and stays.

        Args:
            path: the bundle.
            made: how many directories are ours as well: the bundle's own, and those above it.
            is_ours: whether a config.json that is there is the bundle's.

        Raises:
            OSError: the operating system refuses.
        """
        with self._making, suppress(FileNotFoundError, InvalidBundlePath):  # gone, or another has its name
            with self.opened(path) as bundle:
                with suppress(FileNotFoundError):
                    if is_ours(os.lstat(RUNTIME_CONFIG, dir_fd=bundle)):
                        os.unlink(RUNTIME_CONFIG, dir_fd=bundle)
                with suppress(OSError):
                    os.rmdir(ROOTFS, dir_fd=bundle)
            real = path.real
            for _ in range(made):
                with self.opened(BundlePath(path.told, os.path.dirname(real))) as parent:
                    try:
                        os.rmdir(os.path.basename(real), dir_fd=parent)
                    except OSError:
                        return
                real = os.path.dirname(real)

    @contextmanager
    def opened(self, path: BundlePath) -> Iterator[int]:
        """The bundle's directory, open: what is done in it cannot be led elsewhere.

        Raises:
            InvalidBundlePath: a file, or a link, has taken its place, or that of a directory above it.
            FileNotFoundError: it is not there.
        """
        with _opened("/") as walk:
            for name in _names(path.real):
                walk.step(name, path)
            yield walk.descriptor

    def _resolved_by(self, resolve: Callable[[str, str], str], absolute_path: str) -> BundlePath:
        told = normal(absolute_path)
        root = self._root_of(told)
        if root is None:
            return BundlePath(told, resolve(told, told))
        return BundlePath(told, os.path.join(resolve(root, told), os.path.relpath(told, root)))

    def _root_of(self, told: str) -> str | None:
        return next((root for root in self._roots if told.startswith(f"{root.rstrip('/')}/")), None)


def normal(path: str) -> str:
    """An absolute path without doubled and outer slashes."""
    return "/" + os.path.normpath(path).lstrip("/")


class _Walk:
    """A directory that is open; a step goes down to one that is in it, and follows no link."""

    def __init__(self, start: str) -> None:
        self.descriptor = os.open(start, _ROOT)

    def step(self, name: str, path: BundlePath) -> None:
        try:
            below = os.open(name, _DIRECTORY, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise InvalidBundlePath(path.told, f"{name!r} in it is a link or a file") from None
        os.close(self.descriptor)
        self.descriptor = below


@contextmanager
def _opened(start: str) -> Iterator[_Walk]:
    walk = _Walk(start)
    try:
        yield walk
    finally:
        os.close(walk.descriptor)


def _names(real_path: str) -> list[str]:
    return [name for name in real_path.split("/") if name]


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _exists(name: str, directory: int) -> bool:
    try:
        os.lstat(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True
