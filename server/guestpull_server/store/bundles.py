"""The bundles of a store: which exist, what they use, and who may create or release one.

A bundle has a directory of ours, `<work_dir>/overlay/<id>/`, with its upper and work directories and a small file
that describes it. The directories outside of the work directory, the bundle and its rootfs, belong to the caller
(bundle_paths.py). bundle_making.py creates and undoes both.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from guestpull_server.errors import BundleExists, BundleNotFound, GuestpullError, storage_errors
from guestpull_server.models import Digest, StoredImage
from guestpull_server.store.bundle_making import (
    PREPARING,
    READY,
    BundleFile,
    BundleMaker,
    BundlePlace,
    FileIdentity,
    Mounts,
    is_bundle_directory,
    read_bundle_file,
)
from guestpull_server.store.bundle_paths import BundlePath, BundlePaths, can_be
from guestpull_server.store.durability import Durability
from guestpull_server.store.filesystem import remove_tree
from guestpull_server.store.workdir import WorkDir


@dataclass(frozen=True, slots=True)
class StoredBundle:
    """A bundle that is ready. `layers` has the compressed digests of the layers that it is mounted from."""

    path: BundlePath
    image_id: Digest
    reference: str
    layers: tuple[Digest, ...]
    mounted: bool
    overlay_directory: str
    made_directory: bool

    @property
    def bundle_path(self) -> str:
        """The bundle's directory, as its caller requested it."""
        return self.path.requested

    @property
    def rootfs(self) -> str:
        """Where the root file system is mounted, relative to the requested path."""
        return self.path.rootfs


