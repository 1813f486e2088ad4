"""Bundles on disk: create and undo them, in overlay/<id>/ and in the caller's directory.

bundles.py knows which bundles exist and who may create one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Protocol, Self

import msgspec

from guestpull_server.errors import (
    BundleBusy,
    GuestpullError,
    InvalidBundlePath,
    InvalidDigest,
    storage_errors,
)
from guestpull_server.models import Digest, StoredImage
from guestpull_server.store.bundle_paths import ROOTFS, BundlePath, BundlePaths
from guestpull_server.store.durability import Durability
from guestpull_server.store.filesystem import NotAFile, read_file, remove_tree
from guestpull_server.store.workdir import WorkDir

READY: Final = "bundle.json"
"""The file in overlay/<id>/ that describes a bundle."""

PREPARING: Final = "bundle.json.preparing"
"""The same while a pull makes the bundle."""

_ID: Final = re.compile(r"[0-9a-f]{16}")

_log = logging.getLogger(__name__)


# -- files in overlay/<id>/ ----------------------------------------------------------------------------------


class FileIdentity(msgspec.Struct, frozen=True):
    """Identifies a file by its inode number and, as these are reused, by when it was written.

    The device is left out: it may have another number after a reboot.
    """

    inode: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Return the identity of a file with this status."""
        return cls(status.st_ino, status.st_mtime_ns)


class BundleFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """The content of the file that describes a bundle.

    Attributes:
        bundle_path: the path that the caller requested.
        made_directory: we created the bundle's directory.
        image_id: the id of the image; "" while the bundle is being prepared.
        reference: the name of the image; likewise.
        layers: the compressed digests of the layers that it is mounted from; likewise.
        real_path: the bundle's path without links; "" in files of earlier versions.
        made_parents: how many directories above it we created; only while it is being prepared.
        config: the config.json that we are about to write; only while it is being prepared.
    """

    bundle_path: str
    made_directory: bool
    image_id: str = ""
    reference: str = ""
    layers: list[str] = []
    real_path: str = ""
    made_parents: int = 0
    config: FileIdentity | None = None


def is_bundle_directory(name: str) -> bool:
    """Return whether a name in overlay/ is that of a bundle's directory."""
    return _ID.fullmatch(name) is not None


def read_bundle_file(overlay_directory: str, name: str) -> BundleFile | None:
    """Read a file that describes a bundle; return None if it is missing or unusable."""
    try:
        content = read_file(os.path.join(overlay_directory, name))
        found = msgspec.json.decode(content or b"", type=BundleFile)
        for digest in (found.image_id, *found.layers) if name == READY else ():
            Digest(digest)
    except (OSError, NotAFile, msgspec.DecodeError, UnicodeDecodeError, InvalidDigest):
        return None
    paths = (found.bundle_path, found.real_path or found.bundle_path)
    return found if all(path.startswith("/") and "\0" not in path for path in paths) else None


# -- making and undoing -------------------------------------------------------------------------------------


class Mounts(Protocol):
    """What the store needs to know and do about mounts; implemented by the snapshot room."""

    def mounted(self) -> frozenset[str]:
        """Return where overlay file systems are mounted in this process's mount namespace, as absolute paths."""

    def is_used(self, overlay_directory: str) -> bool:
        """Return whether anybody on the machine has a bundle's overlay mounted, or uses it otherwise.

        Raises:
            GuestpullError: this cannot be determined.
        """

    def unmount(self, rootfs: str | None, overlay_directory: str) -> tuple[str, ...]:
        """Unmount a bundle's rootfs if nobody else uses its overlay; return the users, a phrase each.

        If it returns no user, nobody on the machine has the overlay mounted. Does nothing if it is not mounted.
        `rootfs` is None if the bundle's directory does not exist.

        Raises:
            GuestpullError: the kernel refuses for another reason.
        """

    def detach(self, rootfs: str, overlay_directory: str) -> None:
        """Unmount a bundle's rootfs even if it is in use. Does nothing if it is not mounted.

        Raises:
            GuestpullError: the kernel refuses.
        """


@dataclass(frozen=True, slots=True)
class BundlePlace:
    """Where a bundle is, and what we created for it.

    Attributes:
        path: the path of the bundle.
        overlay_directory: its directory in overlay/.
        made: how many directories we created: the bundle's own, and those above it.
        config: the config.json that is ours, while the bundle is being prepared.
        ready: any config.json is ours: the caller may have rewritten it.
    """

    path: BundlePath
    overlay_directory: str
    made: int
    config: FileIdentity | None = None
    ready: bool = False

    def is_ours(self, config: os.stat_result) -> bool:
        """Return whether a config.json with this status may be deleted."""
        return self.ready or self.config == FileIdentity.of(config)


