"""Bundles: which ones there are, what they hold on to, and how they come and go.

A bundle has a directory of ours, `<work_dir>/overlay/<id>/`, with its upper and work directories and a small
file that says what it is (bundle_files.py). The directories outside of the work directory, the bundle and its
rootfs, are the caller's (bundle_paths.py). How both are made and undone is bundle_making.py's work.
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
from guestpull_server.store.bundle_files import (
    PREPARING,
    READY,
    BundleFile,
    FileIdentity,
    is_bundle_directory,
    read_bundle_file,
)
from guestpull_server.store.bundle_making import BundleMaker, BundlePlace, Mounts
from guestpull_server.store.bundle_paths import BundlePath, BundlePaths, can_be
from guestpull_server.store.durability import Durability
from guestpull_server.store.trees import remove_tree
from guestpull_server.store.workdir import WorkDir


@dataclass(frozen=True, slots=True)
class StoredBundle:
    """A bundle that is ready. `layers` are the compressed digests that it is mounted from."""

    path: BundlePath
    image_id: Digest
    reference: str
    layers: tuple[Digest, ...]
    mounted: bool
    overlay_directory: str
    made_directory: bool

    @property
    def bundle_path(self) -> str:
        """Its directory, as its caller wrote it."""
        return self.path.told

    @property
    def rootfs(self) -> str:
        """Where its file system is mounted, as its caller would write it."""
        return self.path.rootfs


class BundleReservation:
    """A bundle in the making. A context manager: leaving it before `commit` undoes all that was made."""

    def __init__(self, shelf: BundleShelf, maker: BundleMaker, place: BundlePlace) -> None:
        self._shelf = shelf
        self._maker = maker
        self._place = place
        self._committed = False

    @property
    def bundle_path(self) -> str:
        """The bundle's directory, as its caller wrote it."""
        return self._place.path.told

    @property
    def rootfs(self) -> str:
        """Where the root filesystem is to be mounted; the directory is there, and empty."""
        return self._place.path.rootfs

    @property
    def overlay_directory(self) -> str:
        """Where upper and work directories belong."""
        return self._place.overlay_directory

    def clear_overlay(self) -> None:
        """Delete what an attempt to mount left in the overlay directory, so that there can be another one.

        Raises:
            StorageFailed: the operating system refuses.
        """
        with storage_errors("clearing the overlay directory", self.overlay_directory):
            for name in os.listdir(self.overlay_directory):
                if name not in (PREPARING, READY):
                    remove_tree(os.path.join(self.overlay_directory, name))

    @contextmanager
    def opened(self) -> Iterator[int]:
        """The bundle's directory, open. Whatever has its path by then, this is the one that was allowed.

        Raises:
            InvalidBundlePath: it was replaced by a file, or by a link that may not be followed.
            StorageFailed: the operating system refuses.
        """
        with self._maker.opened(self._place) as directory:
            yield directory

    def writes_config(self, status: os.stat_result) -> None:
        """Say which file is to be config.json, before it gets that name: any other one stays, whatever happens.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        self._place = self._maker.writes_config(self._place, FileIdentity.of(status))

    def commit(self, image: StoredImage) -> None:
        """Declare the bundle ready; from now on it is listed, and holds on to its layers, also after a crash.

        An image that was removed since it was recorded is recorded again: the removal came first.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        self._shelf.keep(self._place, image)
        self._committed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if not self._committed:
            self._shelf.give_up(self._place)