class BundleReservation:
    """A bundle that is being made. A context manager: leaving it before `commit` undoes everything."""

    def __init__(self, bundles: BundleRepository, maker: BundleMaker, place: BundlePlace) -> None:
        self._bundles = bundles
        self._maker = maker
        self._place = place
        self._committed = False

    @property
    def bundle_path(self) -> str:
        """The bundle's directory, as its caller requested it."""
        return self._place.path.requested

    @property
    def rootfs(self) -> str:
        """Where to mount the root file system: an empty directory."""
        return self._place.path.rootfs

    @property
    def overlay_directory(self) -> str:
        """Where to create the upper and work directories."""
        return self._place.overlay_directory

    def clear_overlay(self) -> None:
        """Delete what a failed mount left in the overlay directory, before another attempt.

        Raises:
            StorageFailed: the operating system refuses.
        """
        with storage_errors("clearing the overlay directory", self.overlay_directory):
            for name in os.listdir(self.overlay_directory):
                if name not in (PREPARING, READY):
                    remove_tree(os.path.join(self.overlay_directory, name))

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Open the bundle's directory: the one that was checked, whatever has its path by now.

        Raises:
            InvalidBundlePath: it was replaced by a file or a link.
            StorageFailed: the operating system refuses.
        """
        with self._maker.opened(self._place) as directory:
            yield directory

    def writes_config(self, status: os.stat_result) -> None:
        """Record which file becomes config.json, before it gets that name: any other file is never deleted.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        self._place = self._maker.writes_config(self._place, FileIdentity.of(status))

    def commit(self, image: StoredImage) -> None:
        """Make the bundle ready: from now on it is listed and keeps its layers, also after a crash.

        If the image was removed since it was recorded, it is recorded again, as if the removal came first.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        self._bundles.keep(self._place, image)
        self._committed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if not self._committed:
            self._bundles.give_up(self._place)


class BundleRepository:
    """All bundles of one work directory.

    Args:
        work_dir: the work directory, with the upper and work directories.
        durability: syncs the work directory.
        mounts: queries and undoes mounts.
        paths: checks bundle paths.
        lock: guards `ready`; hold it to read `ready`.
        keep_image: called with the image of a bundle that becomes ready, under the lock.

    Attributes:
        ready: the bundles by their real paths, so that no two bundles are the same directory.
    """

    def __init__(
        self,
        work_dir: WorkDir,
        durability: Durability,
        mounts: Mounts,
        paths: BundlePaths,
        lock: threading.RLock,
        keep_image: Callable[[StoredImage], None],
    ) -> None:
        self._work_dir = work_dir
        self._mounts = mounts
        self._paths = paths
        self._maker = BundleMaker(work_dir, durability, mounts, paths)
        self._changed = threading.Condition(lock)
        self._keep_image = keep_image
        self._coming: set[str] = set()
        self._leaving: set[str] = set()
        self.ready: dict[str, StoredBundle] = {}

    def read(self) -> list[str]:
        """Read the bundles that are ready, and undo unfinished ones; return warnings, a sentence each."""
        warnings: list[str] = []
        mounted = self._mounts.mounted()
        for name in sorted(os.listdir(self._work_dir.overlay)):
            directory = os.path.join(self._work_dir.overlay, name)
            if not is_bundle_directory(name):
                warnings.append(f"{directory} does not belong to this service and is kept")
                continue
            ready, unfinished = read_bundle_file(directory, READY), read_bundle_file(directory, PREPARING)
            if ready is not None:
                # a crash may have come between its writing and this deletion
                with storage_errors("deleting leftovers", directory), suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, PREPARING))
                path = _path_of(ready)
                self._put(path, directory, ready, path.real_rootfs in mounted)
            elif os.path.lexists(os.path.join(directory, READY)):
                warnings.append(
                    f"{directory} belongs to a bundle, but its {READY} cannot be read; it is kept"
                )
            elif unfinished is not None:
                made = unfinished.made_directory + unfinished.made_parents
                place = BundlePlace(_path_of(unfinished), directory, made, unfinished.config)
                try:
                    self._maker.undo(place)
                except GuestpullError as error:
                    warnings.append(f"a bundle that was being made cannot be undone yet: {error}")
            else:
                with storage_errors("deleting leftovers", directory):
                    self._maker.discard(directory)
        return warnings

    def reserve(self, bundle_path: str) -> BundleReservation:
        """Create a bundle's directories, and reserve its path.

        Raises:
            InvalidBundlePath: the path is not allowed.
            BundleExists: the path is in use.
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        path = self._paths.checked(bundle_path)
        with self._changed:
            if path.real in self.ready:
                raise BundleExists(path.requested, "it is already a bundle of this service")
            if path.real in self._coming:
                raise BundleExists(path.requested, "another pull is making it")
            self._coming.add(path.real)
        try:
            return BundleReservation(self, self._maker, self._maker.make(path))
        except BaseException:
            self._forget(path)
            raise

    def keep(self, place: BundlePlace, image: StoredImage) -> None:
        """Make a reserved bundle ready."""
        with (
            self._changed,
            storage_errors(f"committing bundle {place.path.requested}", place.overlay_directory),
        ):
            self._work_dir.check()
            self._keep_image(image)
            content = self._maker.finish(place, image)
            self._put(place.path, place.overlay_directory, content, mounted=True)
            self._coming.discard(place.path.real)

    def give_up(self, place: BundlePlace) -> None:
        """Undo a bundle that was not committed; log a failure to do so."""
        try:
            self._maker.give_up(place)
        finally:
            self._forget(place.path)

    def release(self, bundle_path: str) -> StoredBundle:
        """Unmount a bundle, and delete what was written in it. It keeps its layers until `released`.

        If another caller is releasing the bundle, wait for the result.

        Raises:
            BundleNotFound: it is not a bundle of this service.
            BundleBusy: somebody on the machine uses its overlay; nothing is deleted, and it stays a bundle.
            StorageFailed: the operating system refuses.
        """
        if not bundle_path.startswith("/") or not can_be(bundle_path):
            raise BundleNotFound(bundle_path)
        path = self._paths.resolved(bundle_path)
        with self._changed:
            while (bundle := self._find(path)) is not None and bundle.path.real in self._leaving:
                self._changed.wait()
            if bundle is None:
                raise BundleNotFound(bundle_path)
            self._leaving.add(bundle.path.real)
        made = int(bundle.made_directory)
        try:
            self._maker.undo(BundlePlace(bundle.path, bundle.overlay_directory, made, ready=True))
        except BaseException:
            self.released(bundle, ready=True)
            raise
        return bundle

    def abandoned(self) -> tuple[StoredBundle, ...]:
        """Return the bundles whose rootfs no longer exists; somebody may still have them mounted elsewhere."""
        with self._changed:
            bundles = tuple(self.ready.values())
        return tuple(bundle for bundle in bundles if _is_gone(bundle.path.real_rootfs))

    def release_abandoned(self, bundle: StoredBundle) -> bool:
        """Delete what was written in an abandoned bundle. It keeps its layers until `released`.

        The caller's directories are not touched: they were removed, and what is there now is not ours. Returns
        False and does nothing if the bundle is used, exists again, or is being released by somebody else.

        Raises:
            WorkDirReplaced: others have replaced the work directory.
            StorageFailed: the operating system refuses.
        """
        with self._changed:
            if self.ready.get(bundle.path.real) is not bundle or bundle.path.real in self._leaving:
                return False
            self._leaving.add(bundle.path.real)
        released = False
        try:
            if _is_gone(bundle.path.real_rootfs) and not self._mounts.is_used(bundle.overlay_directory):
                self._work_dir.check()
                with storage_errors(f"releasing bundle {bundle.bundle_path}", bundle.overlay_directory):
                    if os.path.lexists(bundle.overlay_directory):
                        self._maker.discard(bundle.overlay_directory)
                released = True
        finally:
            if not released:
                self.released(bundle, ready=True)
        return released

    def released(self, bundle: StoredBundle, *, ready: bool = False) -> None:
        """Finish a release: forget the bundle, unless it is still `ready`."""
        with self._changed:
            self._leaving.discard(bundle.path.real)
            if not ready:
                self.ready.pop(bundle.path.real, None)
            self._changed.notify_all()

    def _find(self, path: BundlePath) -> StoredBundle | None:
        """Return the bundle with this real path, or with this requested path if links have changed since."""
        named = (bundle for bundle in self.ready.values() if bundle.path.requested == path.requested)
        return self.ready.get(path.real) or next(named, None)

    def _forget(self, path: BundlePath) -> None:
        with self._changed:
            self._coming.discard(path.real)

    def _put(self, path: BundlePath, overlay_directory: str, content: BundleFile, mounted: bool) -> None:
        self.ready[path.real] = StoredBundle(
            path,
            Digest(content.image_id),
            content.reference,
            tuple(Digest(layer) for layer in content.layers),
            mounted,
            overlay_directory,
            content.made_directory,
        )


def _is_gone(rootfs: str) -> bool:
    """Return whether the directory does not exist; False if this cannot be determined."""
    try:
        return not stat.S_ISDIR(os.lstat(rootfs).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False


def _path_of(file: BundleFile) -> BundlePath:
    return BundlePath(file.bundle_path, file.real_path or os.path.realpath(file.bundle_path))
