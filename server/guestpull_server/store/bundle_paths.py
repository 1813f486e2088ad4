"""Bundle paths: which paths are allowed, and how their directories are created and removed.

The directories belong to the caller. Without `bundle_roots`, any absolute path is allowed, as in containerd for
root. With them, a bundle must be below one of these, and no link on the way from there is followed.

A bundle is identified by its real path. Links are resolved once, at the request, and never followed afterwards,
neither when the bundle is made nor when it is removed. All operations use the directory that was opened, whatever
has its path by then. No bundle is made where another user of the machine could replace it (access.py). An existing
bundle is released wherever it is.

A bundle must not be in the store's own directories: its files would become part of a layer, for everyone who uses
it.

A bundle directory that we create is 0700, like containerd's since CVE-2021-41103: an image may contain setuid
files and devices, which no other user of the machine may reach. Parent directories are created 0755. Existing ones
keep their mode.
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
from guestpull_server.store.access import real_path, refuse_others

ROOTFS: Final = "rootfs"
_MAX_PATH_BYTES: Final = 4000  # PATH_MAX, minus the paths that we create in the bundle
_MAX_NAME_BYTES: Final = 255  # NAME_MAX
_ROOT: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY: Final = _ROOT | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class BundlePath:
    """The path of a bundle: `requested` is the caller's path, normalised; `real` contains no links."""

    requested: str
    real: str

    @property
    def rootfs(self) -> str:
        """Where the root file system is mounted, relative to the requested path."""
        return os.path.join(self.requested, ROOTFS)

    @property
    def real_rootfs(self) -> str:
        """Where the root file system is mounted, as in the kernel's list of mounts."""
        return os.path.join(self.real, ROOTFS)


def can_be(path: str) -> bool:
    """Return whether the operating system accepts such a path; resolving longer ones takes long."""
    name_bytes = max(len(os.fsencode(name)) for name in path.split("/"))
    return "\0" not in path and len(os.fsencode(path)) <= _MAX_PATH_BYTES and name_bytes <= _MAX_NAME_BYTES


