"""The store: what this work directory, and the read-only stores beside it, have of images and layers.

One process owns a work directory, and one `Store` its state; its lock guards that state and the files that hold
it. What takes long, syncing a layer and deleting one, is done outside of the lock, on directories that nobody
else knows. Once others have replaced the work directory, all that would change it raises WorkDirReplaced.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
from guestpull_server.store.bundles import BundleReservation, BundleShelf, StoredBundle
from guestpull_server.store.durability import Durability
from guestpull_server.store.images import ImageShelf
from guestpull_server.store.inventory import take_inventory
from guestpull_server.store.layers import LayerShelf
from guestpull_server.store.ledger import Ledger
from guestpull_server.store.outcomes import Deleted, Removal, StoreUsage
from guestpull_server.store.overlays import WORK_DIR_REMEDY, WORK_DIR_SPOILED, overlay_in
from guestpull_server.store.paths import LayerPaths
from guestpull_server.store.readonly import ReadOnlyStore
from guestpull_server.store.trees import remove_tree, tree_bytes
from guestpull_server.store.unreferenced import is_on_its_way_out, unclaimed_paths, unused_layers
from guestpull_server.store.workdir import StagedLayer, WorkDir, files_of, rooms_of

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Store:
    """The state of one work directory. Thread-safe. Make it by `open`."""

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
        self._ledger = Ledger(work_dir, durability, self._paths)
        self._layers = LayerShelf(work_dir, durability, self._ledger, self._paths, read_only, self._lock)
        self._images = ImageShelf(work_dir.path, self._ledger, self._paths, read_only, self._lock)
        stores = (work_dir.path, *(store.work_dir for store in read_only))
        own = [own for path in stores for own in (*rooms_of(path), *files_of(path))]
        bundle_paths = BundlePaths(bundle_roots, stores, own)
        self._bundles = BundleShelf(work_dir, durability, mounts, bundle_paths, self._lock, self._images.keep)

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
        """Take a work directory over, and take stock of it.

        Args:
            work_dir: where it is; made if it is not there.
            mounts: how to ask for mounts, and undo them.
            guest_work_dir: where the guest will see it, if that is elsewhere: all store_paths are written so,
                those too that were written otherwise before.
            additional_stores: work directories that are only read.
            bundle_roots: directories that bundles must be in; none: any directory will do.
            layer_names: how new layers' directories are named; None: as those that are there, or by digest.

        Raises:
            WorkDirInUse: another process owns it.
            InsecureWorkDir: another user could put files in it, or reach what is in its rooms.
            InvalidStore: an additional store cannot be read.
            InvalidRequest: layers are to be named otherwise than those that are there.
            StorageFailed: the operating system refuses.
            WorkDirReplaced: others delete it at this moment.
        """
        read_only = [ReadOnlyStore(path) for path in additional_stores]
        place = WorkDir(os.path.abspath(work_dir))
        try:
            store = cls(place, mounts, guest_work_dir, read_only, bundle_roots)
            store._take_stock()
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
        """Give the work directory back. What a full disk does not take is found out by the next start.

        Args:
            tidy: leave nothing in it but images and layers, and no traces of time or order.

        Raises:
            StorageFull: it is to be tidy, and the file system has no room.
            StorageFailed: the operating system refuses.
        """
        with self._lock:
            try:
                self._work_dir.reserve.give_up()
                if tidy:
                    self._images.sort_names()
                    self._ledger.flush()
                    self._ledger.forget_times()
                    self._ledger.rewrite_facts()
                    self._work_dir.tidy()
                else:
                    with suppress(StorageFull, WorkDirReplaced):
                        self._ledger.flush()
            finally:
                self._work_dir.close()

    def abandon(self) -> None:
        """Release what was opened, and write nothing any more: others have replaced the work directory."""
        with self._lock:
            self._work_dir.close()

    def is_in_place(self) -> bool:
        """Whether the work directory's path still leads to what was opened; some microseconds."""
        return self._work_dir.is_in_place()

    def _take_stock(self) -> None:
        for path in self._work_dir.leftovers():
            with storage_errors("deleting leftovers", path):
                remove_tree(path)
        self._ledger.read()
        self._ledger.warnings += self._bundles.take_stock()
        with self._lock:
            self._layers.let_go(self._ledger.by_time())
        overlay = overlay_in(self._work_dir.path, self._paths, self._ledger.catalog.layers.values())
        if overlay is not None:
            self._ledger.warnings.append(f"{overlay} {WORK_DIR_SPOILED}. {WORK_DIR_REMEDY}")

    @property
    def work_dir(self) -> str:
        """The work directory."""
        return self._work_dir.path

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was found when taking stock, and what was done about it; a sentence each."""
        return tuple(self._ledger.warnings)

    @property
    def damaged(self) -> bool:
        """Whether meta_store.json was damaged when the store was opened."""
        return self._ledger.damaged

    # -- layers ---------------------------------------------------------------------------------------------

    def layer(self, digest: Digest) -> StoredLayer | None:
        """A layer that can be mounted: it has an entry, here or in a read-only store, and its directory."""
        return self._layers.get(digest)

    def layers(self) -> tuple[StoredLayer, ...]:
        """All layers that have an entry, those of this work directory first; each digest once."""
        return self._layers.all()

    def is_present(self, layer: StoredLayer) -> bool:
        """Whether its directory is there."""
        return self._layers.is_present(layer)

    def is_read_only(self, layer: StoredLayer) -> bool:
        """Whether it lies where nothing is written or deleted: in another store, or on a read-only mount."""
        return self._layers.is_read_only(layer)

    def record_of(self, layer: StoredLayer) -> str | None:
        """The record of a layer's tar, if there is one: beside the store that the layer lies in."""
        return self._layers.record_of(layer)

    def stage(self, digest: Digest) -> StagedLayer:
        """A place to unpack a layer to.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
            WorkDirReplaced: others have replaced the work directory.
        """
        self._work_dir.check()
        return StagedLayer(self._work_dir, digest)

    def with_room(self, step: Callable[[], _T]) -> _T:
        """Do a step; if the disk is full, delete the layers that nobody uses, and do it once more.

        Args:
            step: leaves nothing behind when it raises StorageFull; not under the lock.

        Raises:
            StorageFull: the file system has no room, and no unused layers either.
        """
        made_before = self._rooms_made
        try:
            return step()
        except StorageFull:
            if not self._make_room(made_before):
                raise
        return step()

    def _make_room(self, made_before: int) -> bool:
        """Delete the layers that were let go; whether that, or somebody else meanwhile, has made room."""
        with self._making_room:
            if self._rooms_made == made_before:
                deleted = self.delete_unused_for(0)
                if deleted.layers:
                    self._rooms_made += 1
                    told = {"layers": len(deleted.layers), "bytes": deleted.freed_bytes}
                    _log.info("the disk is full: unused layers were deleted", extra={"fields": told})
            return self._rooms_made != made_before

    def commit_layer(self, staged: StagedLayer, digest: Digest, unpacked: UnpackedLayer) -> StoredLayer:
        """Make a staged layer part of the store; readers, and the next start, see all of it or nothing.

        Repeating it for a layer that is there already is harmless: the staged copy is dropped.
        meta_store.json names the layer from the next `flush` or `record_image` on.

        Raises:
            StorageFull: the file system has no room; the store is as it was.
            StorageFailed: the operating system refuses; the store is as it was.
        """
        return self._layers.commit(staged, digest, unpacked)

    def pin(self, digests: Iterable[Digest]) -> AbstractContextManager[None]:
        """Keep layers from being deleted while the context lasts, those too that are yet to come."""
        return self._layers.pin(digests)

    def discard_layer(self, digest: Digest) -> Deleted:
        """Delete a layer of ours that is not what it should be, whoever uses it; the next pull downloads it.

        Images keep naming it, and are not whole until then.

        Raises:
            LayerInUse: it is mounted, or a pull needs it.
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
        """Delete the layers that a pull brought, and that nobody has used for so long; the oldest first.

        After a restart the time begins anew. Layers that were baked, or that other programs made, stay.

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
        """How long no layer will have been unused for so long, if nobody uses one meanwhile."""
        now = time.monotonic()
        with self._lock:
            return min((max(0.0, then + seconds - now) for then in self._layers.let_go_at()), default=seconds)

    def delete_unused(self, digests: Iterable[Digest]) -> Deleted:
        """Delete those of some layers that no image, bundle or pull uses.

        Raises:
            StorageFailed: the operating system refuses.
        """
        with self._lock:
            deletion = self._layers.drop(self._unused(digests))
        return self._layers.finish(deletion)

    def collect_unused(self, dry_run: bool) -> Deleted:
        """Delete at once what no image, bundle or pull uses: what `guestpulld gc` would delete.

        Only what is in staging/ and overlay/ stays: while the store is open, all of it belongs to something that
        is under way, and the next start deletes what is left of that.

        Args:
            dry_run: delete nothing, and return what would be.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
            WorkDirReplaced: others have replaced the work directory.
        """
        with self._lock, storage_errors("collecting garbage", self._work_dir.path):
            with suppress(StorageFull):
                self._ledger.flush()
            inventory = take_inventory(self._work_dir.path, self._guest_work_dir)
            known = self._ledger.catalog.layers
            unused = self._unused(layer.compressed_digest for layer in unused_layers(inventory))
            layers = [known[digest] for digest in unused if digest in known]
            unclaimed = [path for path in unclaimed_paths(inventory) if not is_on_its_way_out(path)]
            if not dry_run:
                self._work_dir.check()
                aside = [self._work_dir.set_aside(path) for path in unclaimed]
        if dry_run:
            return self._measured(layers, unclaimed)
        with storage_errors("deleting what belongs to nothing", self._work_dir.staging):
            freed_bytes = sum(remove_tree(path) for path in aside)
        deleted = self.delete_unused(unused)
        return dataclasses.replace(deleted, freed_bytes=deleted.freed_bytes + freed_bytes)

    def _measured(self, layers: Sequence[StoredLayer], others: Sequence[str]) -> Deleted:
        """What a deletion would return."""
        present = [layer for layer in layers if self.is_present(layer)]
        paths = [self._paths.local(layer) for layer in present]
        records = [self._work_dir.record_path(path) for path in paths]
        freed_bytes = 0
        for path in (*paths, *records, *others):
            with (
                storage_errors("measuring what nothing refers to", path),
                suppress(FileNotFoundError),  # it has no record, or is being deleted
            ):
                freed_bytes += tree_bytes(path)
        return Deleted(tuple(layer.compressed_digest for layer in present), freed_bytes)

    def delete_stray(self, path: str) -> None:
        """Delete something in the work directory that belongs to nothing.

        Raises:
            StorageFailed: the operating system refuses.
        """
        with storage_errors("deleting what belongs to nothing", path):
            with self._lock:
                self._work_dir.check()
                aside = self._work_dir.set_aside(path)
            remove_tree(aside)

    # -- images ---------------------------------------------------------------------------------------------

    def images(self) -> tuple[StoredImage, ...]:
        """All images, those of this work directory first.

        An image of several stores comes once, and once more for a store in which it has other names: these can
        be used, but not removed.
        """
        return self._images.all()

    def image_for(self, reference: str, platform: Platform) -> StoredImage | None:
        """The image that has a name, in its normalised form, and fits a platform."""
        return self._images.named(reference, platform)

    def image_by_manifest(self, digest: Digest) -> StoredImage | None:
        """The image that has a manifest."""
        return self._images.with_manifest(digest)

    def manifest_for_pin(self, image: StoredImage, pin: Digest) -> Digest | None:
        """Return the image's manifest that a digest in a reference leads to, or None if it leads to none of them.

        The digest is a manifest's own, or that of an index that the image was pulled by.
        """
        return self._images.manifest_for_pin(image, pin)

    def proved_config(self, image: StoredImage) -> bytes:
        """Return the image config, byte for byte, checked against the image id.

        An image of another program (image-rs), which reformats configs and keeps no proofs, is returned unchecked.

        Raises:
            ImageChanged: the config does not have the digest that the id is, the layers are not those of the
                config, or the image's backup names another manifest.
        """
        ours = any(layer.size_bytes >= 0 or self.record_of(layer) is not None for layer in image.layers)
        return self._images.proved_config(image, ours=ours)

    def find_image(self, text: str, normalised: str | None) -> StoredImage:
        """The image that somebody means.

        Args:
            text: an image id, whole or its first 12 digits or more, with or without its algorithm; a manifest's
                digest; or a reference.
            normalised: the reference in full, where the text is one.

        Raises:
            ImageNotPresent: there is none.
            AmbiguousImage: a shortened id fits several.
        """
        return self._images.find(text, normalised)

    def record_image(self, resolved: ResolvedImage, layers: Sequence[StoredLayer]) -> StoredImage:
        """Make an image part of the store, under its reference; writes nothing where nothing changes.

        A tag that another image of the same platform had is taken from it, as everywhere; if that was its last
        name, its repository and digest are what is left. An image that a read-only store has under that name is
        not recorded once more. Layers that the image had in another form before, and nobody uses now, are deleted.

        Raises:
            InvalidManifest: its config cannot be kept.
            StorageFull: the file system has no room; meta_store.json is as it was.
            StorageFailed: the operating system refuses; likewise.
        """
        return self.with_room(lambda: self._record_image(resolved, layers))

    def _record_image(self, resolved: ResolvedImage, layers: Sequence[StoredLayer]) -> StoredImage:
        with self._lock:
            before = self._ledger.catalog.images.get(resolved.image_id)
            image = self._images.record(resolved, layers)
            had = {layer.compressed_digest for layer in before.layers} if before is not None else set()
            gone = had - {layer.compressed_digest for layer in image.layers}
            if not gone:
                return image
            self._layers.let_go(gone)
            deletion = self._layers.drop(self._unused(gone))
        self._layers.finish(deletion)
        return image

    def mend_images(self) -> tuple[Digest, ...]:
        """Put right what meta_store.json or a copy in images/ says of an image, where the other one is proved.

        Returns the images that it was done for.

        Raises:
            StorageFull: the file system has no room; meta_store.json is as it was.
            StorageFailed: the operating system refuses; likewise.
        """
        return self._images.mend()

    def remove_image(self, image: StoredImage, reference: str | None, force: bool) -> Removal:
        """Forget an image, or one of its names, and delete the layers that nobody uses any more.

        Args:
            image: as `find_image` gave it.
            reference: the name that it was meant by, if it has that; else it was meant by its id.
            force: forget it although bundles use it.

        Raises:
            ReadOnlyImage: it lies in a read-only store, or layers/ is mounted read-only.
            ImageInUse: bundles use it.
            ImageNotPresent: it has gone meanwhile.
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        reference = reference if reference in image.references else None
        if image.read_only_store:
            raise ReadOnlyImage(reference or image.image_id, image.read_only_store)
        with self._lock:
            record = self._ledger.catalog.images.get(image.image_id)
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
        """Make a bundle's directories, nobody else having it; see BundleShelf.reserve for what it raises."""
        return self.with_room(lambda: self._bundles.reserve(bundle_path))

    def bundles(self) -> tuple[StoredBundle, ...]:
        """The bundles that are ready, and whether each is mounted now."""
        mounted = self._mounts.mounted()
        with self._lock:
            ready = sorted(self._bundles.ready.values(), key=lambda bundle: bundle.bundle_path)
        return tuple(
            dataclasses.replace(bundle, mounted=bundle.path.real_rootfs in mounted) for bundle in ready
        )

    def release_bundle(self, bundle_path: str) -> Deleted:
        """Unmount a bundle, delete what was written in it, and the layers of images that were removed before.

        Raises:
            BundleNotFound: it is no bundle of ours.
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
        """The bundles that others may have taken away: their rootfs is not a directory any more."""
        return self._bundles.abandoned()

    def release_abandoned_bundle(self, bundle: StoredBundle) -> Deleted | None:
        """Release a bundle whose rootfs is neither mounted anywhere on the machine nor a directory any more.

        The layers of images that were removed before are deleted. The directories outside of the work directory
        are left alone. Returns None, and does nothing, if the bundle is not abandoned.

        Raises:
            WorkDirReplaced: others have replaced the work directory.
            StorageFailed: the operating system refuses.
        """
        return self._forget(bundle) if self._bundles.release_abandoned(bundle) else None

    def _forget(self, bundle: StoredBundle) -> Deleted:
        """Forget a bundle that was released, and delete its layers that nobody uses any more."""
        with self._lock:
            self._bundles.released(bundle)
            self._layers.let_go(bundle.layers)
            deletion = self._layers.drop(self._unused(bundle.layers))
        return self._layers.finish(deletion)

    # -- both -----------------------------------------------------------------------------------------------

    def usage(self) -> StoreUsage:
        """Who uses what now."""
        images_of_layer: dict[Digest, dict[Digest, None]] = {}
        bundles_of_image: dict[Digest, list[str]] = {}
        bundles_of_layer: Counter[Digest] = Counter()
        with self._lock:
            for images in (self._ledger.catalog.images, *(store.images for store in self._read_only)):
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
        """Write meta_store.json, if it is not as it should be.

        Raises:
            StorageFull: the file system has no room; the file is as it was, and the next flush tries again.
            StorageFailed: the operating system refuses; likewise.
        """
        with self._lock:
            self._ledger.flush()

    def _is_kept(self, digest: Digest) -> bool:
        layer = self._ledger.catalog.layers.get(digest)
        return layer is not None and self._layers.is_kept(layer)

    def _unused(self, digests: Iterable[Digest], but_by: Digest | None = None) -> list[Digest]:
        """Those of some layers that no pull, bundle or image uses, but for one image."""
        used = set(self._layers.pinned)
        for bundle in self._bundles.ready.values():
            used.update(bundle.layers)
        for record in self._ledger.catalog.images.values():
            if record.image_id != but_by:
                used.update(layer.compressed_digest for layer in record.layers)
        return [digest for digest in dict.fromkeys(digests) if digest not in used]
