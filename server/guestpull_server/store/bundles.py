"""Bundles: which ones there are, what they hold on to, and how they come and go.

A bundle has a directory of ours, `<work_dir>/overlay/<id>/`, with its upper and work directories and a small
file that says what it is: `bundle.json.preparing` while a pull makes it, `bundle.json` from then on. The
directories outside of the work directory, the bundle and its rootfs, are the caller's (bundle_paths.py).
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self

import msgspec

from guestpull_server.errors import (
    BundleBusy,
    BundleExists,
    BundleNotFound,
    GuestpullError,
    InvalidBundlePath,
    InvalidDigest,
    storage_errors,
)
from guestpull_server.models import Digest, StoredImage
from guestpull_server.store.bundle_paths import ROOTFS, BundlePaths, normal
from guestpull_server.store.durability import Durability
from guestpull_server.store.workdir import WorkDir

READY: Final = "bundle.json"
PREPARING: Final = "bundle.json.preparing"
_ID: Final = re.compile(r"[0-9a-f]{16}")


class Mounts(Protocol):
    """What the store must know of mounts, and leaves to others to do."""

    def mounted(self) -> frozenset[str]:
        """Where overlay file systems are mounted, absolute paths."""

    def unmount(self, rootfs: str) -> None:
        """Unmount a rootfs; harmless where nothing is mounted.

        Raises:
            BundleBusy: something uses it.
            GuestpullError: the kernel refuses for another reason.
        """


class BundleFile(msgspec.Struct, frozen=True):
    """What bundle.json says; while a bundle is being prepared, its image is not known yet."""

    bundle_path: str
    made_directory: bool
    image_id: str = ""
    reference: str = ""
    layers: list[str] = []


@dataclass(frozen=True, slots=True)
class StoredBundle:
    """A bundle that is ready. `layers` are the compressed digests that it is mounted from."""

    bundle_path: str
    image_id: Digest
    reference: str
    layers: tuple[Digest, ...]
    mounted: bool
    overlay_directory: str
    made_directory: bool

    @property
    def rootfs(self) -> str:
        """Where its file system is mounted."""
        return os.path.join(self.bundle_path, ROOTFS)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a bundle is, and what of it we made."""

    bundle_path: str
    overlay_directory: str
    made_directory: bool

    @property
    def rootfs(self) -> str:
        return os.path.join(self.bundle_path, ROOTFS)