class BundlePaths:
    """Checks bundle paths, and creates and removes the directories of bundles.

    Args:
        roots: directories that bundles must be in; empty if any directory is allowed.
        stores: directories that must not be bundles themselves, but may contain bundles.
        stores_own: directories and files that must neither be nor contain bundles.
    """

    def __init__(
        self, roots: Sequence[str] = (), stores: Sequence[str] = (), stores_own: Sequence[str] = ()
    ) -> None:
        self._roots = [os.path.normpath(root) for root in roots]
        self._stores = [os.path.realpath(store) for store in stores]
        self._stores_own = [os.path.realpath(own) for own in stores_own]
        self._making = threading.Lock()

    def checked(self, bundle_path: str) -> BundlePath:
        """Return the path of a new bundle, if it is allowed.

        Raises:
            InvalidBundlePath: it is not absolute, too long, outside of the roots, the root directory, or the
                store's; or another user could replace it.
        """
        if not bundle_path.startswith("/"):
            raise InvalidBundlePath(bundle_path, "it is not absolute")
        if not can_be(bundle_path):
            raise InvalidBundlePath(bundle_path[:200], "it is too long, or contains a NUL")
        if ".." in bundle_path.split("/"):
            raise InvalidBundlePath(bundle_path, "it contains `..`")
        path = self._resolved_by(real_path, bundle_path)
        if path.requested == "/" or path.real == "/":
            raise InvalidBundlePath(bundle_path, "it is the root directory")
        if self._roots and self._root_of(path.requested) is None:
            raise InvalidBundlePath(
                path.requested, f"it is not below any of bundle_roots ({', '.join(self._roots)})"
            )
        if path.real in self._stores:
            raise InvalidBundlePath(path.requested, "it is the directory of a store")
        for own in self._stores_own:
            if f"{path.real}/".startswith(f"{own}/"):
                raise InvalidBundlePath(path.requested, f"it is in the store's own directory {own}")
        if not _is_text(path.real):
            raise InvalidBundlePath(path.requested, "a link in it leads to a name that is not UTF-8")
        return path

    def resolved(self, absolute_path: str) -> BundlePath:
        """Return a path with its links resolved, where they may be followed."""
        return self._resolved_by(lambda path, _requested: os.path.realpath(path), absolute_path)

    def missing(self, path: BundlePath) -> int:
        """Return how many directories must be created for a bundle.

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
        """Create the directories of a bundle and of its rootfs. May be repeated.

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
                refuse_others(path.requested, place, os.fstat(walk.descriptor))

    def refuse_used(self, path: BundlePath) -> None:
        """Ensure that a bundle's directory, if it exists, has neither config.json nor a root file system.

        Raises:
            BundleExists: it has one of them.
            InvalidBundlePath: a file, or a link that may not be followed, is in the way.
            OSError: the operating system refuses.
        """
        with suppress(FileNotFoundError), self.opened(path) as bundle:
            if _exists(RUNTIME_CONFIG, bundle):
                raise BundleExists(path.requested, f"it contains a {RUNTIME_CONFIG}")
            if not _exists(ROOTFS, bundle):
                return
            status = os.lstat(ROOTFS, dir_fd=bundle)
            if not stat.S_ISDIR(status.st_mode):
                raise BundleExists(path.requested, "its rootfs is a file or a link")
            if status.st_dev != os.fstat(bundle).st_dev:
                raise BundleExists(path.requested, "its rootfs is mounted")
            rootfs = os.open(ROOTFS, _DIRECTORY, dir_fd=bundle)
            try:
                if os.listdir(rootfs):
                    raise BundleExists(path.requested, "its rootfs is not empty")
            finally:
                os.close(rootfs)

    def leave(self, path: BundlePath, *, made: int, is_ours: Callable[[os.stat_result], bool]) -> None:
        """Remove what we created in and above a bundle's directory. May be repeated.

        Directories that are not empty contain files of others, and stay.

        Args:
            path: the path of the bundle.
            made: how many directories we created: the bundle's own, and those above it.
            is_ours: returns whether a config.json with this status is the bundle's.

        Raises:
            OSError: the operating system refuses.
        """
        with self._making, suppress(FileNotFoundError, InvalidBundlePath):  # it is gone, or replaced
            with self.opened(path) as bundle:
                with suppress(FileNotFoundError):
                    if is_ours(os.lstat(RUNTIME_CONFIG, dir_fd=bundle)):
                        os.unlink(RUNTIME_CONFIG, dir_fd=bundle)
                with suppress(OSError):
                    os.rmdir(ROOTFS, dir_fd=bundle)
            real = path.real
            for _ in range(made):
                with self.opened(BundlePath(path.requested, os.path.dirname(real))) as parent:
                    try:
                        os.rmdir(os.path.basename(real), dir_fd=parent)
                    except OSError:
                        return
                real = os.path.dirname(real)

    @contextmanager
    def opened(self, path: BundlePath) -> Iterator[int]:
        """Open the bundle's directory, so that operations in it cannot be redirected.

        Raises:
            InvalidBundlePath: it, or a directory above it, was replaced by a file or a link.
            FileNotFoundError: it does not exist.
        """
        with _opened("/") as walk:
            for name in _names(path.real):
                walk.step(name, path)
            yield walk.descriptor

    def _resolved_by(self, resolve: Callable[[str, str], str], absolute_path: str) -> BundlePath:
        requested = normal(absolute_path)
        root = self._root_of(requested)
        if root is None:
            return BundlePath(requested, resolve(requested, requested))
        return BundlePath(requested, os.path.join(resolve(root, requested), os.path.relpath(requested, root)))

    def _root_of(self, requested: str) -> str | None:
        return next((root for root in self._roots if requested.startswith(f"{root.rstrip('/')}/")), None)


def normal(path: str) -> str:
    """Return an absolute path without repeated and trailing slashes."""
    return "/" + os.path.normpath(path).lstrip("/")


class _Walk:
    """An open directory; `step` enters a subdirectory, and follows no link."""

    def __init__(self, start: str) -> None:
        self.descriptor = os.open(start, _ROOT)

    def step(self, name: str, path: BundlePath) -> None:
        try:
            below = os.open(name, _DIRECTORY, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise InvalidBundlePath(path.requested, f"{name!r} in it is a link or a file") from None
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
