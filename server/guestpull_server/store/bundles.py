"""Bundles: which ones there are, what they hold on to, and how they come and go.

A bundle has a directory of ours, `<work_dir>/overlay/<id>/`, with its upper and work directories and a small
file that says what it is: `bundle.json.preparing` while a pull makes it, `bundle.json` from then on. The
directories outside of the work directory, the bundle and its rootfs, are the caller's; what we put into them
we take out again.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self

import msgspec

from guestpull_server.errors import BundleExists, InvalidBundlePath, InvalidDigest, storage_errors
from guestpull_server.models import Digest, StoredImage
from guestpull_server.store.durability import Durability
from guestpull_server.store.workdir import WorkDir

_READY: Final = "bundle.json"
_PREPARING: Final = "bundle.json.preparing"
_MAX_PATH_BYTES: Final = 4000  # PATH_MAX, less room for what we put into the bundle
_ID: Final = re.compile(r"[0-9a-f]{16}")
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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


class _BundleFile(msgspec.Struct, frozen=True):
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
        return os.path.join(self.bundle_path, "rootfs")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a bundle is, and what of it we made."""

    bundle_path: str
    overlay_directory: str
    made_directory: bool

    @property
    def rootfs(self) -> str:
        return os.path.join(self.bundle_path, "rootfs")


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

    def commit(self, image: StoredImage) -> None:
        """Declare the bundle ready; from now on it is listed, and holds on to its layers, also after a crash.

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
            self._shelf.undo(self._place)


class BundleShelf:
    """All bundles of one work directory.

    Args:
        work_dir: where their upper and work directories are.
        durability: of the work directory.
        mounts: how to ask for mounts, and undo them.
        roots: directories that bundles must be in; none: any directory will do.
        lock: guards `ready` and `paths`; whoever looks at these holds it.
    """

    def __init__(
        self,
        work_dir: WorkDir,
        durability: Durability,
        mounts: Mounts,
        roots: Sequence[str],
        lock: threading.RLock,
    ) -> None:
        self._work_dir = work_dir
        self._directory = work_dir.overlay
        self._durability = durability
        self._mounts = mounts
        self._roots = [os.path.normpath(root) for root in roots]
        self._lock = lock
        self.ready: dict[str, StoredBundle] = {}
        self.paths: set[str] = set()

    def take_stock(self) -> list[str]:
        """Know the bundles that are ready, undo those that were in the making; returns what was strange."""
        strange: list[str] = []
        mounted = self._mounts.mounted()
        for name in sorted(os.listdir(self._directory)):
            overlay_directory = os.path.join(self._directory, name)
            if not _ID.fullmatch(name):
                strange.append(f"{overlay_directory} is none of ours and is left alone")
                continue
            kept = _read(os.path.join(overlay_directory, _READY))
            if kept is not None:
                place = _Place(kept.bundle_path, overlay_directory, kept.made_directory)
                with suppress(InvalidDigest):
                    self._put(place, Digest(kept.image_id), kept, place.rootfs in mounted)
                    continue
            preparing = _read(os.path.join(overlay_directory, _PREPARING))
            if preparing is not None:
                self.undo(_Place(preparing.bundle_path, overlay_directory, preparing.made_directory))
            else:
                self._work_dir.discard(overlay_directory)
        return strange

    def reserve(self, bundle_path: str) -> BundleReservation:
        """Make a bundle's directories, nobody else having it.

        Raises:
            InvalidBundlePath: it is no path for a bundle.
            BundleExists: it is in use.
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        path = self.checked(bundle_path)
        with self._lock:
            if path in self.ready:
                raise BundleExists(path, "it is a bundle of this service already")
            if path in self.paths:
                raise BundleExists(path, "another pull is making it")
            return self._make(path)

    def _make(self, path: str) -> BundleReservation:
        overlay_directory = os.path.join(self._directory, secrets.token_hex(8))
        with storage_errors(f"making bundle {path}", path):
            self._refuse_used(path)
            made_directory = not os.path.lexists(path)
            os.mkdir(overlay_directory, 0o700)
            place = _Place(path, overlay_directory, made_directory)
            self.paths.add(path)
            try:
                self._write(_PREPARING, place, _BundleFile(path, made_directory))
                self._make_directory(path)
                with suppress(FileExistsError):
                    os.mkdir(place.rootfs, 0o755)
            except BaseException:
                self.undo(place)
                raise
        return BundleReservation(self, place)

    def keep(self, place: _Place, image: StoredImage) -> None:
        """See BundleReservation.commit."""
        layers = [layer.compressed_digest for layer in image.layers]
        reference = image.references[0] if image.references else ""
        kept = _BundleFile(
            place.bundle_path, place.made_directory, image.image_id, reference, list(dict.fromkeys(layers))
        )
        with storage_errors(f"committing bundle {place.bundle_path}", place.overlay_directory):
            self._write(_READY, place, kept)
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(place.overlay_directory, _PREPARING))
        with self._lock:
            self._put(place, image.image_id, kept, mounted=True)

    def undo(self, place: _Place | StoredBundle) -> None:
        """Take a bundle away: unmount it, and remove what we made. Harmless to repeat.

        Raises:
            BundleBusy: something uses its rootfs; all is as it was.
            StorageFailed: the operating system refuses.
        """
        self._mounts.unmount(place.rootfs)
        with storage_errors(f"removing bundle {place.bundle_path}", place.bundle_path):
            with suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(os.path.join(place.bundle_path, "config.json"))
            # what is not empty holds something that is not ours
            with suppress(OSError):
                os.rmdir(place.rootfs)
            if place.made_directory:
                with suppress(OSError):
                    os.rmdir(place.bundle_path)
            if os.path.lexists(place.overlay_directory):
                self._work_dir.discard(place.overlay_directory)
        with self._lock:
            self.ready.pop(place.bundle_path, None)
            self.paths.discard(place.bundle_path)

    def checked(self, bundle_path: str) -> str:
        """A bundle's path in its normal form.

        Raises:
            InvalidBundlePath: it is not absolute, too long, outside of the roots, or the root itself.
        """
        if not bundle_path.startswith("/"):
            raise InvalidBundlePath(bundle_path, "it is not absolute")
        if "\0" in bundle_path or len(os.fsencode(bundle_path)) > _MAX_PATH_BYTES:
            raise InvalidBundlePath(bundle_path[:200], "no directory can have it")
        if ".." in bundle_path.split("/"):
            raise InvalidBundlePath(bundle_path, "it has a .. in it")
        path = "/" + os.path.normpath(bundle_path).lstrip("/")
        if path == "/":
            raise InvalidBundlePath(bundle_path, "it is the root directory")
        if self._roots and self._root_of(path) is None:
            raise InvalidBundlePath(path, f"it is not below any of bundle_roots ({', '.join(self._roots)})")
        return path

    def _root_of(self, path: str) -> str | None:
        return next((root for root in self._roots if path.startswith(f"{root.rstrip('/')}/")), None)

    def _make_directory(self, path: str) -> None:
        """Make the bundle's directory; below a configured root, no link is followed on the way."""
        root = self._root_of(path)
        if root is None:
            try:
                os.makedirs(path, mode=0o755, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise InvalidBundlePath(path, "a file is in its way") from None
            return
        here = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in os.path.relpath(path, root).split("/"):
                with suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=here)
                try:
                    below = os.open(name, _DIRECTORY, dir_fd=here)
                except OSError:
                    raise InvalidBundlePath(path, f"{name!r} in it is a link or a file") from None
                os.close(here)
                here = below
        finally:
            os.close(here)

    @staticmethod
    def _refuse_used(path: str) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(os.path.join(path, "config.json"))
            raise BundleExists(path, "it holds a config.json")
        rootfs = os.path.join(path, "rootfs")
        try:
            status = os.lstat(rootfs)
        except (FileNotFoundError, NotADirectoryError):
            return
        if not stat.S_ISDIR(status.st_mode):
            raise BundleExists(path, "its rootfs is a file or a link")
        if os.path.ismount(rootfs):
            raise BundleExists(path, "its rootfs is mounted")
        if os.listdir(rootfs):
            raise BundleExists(path, "its rootfs is not empty")

    def _write(self, name: str, place: _Place, content: _BundleFile) -> None:
        self._durability.replace(
            os.path.join(place.overlay_directory, name), msgspec.json.encode(content, enc_hook=str)
        )

    def _put(self, place: _Place, image_id: Digest, kept: _BundleFile, mounted: bool) -> None:
        layers: list[Digest] = []
        for text in kept.layers:
            with suppress(InvalidDigest):
                layers.append(Digest(text))
        self.ready[place.bundle_path] = StoredBundle(
            place.bundle_path,
            image_id,
            kept.reference,
            tuple(layers),
            mounted,
            place.overlay_directory,
            place.made_directory,
        )
        self.paths.add(place.bundle_path)


def _read(path: str) -> _BundleFile | None:
    """A bundle's file; None where there is none, or none that can be read."""
    try:
        with open(path, "rb") as file:
            found = msgspec.json.decode(file.read(), type=_BundleFile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if found.bundle_path.startswith("/") else None