class BundleShelf:
    """All bundles of one work directory.

    Args:
        work_dir: where their upper and work directories are.
        durability: of the work directory.
        mounts: how to ask for mounts, and undo them.
        paths: which paths bundles may have.
        lock: guards `ready`; whoever looks at it holds it.
        keep_image: called with the image of a bundle that becomes ready, under the lock.
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
        """By their real paths, so that no two bundles are the same directory."""

    def take_stock(self) -> list[str]:
        """Know the bundles that are ready, undo those that were in the making; returns what was strange."""
        strange: list[str] = []
        mounted = self._mounts.mounted()
        for name in sorted(os.listdir(self._work_dir.overlay)):
            directory = os.path.join(self._work_dir.overlay, name)
            if not is_bundle_directory(name):
                strange.append(f"{directory} is none of ours and is left alone")
                continue
            kept, unfinished = read_bundle_file(directory, READY), read_bundle_file(directory, PREPARING)
            if kept is not None:
                # a crash may have come between the two
                with storage_errors("deleting leftovers", directory), suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, PREPARING))
                path = _path_of(kept)
                self._put(path, directory, kept, path.real_rootfs in mounted)
            elif os.path.lexists(os.path.join(directory, READY)):
                strange.append(f"{directory} belongs to a bundle, but its {READY} cannot be read: left alone")
            elif unfinished is not None:
                made = unfinished.made_directory + unfinished.made_parents
                place = BundlePlace(_path_of(unfinished), directory, made, unfinished.config)
                try:
                    self._maker.undo(place)
                except GuestpullError as error:
                    strange.append(f"a bundle that was being made cannot be undone yet: {error}")
            else:
                with storage_errors("deleting leftovers", directory):
                    self._maker.discard(directory)
        return strange

    def reserve(self, bundle_path: str) -> BundleReservation:
        """Make a bundle's directories, nobody else having it.

        Raises:
            InvalidBundlePath: it is no path for a bundle.
            BundleExists: it is in use.
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        path = self._paths.checked(bundle_path)
        with self._changed:
            if path.real in self.ready:
                raise BundleExists(path.told, "it is a bundle of this service already")
            if path.real in self._coming:
                raise BundleExists(path.told, "another pull is making it")
            self._coming.add(path.real)
        try:
            return BundleReservation(self, self._maker, self._maker.make(path))
        except BaseException:
            self._forget(path)
            raise

    def keep(self, place: BundlePlace, image: StoredImage) -> None:
        """See BundleReservation.commit."""
        with (
            self._changed,
            storage_errors(f"committing bundle {place.path.told}", place.overlay_directory),
        ):
            self._work_dir.check()
            self._keep_image(image)
            kept = self._maker.finish(place, image)
            self._put(place.path, place.overlay_directory, kept, mounted=True)
            self._coming.discard(place.path.real)

    def give_up(self, place: BundlePlace) -> None:
        """Undo what was made of a bundle that was not committed; a failure to do so is logged."""
        try:
            self._maker.give_up(place)
        finally:
            self._forget(place.path)

    def release(self, bundle_path: str) -> StoredBundle:
        """Unmount a bundle, and delete what was written in it; then it still holds on to its layers.

        Whoever comes while another releases it waits for the outcome.

        Raises:
            BundleNotFound: it is no bundle of ours.
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
        """The bundles whose rootfs is not a directory any more; somebody may have them mounted elsewhere."""
        with self._changed:
            bundles = tuple(self.ready.values())
        return tuple(bundle for bundle in bundles if _is_gone(bundle.path.real_rootfs))

    def release_abandoned(self, bundle: StoredBundle) -> bool:
        """Delete what was written in a bundle that is abandoned; then it still holds on to its layers.

        The caller's directories are left alone: they were taken away, and what is there now is not ours. Returns
        False, and does nothing, if the bundle is used, is there again, or is being released by somebody else.

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
        """End a release: the bundle lets go of its layers, unless it is still `ready`."""
        with self._changed:
            self._leaving.discard(bundle.path.real)
            if not ready:
                self.ready.pop(bundle.path.real, None)
            self._changed.notify_all()

    def _find(self, path: BundlePath) -> StoredBundle | None:
        """The bundle of a directory; or of the name that its maker gave it, should links lead elsewhere now."""
        named = (bundle for bundle in self.ready.values() if bundle.path.told == path.told)
        return self.ready.get(path.real) or next(named, None)

    def _forget(self, path: BundlePath) -> None:
        with self._changed:
            self._coming.discard(path.real)

    def _put(self, path: BundlePath, overlay_directory: str, kept: BundleFile, mounted: bool) -> None:
        self.ready[path.real] = StoredBundle(
            path,
            Digest(kept.image_id),
            kept.reference,
            tuple(Digest(layer) for layer in kept.layers),
            mounted,
            overlay_directory,
            kept.made_directory,
        )


def _is_gone(rootfs: str) -> bool:
    """Whether there is no such directory; False where that cannot be told."""
    try:
        return not stat.S_ISDIR(os.lstat(rootfs).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False


def _path_of(file: BundleFile) -> BundlePath:
    return BundlePath(file.bundle_path, file.real_path or os.path.realpath(file.bundle_path))