class BundleMaker:
    """Creates and undoes the bundles of one work directory. All its state is on disk.

    Args:
        work_dir: the work directory, with the upper and work directories.
        durability: syncs the work directory.
        mounts: undoes mounts.
        paths: creates and removes the callers' directories.
    """

    def __init__(self, work_dir: WorkDir, durability: Durability, mounts: Mounts, paths: BundlePaths) -> None:
        self._work_dir = work_dir
        self._durability = durability
        self._mounts = mounts
        self._paths = paths

    def make(self, path: BundlePath) -> BundlePlace:
        """Create a bundle's directories, after a file that describes what is being created.

        Raises:
            InvalidBundlePath: a file, or a link that may not be followed, is in the way.
            BundleExists: the directory is in use.
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        with storage_errors(f"making bundle {path.requested}", path.requested):
            self._paths.refuse_used(path)
            overlay_directory = os.path.join(self._work_dir.overlay, secrets.token_hex(8))
            place = BundlePlace(path, overlay_directory, self._paths.missing(path))
            os.mkdir(overlay_directory, 0o700)
            try:
                self._prepare(place)
                self._durability.sync_names(self._work_dir.overlay)
                self._paths.make(path)
            except BaseException:
                self.give_up(place)
                raise
        return place

    @contextmanager
    def opened(self, place: BundlePlace) -> Iterator[int]:
        """Open the bundle's directory.

        Raises:
            InvalidBundlePath: it was replaced by a file, or by a link.
            StorageFailed: the operating system refuses.
        """
        with ExitStack() as stack:
            with storage_errors("opening the bundle", place.path.requested):
                directory = stack.enter_context(self._paths.opened(place.path))
            yield directory

    def writes_config(self, place: BundlePlace, config: FileIdentity) -> BundlePlace:
        """Write which file is about to become config.json; return the updated place.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        place = dataclasses.replace(place, config=config)
        with storage_errors("recording the runtime config", place.overlay_directory):
            self._prepare(place)
        return place

    def finish(self, place: BundlePlace, image: StoredImage) -> BundleFile:
        """Write that a bundle is ready; return what was written.

        Raises:
            OSError: the operating system refuses.
        """
        layers = [layer.compressed_digest for layer in image.layers]
        content = BundleFile(
            place.path.requested,
            place.made > 0,
            image.image_id,
            image.references[0] if image.references else "",
            list(dict.fromkeys(layers)),
            place.path.real,
        )
        self._write(READY, place, content)
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(place.overlay_directory, PREPARING))
        return content

    def give_up(self, place: BundlePlace) -> None:
        """Undo a bundle whose pull failed. Log a failure to do so: the caller must see why the pull failed.

        What cannot be undone stays, with the file by which the next start undoes it.
        """
        try:
            self.undo(place)
        except GuestpullError as error:
            fields = {"bundle": place.path.requested, "problem": str(error)}
            _log.warning("a failed pull cannot be undone before the next start", extra={"fields": fields})

    def undo(self, place: BundlePlace) -> None:
        """Unmount a bundle and remove what we created. May be repeated.

        Raises:
            BundleBusy: the bundle was ready and somebody on the machine uses its overlay; nothing is deleted.
            StorageFailed: the operating system refuses.
        """
        self._unmount(place)
        with storage_errors(f"removing bundle {place.path.requested}", place.path.requested):
            self._paths.leave(place.path, made=place.made, is_ours=place.is_ours)
            if os.path.lexists(place.overlay_directory):
                self.discard(place.overlay_directory)

    def discard(self, overlay_directory: str) -> None:
        """Delete a directory in overlay/ durably, so that nobody finds it half deleted.

        Raises:
            OSError: the operating system refuses.
        """
        aside = self._work_dir.set_aside(overlay_directory)
        self._durability.sync_names(self._work_dir.overlay)
        remove_tree(aside)

    def _unmount(self, place: BundlePlace) -> None:
        """Unmount a bundle's rootfs, following no link."""
        with storage_errors("unmounting the bundle", place.path.rootfs), ExitStack() as stack:
            rootfs = None
            with suppress(FileNotFoundError, InvalidBundlePath):  # it is gone, or replaced
                directory = stack.enter_context(self._paths.opened(place.path))
                rootfs = f"/proc/self/fd/{directory}/{ROOTFS}"
            if not place.ready:  # nobody was given this bundle, so no user counts
                if rootfs is not None:
                    self._mounts.detach(rootfs, place.overlay_directory)
            elif users := self._mounts.unmount(rootfs, place.overlay_directory):
                raise BundleBusy(place.path.requested, users)

    def _prepare(self, place: BundlePlace) -> None:
        content = BundleFile(
            place.path.requested,
            place.made > 0,
            real_path=place.path.real,
            made_parents=max(place.made - 1, 0),
            config=place.config,
        )
        self._write(PREPARING, place, content)

    def _write(self, name: str, place: BundlePlace, content: BundleFile) -> None:
        path = os.path.join(place.overlay_directory, name)
        self._durability.replace(path, msgspec.json.encode(content, enc_hook=str))
