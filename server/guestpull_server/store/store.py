"""The store: the images, layers and bundles of one work directory, and of its read-only stores.

One process owns a work directory, and one `Store` its state. The store's lock guards that state and its files.
Slow operations, syncing and deleting layers, run outside of the lock, on directories that nobody else knows. When
others have replaced the work directory, all methods that change it raise WorkDirReplaced.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TypeVar

from guestpull_server.config import LayerNames
from guestpull_server.errors import (
    ImageInUse,
    ImageNotPresent,
    LayerInUse,
    ReadOnlyImage,
    StorageFailed,
    StorageFull,
    WorkDirReplaced,
    storage_errors,
)
from guestpull_server.models import Digest, ResolvedImage, StoredImage, StoredLayer, UnpackedLayer
from guestpull_server.platforms import Platform
from guestpull_server.store.bundle_making import Mounts
from guestpull_server.store.bundle_paths import BundlePaths
from guestpull_server.store.bundles import BundleRepository, BundleReservation, StoredBundle
from guestpull_server.store.durability import Durability
from guestpull_server.store.filesystem import (
    OVERLAY_BELOW_WORK_DIR,
    WORK_DIR_REMEDY,
    overlay_below,
    remove_tree,
    tree_bytes,
)
from guestpull_server.store.images import ImageRepository
from guestpull_server.store.inventory import take_inventory
from guestpull_server.store.layer_paths import LayerPaths
from guestpull_server.store.layers import Deleted, LayerRepository
from guestpull_server.store.metadata_db import MetadataDb
from guestpull_server.store.read_only import ReadOnlyStore
from guestpull_server.store.workdir import StagedLayer, WorkDir, directories_of, files_of, is_set_aside

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class StoreUsage:
    """Which bundles use which images, and which images and bundles use which layers, at one moment."""

    bundles_of_image: Mapping[Digest, tuple[str, ...]]
    images_of_layer: Mapping[Digest, tuple[Digest, ...]]
    bundles_of_layer: Mapping[Digest, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Removal:
    """The result of a removal: deleted images, deleted names, and the layers that were deleted with them."""

    image_ids: tuple[Digest, ...]
    references: tuple[str, ...]
    deleted_layers: tuple[Digest, ...]
    freed_bytes: int


class Store:
    """The state of one work directory. Thread-safe. Create it with `open`."""

    def __init__(
        self,
        work_dir: WorkDir,
        mounts: Mounts,
        guest_work_dir: str | None,
        read_only: Sequence[ReadOnlyStore],
        bundle_roots: Sequence[str],
    ) -> None:
        self._work_dir = work_dir
        self._guest_work_dir = guest_work_dir
        self._mounts = mounts
        self._read_only = read_only
        self._lock = threading.RLock()
        self._making_room = threading.Lock()
        self._rooms_made = 0
        durability = Durability(work_dir.path)
        self._paths = LayerPaths(work_dir.path, guest_work_dir)
        self._db = MetadataDb(work_dir, durability, self._paths)
        self._layers = LayerRepository(work_dir, durability, self._db, self._paths, read_only, self._lock)
        self._images = ImageRepository(work_dir.path, self._db, self._paths, read_only, self._lock)
        stores = (work_dir.path, *(store.work_dir for store in read_only))
        own = [own for path in stores for own in (*directories_of(path), *files_of(path))]
        bundle_paths = BundlePaths(bundle_roots, stores, own)
        self._bundles = BundleRepository(
            work_dir, durability, mounts, bundle_paths, self._lock, self._images.keep
        )

    @classmethod
    def open(
        cls,
        work_dir: str,
        mounts: Mounts,
        *,
        guest_work_dir: str | None = None,
        additional_stores: Sequence[str] = (),
        bundle_roots: Sequence[str] = (),
        layer_names: LayerNames | None = None,
    ) -> Store:
        """Take ownership of a work directory, read its state, and repair what a crash left behind.

        Args:
            work_dir: the work directory; created if it does not exist.
            mounts: queries and undoes mounts.
            guest_work_dir: the work directory's path in the guest, if it differs: all store_paths are written
                with it, including existing ones.
            additional_stores: work directories that are only read.
            bundle_roots: directories that bundles must be in; empty if any directory is allowed.
            layer_names: how the directories of new layers are named; None: like existing ones, or by digest.

        Raises:
            WorkDirInUse: another process owns it.
            InsecureWorkDir: another user could put files in it, or reach what is in its directories.
            InvalidStore: an additional store cannot be read.
            InvalidRequest: existing layers are named differently from `layer_names`.
            StorageFailed: the operating system refuses.
            WorkDirReplaced: somebody deletes it at this moment.
        """
        read_only = [ReadOnlyStore(path) for path in additional_stores]
        place = WorkDir(os.path.abspath(work_dir))
        try:
            store = cls(place, mounts, guest_work_dir, read_only, bundle_roots)
            store._start()
            store._layers.name_as(layer_names)
        except StorageFailed as error:
            is_in_place = place.is_in_place()
            place.close()
            if is_in_place:
                raise
            raise WorkDirReplaced(place.path) from error
        except BaseException:
            place.close()
            raise
        return store

    def close(self, *, tidy: bool = False) -> None:
        """Write what is unwritten, unless the disk is full, and release the work directory.

        Args:
            tidy: leave nothing but images and layers, and no traces of time or order.

        Raises:
            StorageFull: `tidy` is set, and the file system has no room.
            StorageFailed: the operating system refuses.
        """
        with self._lock:
            try:
                self._work_dir.preallocated_space.release()
                if tidy:
                    self._images.sort_names()
                    self._db.flush()
                    self._db.erase_times()
                    self._work_dir.tidy()
                else:
                    with suppress(StorageFull, WorkDirReplaced):
                        self._db.flush()
            finally:
                self._work_dir.close()

    def abandon(self) -> None:
        """Close the store without writing anything, after others have replaced the work directory."""
        with self._lock:
            self._work_dir.close()

    def is_in_place(self) -> bool:
        """Return whether the path still leads to the work directory that was opened. Takes microseconds."""
        return self._work_dir.is_in_place()

    def _start(self) -> None:
        for path in self._work_dir.leftovers():
            with storage_errors("deleting leftovers", path):
                remove_tree(path)
        self._db.read()
        self._db.warnings += self._bundles.read()
        with self._lock:
            self._layers.let_go(self._db.by_time())
        layers = self._db.meta_store.layers.values()
        overlay = overlay_below(
            (
                *directories_of(self._work_dir.path),
                *(os.path.dirname(self._paths.local(layer)) for layer in layers),
            )
        )
        if overlay is not None:
            self._db.warnings.append(f"{overlay} {OVERLAY_BELOW_WORK_DIR}. {WORK_DIR_REMEDY}")

    @property
    def work_dir(self) -> str:
        """The work directory."""
        return self._work_dir.path

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was found when the store was opened, and what was done about it; a sentence each."""
        return tuple(self._db.warnings)

    @property
    def damaged(self) -> bool:
        """Whether meta_store.json was damaged or lost when the store was opened."""
        return self._db.damaged

    # -- layers ---------------------------------------------------------------------------------------------

    def layer(self, digest: Digest) -> StoredLayer | None:
        """Return a layer that can be mounted, here or in a read-only store: it has an entry and a directory."""
        return self._layers.get(digest)

    def layers(self) -> tuple[StoredLayer, ...]:
        """Return all layers that have an entry, each digest once; those of this work directory first."""
        return self._layers.all()

    def is_present(self, layer: StoredLayer) -> bool:
        """Return whether a layer's directory exists."""
        return self._layers.is_present(layer)

    def is_read_only(self, layer: StoredLayer) -> bool:
        """Return whether a layer is in another store or on a read-only mount, so that it cannot be deleted."""
        return self._layers.is_read_only(layer)

    def tar_split_of(self, layer: StoredLayer) -> str | None:
        """Return the path of a layer's tar-split, in the store that has the layer; None if there is none."""
        return self._layers.tar_split_of(layer)

    def stage(self, digest: Digest) -> StagedLayer:
        """Create a directory to unpack a layer to.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
            WorkDirReplaced: others have replaced the work directory.
        """
        self._work_dir.check()
        return StagedLayer(self._work_dir, digest)

    def with_room(self, step: Callable[[], _T]) -> _T:
        """Run a step; if the disk is full, delete unused layers and run it again, once.

        Args:
            step: leaves nothing behind when it raises StorageFull; called without the lock.

        Raises:
            StorageFull: the file system has no room, and there are no unused layers.
        """
        made_before = self._rooms_made
        try:
            return step()
        except StorageFull:
            if not self._make_room(made_before):
                raise
        return step()

    def _make_room(self, made_before: int) -> bool:
        """Delete unused layers; return whether this call, or another one meanwhile, has made room."""
        with self._making_room:
            if self._rooms_made == made_before:
                deleted = self.delete_unused_for(0)
                if deleted.layers:
                    self._rooms_made += 1
                    fields = {"layers": len(deleted.layers), "bytes": deleted.freed_bytes}
                    _log.info("the disk is full: unused layers were deleted", extra={"fields": fields})
            return self._rooms_made != made_before

    def commit_layer(self, staged: StagedLayer, digest: Digest, unpacked: UnpackedLayer) -> StoredLayer:
        """Make a staged layer part of the store; readers and the next start see all of it or nothing.

        May be repeated for a layer that exists already: the staged copy is dropped. meta_store.json has the
        layer's entry from the next `flush` or `record_image` on.

        Raises:
            StorageFull: the file system has no room; the store is unchanged.
            StorageFailed: the operating system refuses; the store is unchanged.
        """
        return self._layers.commit(staged, digest, unpacked)

    def pin(self, digests: Iterable[Digest]) -> AbstractContextManager[None]:
        """Keep layers from being deleted while the context lasts, including layers that do not exist yet."""
        return self._layers.pin(digests)

    def discard_layer(self, digest: Digest) -> Deleted:
        """Delete a layer of this work directory that was altered, so that the next pull downloads it.

        Images keep their reference to it, and are incomplete until then.

        Raises:
            LayerInUse: it is mounted, or a pull uses it.
            StorageFailed: the operating system refuses.
        """
        with self._lock:
            users = [
                bundle.bundle_path
                for bundle in self._bundles.ready.values()
                if digest in bundle.layers and self._mounts.is_used(bundle.overlay_directory)
            ]
            if users or digest in self._layers.pinned:
                raise LayerInUse(digest, tuple(sorted(users)))
            if self._is_kept(digest):
                raise StorageFailed(
                    f"deleting layer {digest}", self._work_dir.layers, "it is mounted read-only"
                )
            deletion = self._layers.drop([digest])
        return self._layers.finish(deletion)

    def delete_unused_for(self, seconds: float) -> Deleted:
        """Delete layers that were pulled and have not been used for this time, the oldest first.

        A restart begins the time anew. Layers that were baked, or that other programs made, stay.

        Raises:
            StorageFailed: the operating system refuses.
            WorkDirReplaced: others have replaced the work directory.
        """
        with self._lock:
            old = self._layers.let_go_before(time.monotonic() - seconds)
            deletion = self._layers.drop(self._unused(old))
            self._layers.keep(old)
        return self._layers.finish(deletion)

    def seconds_until_unused_for(self, seconds: float) -> float:
        """Return how long it takes, at least, until a layer has been unused for this time."""
        now = time.monotonic()
        with self._lock:
            return min((max(0.0, then + seconds - now) for then in self._layers.let_go_at()), default=seconds)

    def delete_unused(self, digests: Iterable[Digest]) -> Deleted:
        """Delete those of the given layers that no image, bundle or pull uses.

        Raises:
            StorageFailed: the operating system refuses.
        """
        with self._lock:
            deletion = self._layers.drop(self._unused(digests))
        return self._layers.finish(deletion)

    def collect_unused(self, dry_run: bool) -> Deleted:
        """Delete what no image, bundle or pull uses, like `guestpulld gc`.

        staging/ and overlay/ are not touched: while the store is open, everything there belongs to a running
        operation, and the next start deletes what remains of it.

        Args:
            dry_run: delete nothing, and return what would be deleted.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
            WorkDirReplaced: others have replaced the work directory.
        """
        with self._lock, storage_errors("collecting garbage", self._work_dir.path):
            with suppress(StorageFull):
                self._db.flush()
            inventory = take_inventory(self._work_dir.path, self._guest_work_dir)
            known = self._db.meta_store.layers
            unused = self._unused(layer.compressed_digest for layer in inventory.unused_layers())
            layers = [known[digest] for digest in unused if digest in known]
            unclaimed = [path for path in inventory.unclaimed_paths() if not is_set_aside(path)]
            if not dry_run:
                self._work_dir.check()
                aside = [self._work_dir.set_aside(path) for path in unclaimed]
        if dry_run:
            return self._measured(layers, unclaimed)
        with storage_errors("deleting garbage", self._work_dir.staging):
            freed_bytes = sum(remove_tree(path) for path in aside)
        deleted = self.delete_unused(unused)
        return dataclasses.replace(deleted, freed_bytes=deleted.freed_bytes + freed_bytes)

    def _measured(self, layers: Sequence[StoredLayer], others: Sequence[str]) -> Deleted:
        """Return what a deletion would return."""
        present = [layer for layer in layers if self.is_present(layer)]
        paths = [self._paths.local(layer) for layer in present]
        records = [
            path_of(path)
            for path in paths
            for path_of in (self._work_dir.metadata_path, self._work_dir.tar_split_path)
        ]
        freed_bytes = 0
        for path in (*paths, *records, *others):
            with (
                storage_errors("measuring garbage", path),
                suppress(FileNotFoundError),  # it has none of these files, or is being deleted
            ):
                freed_bytes += tree_bytes(path)
        return Deleted(tuple(layer.compressed_digest for layer in present), freed_bytes)

    def delete_stray(self, path: str) -> None:
        """Delete a path in the work directory that belongs to nothing.

        Raises:
            StorageFailed: the operating system refuses.
        """
        with storage_errors("deleting garbage", path):
            with self._lock:
                self._work_dir.check()
                aside = self._work_dir.set_aside(path)
            remove_tree(aside)

    # -- images ---------------------------------------------------------------------------------------------

    def images(self) -> tuple[StoredImage, ...]:
        """Return all images, those of this work directory first.

        An image that is in several stores is returned once, and again for a store where it has other names: these
        can be used, but not removed.
        """
        return self._images.all()

    def image_for(self, reference: str, platform: Platform) -> StoredImage | None:
        """Return the image with a name, in its normalised form, that fits a platform; None if there is none."""
        return self._images.named(reference, platform)

    def image_by_manifest(self, digest: Digest) -> StoredImage | None:
        """Return the image that has a manifest, or None."""
        return self._images.with_manifest(digest)

    def manifest_for_pin(self, image: StoredImage, pin: Digest) -> Digest | None:
        """Return the image's manifest that a digest in a reference leads to, or None if it leads to none of them.

        The digest is a manifest's own, or that of an index that the image was pulled by.
        """
        return self._images.manifest_for_pin(image, pin)

    def proved_config(self, image: StoredImage) -> bytes:
        """Return the image config, byte for byte, checked against the image id.

        The config of an image of another program (image-rs), which reformats configs, is returned unchecked.

        Raises:
            ImageChanged: the config does not have the digest that the id is, the layers are not those of the
                config, or the image's backup names another manifest.
        """
        ours = any(layer.size_bytes >= 0 or self.tar_split_of(layer) is not None for layer in image.layers)
        return self._images.proved_config(image, ours=ours)

    def find_image(self, text: str, normalised: str | None) -> StoredImage:
        """Return the image that a text identifies.

        Args:
            text: a full image id, or at least its first 12 digits, with or without the algorithm; a manifest
                digest; or a reference.
            normalised: the full reference, if the text is one.

        Raises:
            ImageNotPresent: no image matches.
            AmbiguousImage: several images match a shortened id.
        """
        return self._images.find(text, normalised)

    def record_image(self, resolved: ResolvedImage, layers: Sequence[StoredLayer]) -> StoredImage:
        """Write the record of an image under its reference. Writes nothing if nothing changes.

        A tag moves from another image of the same platform to this one. If it was the other image's last name,
        that image is named by its repository and digest. An image that a read-only store has under this name is
        not recorded again. Layers that the image had in another form before, and that are unused now, are deleted.

        Raises:
            InvalidManifest: the config cannot be stored.
            StorageFull: the file system has no room; meta_store.json is unchanged.
            StorageFailed: the operating system refuses; likewise.
        """
        return self.with_room(lambda: self._record_image(resolved, layers))

    def _record_image(self, resolved: ResolvedImage, layers: Sequence[StoredLayer]) -> StoredImage:
        with self._lock:
            before = self._db.meta_store.images.get(resolved.image_id)
            image = self._images.record(resolved, layers)
            had = {layer.compressed_digest for layer in before.layers} if before is not None else set()
            gone = had - {layer.compressed_digest for layer in image.layers}
            if not gone:
                return image
            self._layers.let_go(gone)
            deletion = self._layers.drop(self._unused(gone))
        self._layers.finish(deletion)
        return image

    def repair_images(self) -> tuple[Digest, ...]:
        """Correct image records in meta_store.json by backups in images/, and the reverse, where these are proved.

        Returns the images that were repaired.

        Raises:
            StorageFull: the file system has no room; meta_store.json is unchanged.
            StorageFailed: the operating system refuses; likewise.
        """
        return self._images.repair()

    def remove_image(self, image: StoredImage, reference: str | None, force: bool) -> Removal:
        """Remove an image, or one of its names, and delete the layers that become unused.

        Args:
            image: the image, from `find_image`.
            reference: the name that it was found by; ignored if the image does not have this name.
            force: remove it even if bundles use it.

        Raises:
            ReadOnlyImage: it is in a read-only store, or layers/ is mounted read-only.
            ImageInUse: bundles use it.
            ImageNotPresent: it was removed meanwhile.
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        reference = reference if reference in image.references else None
        if image.read_only_store:
            raise ReadOnlyImage(reference or image.image_id, image.read_only_store)
        with self._lock:
            record = self._db.meta_store.images.get(image.image_id)
            if record is None:
                raise ImageNotPresent(reference or image.image_id)
            if reference is not None and reference in record.references:
                left = tuple(name for name in record.references if name != reference)
                if any("@" not in name for name in left):
                    self._images.rename(record.image_id, left)
                    return Removal((), (reference,), (), 0)
            bundles = tuple(
                bundle.bundle_path
                for bundle in self._bundles.ready.values()
                if bundle.image_id == image.image_id
            )
            if bundles and not force:
                raise ImageInUse(reference or image.image_id, tuple(sorted(bundles)))
            had = [layer.compressed_digest for layer in record.layers]
            going = self._unused(had, image.image_id)
            if any(self._is_kept(digest) for digest in going):
                raise ReadOnlyImage(reference or image.image_id, self._work_dir.layers)
            self._layers.let_go(had)
            deletion = self._layers.drop(going, image.image_id)
        deleted = self._layers.finish(deletion)
        return Removal((image.image_id,), record.references, deleted.layers, deleted.freed_bytes)

    # -- bundles --------------------------------------------------------------------------------------------

    def reserve_bundle(self, bundle_path: str) -> BundleReservation:
        """Create a bundle's directories, and reserve its path until the reservation is committed or left.

        Raises:
            InvalidBundlePath: the path is not allowed.
            BundleExists: the path is in use.
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        return self.with_room(lambda: self._bundles.reserve(bundle_path))

    def bundles(self) -> tuple[StoredBundle, ...]:
        """Return the bundles that are ready, and whether each is mounted."""
        mounted = self._mounts.mounted()
        with self._lock:
            ready = sorted(self._bundles.ready.values(), key=lambda bundle: bundle.bundle_path)
        return tuple(
            dataclasses.replace(bundle, mounted=bundle.path.real_rootfs in mounted) for bundle in ready
        )

    def release_bundle(self, bundle_path: str) -> Deleted:
        """Unmount a bundle, delete what was written in it, and delete its layers if they become unused.

        Raises:
            BundleNotFound: it is not a bundle of this service.
            BundleBusy: somebody on the machine uses its overlay; nothing is deleted, and it stays a bundle.
            StorageFailed: the operating system refuses.
            WorkDirReplaced: others have replaced the work directory meanwhile.
        """
        try:
            return self._forget(self._bundles.release(bundle_path))
        except StorageFailed as error:
            if self.is_in_place():
                raise
            raise WorkDirReplaced(self.work_dir) from error

    def abandoned_bundles(self) -> tuple[StoredBundle, ...]:
        """Return the bundles whose rootfs no longer exists: others may have removed them."""
        return self._bundles.abandoned()

    def release_abandoned_bundle(self, bundle: StoredBundle) -> Deleted | None:
        """Release a bundle whose rootfs is neither mounted anywhere on the machine nor an existing directory.

        Layers that become unused are deleted. The directories outside of the work directory are not touched.
        Returns None and does nothing if the bundle is not abandoned.

        Raises:
            WorkDirReplaced: others have replaced the work directory.
            StorageFailed: the operating system refuses.
        """
        return self._forget(bundle) if self._bundles.release_abandoned(bundle) else None

    def _forget(self, bundle: StoredBundle) -> Deleted:
        """Forget a bundle that was released, and delete its layers that become unused."""
        with self._lock:
            self._bundles.released(bundle)
            self._layers.let_go(bundle.layers)
            deletion = self._layers.drop(self._unused(bundle.layers))
        return self._layers.finish(deletion)

    # -- all ------------------------------------------------------------------------------------------------

    def usage(self) -> StoreUsage:
        """Return who uses which images and layers."""
        images_of_layer: dict[Digest, dict[Digest, None]] = {}
        bundles_of_image: dict[Digest, list[str]] = {}
        bundles_of_layer: Counter[Digest] = Counter()
        with self._lock:
            for images in (self._db.meta_store.images, *(store.images for store in self._read_only)):
                for record in images.values():
                    for layer in record.layers:
                        images_of_layer.setdefault(layer.compressed_digest, {})[record.image_id] = None
            for bundle in self._bundles.ready.values():
                bundles_of_image.setdefault(bundle.image_id, []).append(bundle.bundle_path)
                bundles_of_layer.update(bundle.layers)
        return StoreUsage(
            {image: tuple(sorted(bundles)) for image, bundles in bundles_of_image.items()},
            {layer: tuple(images) for layer, images in images_of_layer.items()},
            bundles_of_layer,
        )

    def flush(self) -> None:
        """Write meta_store.json if it is out of date.

        Raises:
            StorageFull: the file system has no room; the file is unchanged, and the next flush tries again.
            StorageFailed: the operating system refuses; likewise.
        """
        with self._lock:
            self._db.flush()

    def _is_kept(self, digest: Digest) -> bool:
        layer = self._db.meta_store.layers.get(digest)
        return layer is not None and self._layers.is_kept(layer)

    def _unused(self, digests: Iterable[Digest], except_by: Digest | None = None) -> list[Digest]:
        """Return the layers that no pull, bundle or image uses, ignoring one image."""
        used = set(self._layers.pinned)
        for bundle in self._bundles.ready.values():
            used.update(bundle.layers)
        for record in self._db.meta_store.images.values():
            if record.image_id != except_by:
                used.update(layer.compressed_digest for layer in record.layers)
        return [digest for digest in dict.fromkeys(digests) if digest not in used]
