"""How a bundle is made on disk, and taken away again: its own directory in overlay/, and what is the caller's.

Which bundles there are, and who may make one, is bundles.py's to know.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import msgspec

from guestpull_server.errors import BundleBusy, GuestpullError, InvalidBundlePath, storage_errors
from guestpull_server.models import StoredImage
from guestpull_server.store.bundle_files import PREPARING, READY, BundleFile, FileIdentity
from guestpull_server.store.bundle_paths import ROOTFS, BundlePath, BundlePaths
from guestpull_server.store.durability import Durability
from guestpull_server.store.trees import remove_tree
from guestpull_server.store.workdir import WorkDir

_log = logging.getLogger(__name__)


class Mounts(Protocol):
    """What the store must know of mounts, and leaves to others to do."""

    def mounted(self) -> frozenset[str]:
        """Where overlay file systems are mounted in this process's mount namespace, absolute paths."""

    def is_used(self, overlay_directory: str) -> bool:
        """Whether anybody on the machine has a bundle's overlay mounted, or holds it otherwise.

        Raises:
            GuestpullError: that cannot be found out.
        """

    def unmount(self, rootfs: str | None, overlay_directory: str) -> tuple[str, ...]:
        """Unmount a bundle's rootfs if nobody else uses its overlay; returns who does, a phrase each.

        If it returns nothing, nobody on the machine has the overlay mounted. Harmless where nothing is mounted.
        `rootfs` is None if the bundle's directory is gone.

        Raises:
            GuestpullError: the kernel refuses for another reason than its use.
        """

    def detach(self, rootfs: str, overlay_directory: str) -> None:
        """Unmount a bundle's rootfs whoever uses it; harmless where it is not mounted.

        Raises:
            GuestpullError: the kernel refuses.
        """


@dataclass(frozen=True, slots=True)
class BundlePlace:
    """Where a bundle is, and what of it we made.

    Args:
        path: of the bundle.
        overlay_directory: in the work directory.
        made: how many directories, the bundle's own and those above it.
        config: the config.json that is ours, while the bundle is being prepared.
        ready: whatever is config.json by now is ours: its owner may have written it anew.
    """

    path: BundlePath
    overlay_directory: str
    made: int
    config: FileIdentity | None = None
    ready: bool = False

    def is_ours(self, config: os.stat_result) -> bool:
        """Whether a config.json in the bundle may be deleted."""
        return self.ready or self.config == FileIdentity.of(config)


class BundleMaker:
    """Makes bundles of one work directory, and undoes them. What it holds of them is on disk alone.

    Args:
        work_dir: where their upper and work directories are.
        durability: of the work directory.
        mounts: how to undo mounts.
        paths: how the callers' directories are made and left.
    """

    def __init__(self, work_dir: WorkDir, durability: Durability, mounts: Mounts, paths: BundlePaths) -> None:
        self._work_dir = work_dir
        self._durability = durability
        self._mounts = mounts
        self._paths = paths

    def make(self, path: BundlePath) -> BundlePlace:
        """Make a bundle's directories; what is being made is written down first.

        Raises:
            InvalidBundlePath: a file, or a link that may not be followed, is in the way.
            BundleExists: its directory is in use.
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        with storage_errors(f"making bundle {path.told}", path.told):
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
        """The bundle's directory, open.

        Raises:
            InvalidBundlePath: it was replaced by a file, or by a link.
            StorageFailed: the operating system refuses.
        """
        with ExitStack() as stack:
            with storage_errors("opening the bundle", place.path.told):
                directory = stack.enter_context(self._paths.opened(place.path))
            yield directory

    def writes_config(self, place: BundlePlace, config: FileIdentity) -> BundlePlace:
        """Write down which file is to be config.json; returns the place that knows it.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        place = dataclasses.replace(place, config=config)
        with storage_errors("noting the runtime config", place.overlay_directory):
            self._prepare(place)
        return place

    def finish(self, place: BundlePlace, image: StoredImage) -> BundleFile:
        """Write down that a bundle is ready; returns what was written.

        Raises:
            OSError: the operating system refuses.
        """
        layers = [layer.compressed_digest for layer in image.layers]
        kept = BundleFile(
            place.path.told,
            place.made > 0,
            image.image_id,
            image.references[0] if image.references else "",
            list(dict.fromkeys(layers)),
            place.path.real,
        )
        self._write(READY, place, kept)
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(place.overlay_directory, PREPARING))
        return kept

    def give_up(self, place: BundlePlace) -> None:
        """Undo a bundle whose pull failed. A failure to do so is logged: the caller must see why the pull failed.

        What cannot be undone stays, with the file that tells the next start to undo it.
        """
        try:
            self.undo(place)
        except GuestpullError as error:
            facts = {"bundle": place.path.told, "problem": str(error)}
            _log.warning("a failed pull cannot be undone before the next start", extra={"fields": facts})

    def undo(self, place: BundlePlace) -> None:
        """Take a bundle away: unmount it, and remove what we made. Harmless to repeat.

        Raises:
            BundleBusy: it was ready, and somebody on the machine uses its overlay; nothing is deleted.
            StorageFailed: the operating system refuses.
        """
        self._unmount(place)
        with storage_errors(f"removing bundle {place.path.told}", place.path.told):
            self._paths.leave(place.path, made=place.made, is_ours=place.is_ours)
            if os.path.lexists(place.overlay_directory):
                self.discard(place.overlay_directory)

    def discard(self, overlay_directory: str) -> None:
        """Delete a directory of overlay/ so that it is never found half-deleted, nor comes back.

        Raises:
            OSError: the operating system refuses.
        """
        aside = self._work_dir.set_aside(overlay_directory)
        self._durability.sync_names(self._work_dir.overlay)
        remove_tree(aside)

    def _unmount(self, place: BundlePlace) -> None:
        """Unmount a bundle's rootfs, and nothing that a link leads to in its place."""
        with storage_errors("unmounting the bundle", place.path.rootfs), ExitStack() as stack:
            rootfs = None
            with suppress(FileNotFoundError, InvalidBundlePath):  # it is gone, or something else has its name
                directory = stack.enter_context(self._paths.opened(place.path))
                rootfs = f"/proc/self/fd/{directory}/{ROOTFS}"
            if not place.ready:  # nobody was given it: who uses it has no say
                if rootfs is not None:
                    self._mounts.detach(rootfs, place.overlay_directory)
            elif users := self._mounts.unmount(rootfs, place.overlay_directory):
                raise BundleBusy(place.path.told, users)

    def _prepare(self, place: BundlePlace) -> None:
        content = BundleFile(
            place.path.told,
            place.made > 0,
            real_path=place.path.real,
            made_parents=max(place.made - 1, 0),
            config=place.config,
        )
        self._write(PREPARING, place, content)

    def _write(self, name: str, place: BundlePlace, content: BundleFile) -> None:
        path = os.path.join(place.overlay_directory, name)
        self._durability.replace(path, msgspec.json.encode(content, enc_hook=str))
