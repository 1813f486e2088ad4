"""Bundle paths: which ones are allowed, and how their directories are made and left.

The directories belong to the caller. Without `bundle_roots` any absolute path will do, as containerd has it for
root. With them, a bundle lies below one of these, and no link on the way from there is followed, neither when
the bundle is made nor when what we put into it is taken out again: all that is done there is done in the directory
that was opened, whatever has its path by then.

No bundle lies in what is the store's own: its directories would become part of a layer, for everyone who uses it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from guestpull_server.errors import BundleExists, InvalidBundlePath

CONFIG: Final = "config.json"
ROOTFS: Final = "rootfs"
_MAX_PATH_BYTES: Final = 4000  # PATH_MAX, less room for what we put into the bundle
_ROOT: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY: Final = _ROOT | os.O_NOFOLLOW


class BundlePaths:
    """The paths that bundles may have.

    Args:
        roots: directories that bundles must be in; none: any directory will do.
        stores_own: directories that bundles must not be in.
    """

    def __init__(self, roots: Sequence[str] = (), stores_own: Sequence[str] = ()) -> None:
        self._roots = [os.path.normpath(root) for root in roots]
        self._stores_own = [os.path.realpath(own) for own in stores_own]

    def checked(self, bundle_path: str) -> str:
        """A bundle's path in its normal form.

        Raises:
            InvalidBundlePath: it is not absolute, too long, outside of the roots, the root itself, or the store's.
        """
        if not bundle_path.startswith("/"):
            raise InvalidBundlePath(bundle_path, "it is not absolute")
        if "\0" in bundle_path or len(os.fsencode(bundle_path)) > _MAX_PATH_BYTES:
            raise InvalidBundlePath(bundle_path[:200], "no directory can have it")
        if ".." in bundle_path.split("/"):
            raise InvalidBundlePath(bundle_path, "it has a .. in it")
        path = normal(bundle_path)
        if path == "/":
            raise InvalidBundlePath(bundle_path, "it is the root directory")
        if self._roots and self._root_of(path) is None:
            raise InvalidBundlePath(path, f"it is not below any of bundle_roots ({', '.join(self._roots)})")
        real = os.path.realpath(path)
        for own in self._stores_own:
            if f"{real}/".startswith(f"{own}/"):
                raise InvalidBundlePath(path, f"it is in the store's own {own}")
        return path

    def make(self, path: str) -> None:
        """Make the directories of a bundle and of its rootfs; harmless where they are there.

        Raises:
            InvalidBundlePath: a file, or a link that may not be followed, is in the way.
            OSError: the operating system refuses.
        """
        root = self._root_of(path)
        if root is None:
            try:
                os.makedirs(path, mode=0o755, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise InvalidBundlePath(path, "a file is in its way") from None
        else:
            self._make_below(root, path)
        with self.opened(path) as bundle, suppress(FileExistsError):
            os.mkdir(ROOTFS, 0o755, dir_fd=bundle)

    def refuse_used(self, path: str) -> None:
        """Make sure that a bundle's directory, if it is there, has neither config.json nor a root filesystem.

        Raises:
            BundleExists: it has.
            OSError: the operating system refuses.
        """
        with suppress(FileNotFoundError), self.opened(path) as bundle:
            if _exists(CONFIG, bundle):
                raise BundleExists(path, "it holds a config.json")
            if not _exists(ROOTFS, bundle):
                return
            status = os.lstat(ROOTFS, dir_fd=bundle)
            if not stat.S_ISDIR(status.st_mode):
                raise BundleExists(path, "its rootfs is a file or a link")
            if status.st_dev != os.fstat(bundle).st_dev:
                raise BundleExists(path, "its rootfs is mounted")
            rootfs = os.open(ROOTFS, _DIRECTORY, dir_fd=bundle)
            try:
                if os.listdir(rootfs):
                    raise BundleExists(path, "its rootfs is not empty")
            finally:
                os.close(rootfs)

    def leave(self, path: str, *, made_directory: bool) -> None:
        """Take out of a bundle's directory what we put there; harmless to repeat.

        What is not empty holds something that is not ours, and stays.

        Args:
            path: the bundle.
            made_directory: the directory itself is ours as well.

        Raises:
            OSError: the operating system refuses.
        """
        try:
            with self.opened(path) as bundle:
                with suppress(FileNotFoundError):
                    os.unlink(CONFIG, dir_fd=bundle)
                with suppress(OSError):
                    os.rmdir(ROOTFS, dir_fd=bundle)
            if made_directory:
                with self.opened(os.path.dirname(path)) as parent, suppress(OSError):
                    os.rmdir(os.path.basename(path), dir_fd=parent)
        except (FileNotFoundError, InvalidBundlePath):
            return  # it is gone, or something else has its name

    def _root_of(self, path: str) -> str | None:
        return next((root for root in self._roots if path.startswith(f"{root.rstrip('/')}/")), None)

    def _make_below(self, root: str, path: str) -> None:
        here = os.open(root, _ROOT)
        try:
            for name in os.path.relpath(path, root).split("/"):
                with suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=here)
                here = _stepped(here, name, path)
        finally:
            os.close(here)

    @contextmanager
    def opened(self, path: str) -> Iterator[int]:
        """The bundle's directory, open: what is done in it cannot be led elsewhere.

        Raises:
            InvalidBundlePath: a file, or a link that may not be followed, is in the way.
            FileNotFoundError: it is not there.
        """
        root = self._root_of(path)
        here = _open_any(path) if root is None else os.open(root, _ROOT)
        try:
            if root is not None:
                for name in os.path.relpath(path, root).split("/"):
                    here = _stepped(here, name, path)
            yield here
        finally:
            os.close(here)


def normal(path: str) -> str:
    """An absolute path without doubled and outer slashes."""
    return "/" + os.path.normpath(path).lstrip("/")


def _open_any(path: str) -> int:
    try:
        return os.open(path, _ROOT)
    except NotADirectoryError:
        raise InvalidBundlePath(path, "a file is in its way") from None


def _stepped(here: int, name: str, path: str) -> int:
    """Open a directory in one that is open, and close that one."""
    try:
        below = os.open(name, _DIRECTORY, dir_fd=here)
    except FileNotFoundError:
        raise
    except OSError:
        raise InvalidBundlePath(path, f"{name!r} in it is a link or a file") from None
    os.close(here)
    return below


def _exists(name: str, directory: int) -> bool:
    try:
        os.lstat(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True