class BundleReservation:
    """A bundle in the making. A context manager: leaving it before `commit` undoes all that was made."""

    def __init__(self, shelf: BundleShelf, place: _Place) -> None:
        self._shelf = shelf
        self._place = place
        self._committed = False

    @property
    def bundle_path(self) -> str:
        """The bundle's directory."""
        return self._place.bundle_path

    @property
    def rootfs(self) -> str:
        """Where the root filesystem is to be mounted; the directory is there, and empty."""
        return self._place.rootfs

    @property
    def overlay_directory(self) -> str:
        """Where upper and work directories belong."""
        return self._place.overlay_directory

    @contextmanager
    def opened(self) -> Iterator[int]:
        """The bundle's directory, open. Whatever has its path by then, this is the one that was allowed.

        Raises:
            InvalidBundlePath: it was replaced by a file, or by a link that may not be followed.
            StorageFailed: the operating system refuses.
        """
        with self._shelf.opened(self._place) as directory:
            yield directory

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
        self._durability = durability
        self._mounts = mounts
        self._paths = paths
        self._changed = threading.Condition(lock)
        self._keep_image = keep_image
        self._coming: set[str] = set()
        self._leaving: set[str] = set()
        self.ready: dict[str, StoredBundle] = {}

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
                place = _Place(kept.bundle_path, directory, kept.made_directory)
                self._put(place, kept, place.rootfs in mounted)
            elif os.path.lexists(os.path.join(directory, READY)):
                strange.append(f"{directory} belongs to a bundle, but its {READY} cannot be read: left alone")
            elif unfinished is not None:
                place = _Place(unfinished.bundle_path, directory, unfinished.made_directory)
                try:
                    self._undo(place)
                except GuestpullError as error:
                    strange.append(f"a bundle that was being made cannot be undone yet: {error}")
            else:
                with storage_errors("deleting leftovers", directory):
                    self._work_dir.discard(directory)
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
            if path in self.ready:
                raise BundleExists(path, "it is a bundle of this service already")
            if path in self._coming:
                raise BundleExists(path, "another pull is making it")
            self._coming.add(path)
        try:
            return BundleReservation(self, self._make(path))
        except BaseException:
            self._forget(path)
            raise

    def _make(self, path: str) -> _Place:
        with storage_errors(f"making bundle {path}", path):
            self._paths.refuse_used(path)
            place = _Place(
                path,
                os.path.join(self._work_dir.overlay, secrets.token_hex(8)),
                made_directory=not os.path.lexists(path),
            )
            os.mkdir(place.overlay_directory, 0o700)
            try:
                self._write(PREPARING, place, BundleFile(path, place.made_directory))
                self._paths.make(path)
            except BaseException:
                self._undo(place)
                raise
        return place

    @contextmanager
    def opened(self, place: _Place) -> Iterator[int]:
        """See BundleReservation.opened."""
        with ExitStack() as stack:
            with storage_errors("opening the bundle", place.bundle_path):
                directory = stack.enter_context(self._paths.opened(place.bundle_path))
            yield directory

    def keep(self, place: _Place, image: StoredImage) -> None:
        """See BundleReservation.commit."""
        layers = [layer.compressed_digest for layer in image.layers]
        kept = BundleFile(
            place.bundle_path,
            place.made_directory,
            image.image_id,
            image.references[0] if image.references else "",
            list(dict.fromkeys(layers)),
        )
        with (
            self._changed,
            storage_errors(f"committing bundle {place.bundle_path}", place.overlay_directory),
        ):
            self._keep_image(image)
            self._write(READY, place, kept)
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(place.overlay_directory, PREPARING))
            self._put(place, kept, mounted=True)
            self._coming.discard(place.bundle_path)

    def give_up(self, place: _Place) -> None:
        """Undo what was made of a bundle that was not committed."""
        try:
            self._undo(place)
        finally:
            self._forget(place.bundle_path)

    def release(self, bundle_path: str) -> StoredBundle:
        """Unmount a bundle, and delete what was written in it; then it still holds on to its layers.

        Whoever comes while another releases it waits for the outcome.

        Raises:
            BundleNotFound: it is no bundle of ours.
            BundleBusy: something uses its rootfs; it stays a bundle.
            StorageFailed: the operating system refuses.
        """
        path = normal(bundle_path) if bundle_path.startswith("/") else ""
        with self._changed:
            self._changed.wait_for(lambda: path not in self._leaving)
            bundle = self.ready.get(path)
            if bundle is None:
                raise BundleNotFound(bundle_path)
            self._leaving.add(path)
        try:
            self._undo(bundle)
        except BaseException:
            self.released(bundle, ready=True)
            raise
        return bundle

    def released(self, bundle: StoredBundle, *, ready: bool = False) -> None:
        """End a release: the bundle lets go of its layers, unless it is still `ready`."""
        with self._changed:
            self._leaving.discard(bundle.bundle_path)
            if not ready:
                self.ready.pop(bundle.bundle_path, None)
            self._changed.notify_all()

    def _undo(self, place: _Place | StoredBundle) -> None:
        """Take a bundle away: unmount it, and remove what we made. Harmless to repeat.

        Raises:
            BundleBusy: something uses its rootfs; all is as it was.
            StorageFailed: the operating system refuses.
        """
        self._unmount(place)
        with storage_errors(f"removing bundle {place.bundle_path}", place.bundle_path):
            self._paths.leave(place.bundle_path, made_directory=place.made_directory)
            if os.path.lexists(place.overlay_directory):
                self._work_dir.discard(place.overlay_directory)

    def _unmount(self, place: _Place | StoredBundle) -> None:
        """Unmount a bundle's rootfs, and nothing that a link leads to in its place."""
        with (
            storage_errors("unmounting the bundle", place.rootfs),
            suppress(FileNotFoundError, InvalidBundlePath),  # it is gone, or something else has its name
            self._paths.opened(place.bundle_path) as directory,
        ):
            try:
                self._mounts.unmount(f"/proc/self/fd/{directory}/{ROOTFS}")
            except BundleBusy:
                raise BundleBusy(place.bundle_path) from None

    def _forget(self, path: str) -> None:
        with self._changed:
            self._coming.discard(path)

    def _write(self, name: str, place: _Place, content: BundleFile) -> None:
        path = os.path.join(place.overlay_directory, name)
        self._durability.replace(path, msgspec.json.encode(content, enc_hook=str))

    def _put(self, place: _Place, kept: BundleFile, mounted: bool) -> None:
        self.ready[place.bundle_path] = StoredBundle(
            place.bundle_path,
            Digest(kept.image_id),
            kept.reference,
            tuple(Digest(layer) for layer in kept.layers),
            mounted,
            place.overlay_directory,
            place.made_directory,
        )


def is_bundle_directory(name: str) -> bool:
    """Whether a directory in overlay/ is one of ours, by its name."""
    return _ID.fullmatch(name) is not None


def read_bundle_file(overlay_directory: str, name: str) -> BundleFile | None:
    """A bundle's file; None where there is none, or none that can be used."""
    try:
        with open(os.path.join(overlay_directory, name), "rb") as file:
            found = msgspec.json.decode(file.read(), type=BundleFile)
        for digest in (found.image_id, *found.layers) if name == READY else ():
            Digest(digest)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, InvalidDigest):
        return None
    return found if found.bundle_path.startswith("/") else None
