"""The store: what this work directory, and the read-only stores beside it, have of images and layers.

One process owns a work directory, and one `Store` its state; its lock guards that state and the files that hold
it. What takes long, syncing a layer and deleting one, is done outside of the lock, on directories that nobody
else knows.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import msgspec

from guestpull_server.errors import (
    AmbiguousImage,
    BundleNotFound,
    ImageInUse,
    ImageNotPresent,
    InvalidDigest,
    ReadOnlyImage,
    StorageFull,
    storage_errors,
)
from guestpull_server.models import (
    Digest,
    ImageConfig,
    Platform,
    ResolvedImage,
    StoredImage,
    StoredLayer,
    UnpackedLayer,
)
from guestpull_server.store import catalog as catalogs
from guestpull_server.store.bundles import BundleReservation, BundleShelf, Mounts, StoredBundle
from guestpull_server.store.catalog import Catalog, ImageRecord, Unreadable
from guestpull_server.store.deletion import Deletion
from guestpull_server.store.durability import Durability
from guestpull_server.store.facts import FactsFile, LayerFacts, read_facts, with_facts
from guestpull_server.store.readonly import ReadOnlyStore
from guestpull_server.store.workdir import StagedLayer, WorkDir

_SHORTEST_ID = 12


class LayerNames(Enum):
    """How directories in layers/ are named: by digest, or by a running number as image-rs of 2025 on does."""

    DIGEST = "digest"
    INDEX = "index"


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Who uses what, at one moment."""

    bundles_of_image: Mapping[Digest, tuple[str, ...]]
    images_of_layer: Mapping[Digest, tuple[Digest, ...]]
    bundles_of_layer: Mapping[Digest, int]


@dataclass(frozen=True, slots=True)
class Deleted:
    """Layers that went because nobody used them any more, and the bytes of files that went with them."""

    layers: tuple[Digest, ...] = ()
    freed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Removal:
    """What RemoveImage did: images and names that were forgotten, and what was deleted with them."""

    image_ids: tuple[Digest, ...]
    references: tuple[str, ...]
    deleted_layers: tuple[Digest, ...]
    freed_bytes: int


class Store:
    """The state of one work directory. Thread-safe. Make it by `open`.

    `warnings` are sentences on what was found when taking stock; `damaged` tells whether meta_store.json was.
    """

    def __init__(
        self,
        work_dir: WorkDir,
        mounts: Mounts,
        guest_work_dir: str | None,
        read_only: Sequence[ReadOnlyStore],
        bundle_roots: Sequence[str],
        layer_names: LayerNames,
    ) -> None:
        self._work_dir = work_dir
        self._guest_work_dir = os.path.normpath(guest_work_dir or work_dir.path)
        self._mounts = mounts
        self._read_only = read_only
        self._layer_names = layer_names
        self._lock = threading.RLock()
        self._durability = Durability(work_dir.path)
        self._shelf = BundleShelf(work_dir, self._durability, mounts, bundle_roots, self._lock)
        self._facts_file = FactsFile(work_dir.path, self._durability)
        self._facts: dict[Digest, LayerFacts] = {}
        self._foreign_facts: dict[str, dict[Digest, LayerFacts]] = {}
        self._catalog = Catalog()
        self._dirty = False
        self._pins: Counter[Digest] = Counter()
        self._by_manifest: dict[Digest, Digest] = {}
        self._by_reference: dict[str, list[Digest]] = {}
        self.warnings: list[str] = []
        self.damaged = False

    @classmethod
    def open(
        cls,
        work_dir: str,
        mounts: Mounts,
        *,
        guest_work_dir: str | None = None,
        additional_stores: Sequence[str] = (),
        bundle_roots: Sequence[str] = (),
        layer_names: LayerNames = LayerNames.DIGEST,
    ) -> Store:
        """Take a work directory over, and take stock of it.

        Args:
            work_dir: where it is; made if it is not there.
            mounts: how to ask for mounts, and undo them.
            guest_work_dir: where the guest will see it, if that is elsewhere: store_paths are written so.
            additional_stores: work directories that are only read.
            bundle_roots: directories that bundles must be in; none: any directory will do.
            layer_names: how new layers' directories are named.

        Raises:
            WorkDirInUse: another process owns it.
            InvalidStore: an additional store cannot be read.
            StorageFailed: the operating system refuses.
        """
        read_only = [ReadOnlyStore(path) for path in additional_stores]
        store = cls(WorkDir(work_dir), mounts, guest_work_dir, read_only, bundle_roots, layer_names)
        try:
            store._take_stock()
        except BaseException:
            store._work_dir.close()
            raise
        return store

    def close(self, *, tidy: bool = False) -> None:
        """Give the work directory back; `tidy` leaves nothing in it but images and layers."""
        with self._lock:
            self.flush()
            if tidy:
                self._facts_file.rewrite(self._facts)
                self._work_dir.tidy()
            self._work_dir.close()

    @property
    def work_dir(self) -> str:
        """The work directory."""
        return self._work_dir.path

    # -- taking stock ---------------------------------------------------------------------------------------

    def _take_stock(self) -> None:
        self._work_dir.empty_staging()
        self._facts, useless = read_facts(self._work_dir.path)
        self._read_catalog()
        self.warnings += [f"{self._catalog_path}: {one}" for one in self._catalog.unusable]
        self._take_layers_in()
        self.warnings += self._shelf.take_stock()
        self._index()
        if useless > len(self._facts):
            self._facts_file.rewrite(self._facts)
        self.flush()

    @property
    def _catalog_path(self) -> str:
        return os.path.join(self._work_dir.path, catalogs.FILE_NAME)

    def _read_catalog(self) -> None:
        """Read meta_store.json; a damaged one is set aside under another name, never lost."""
        path = self._catalog_path
        with storage_errors("reading the meta store", path):
            try:
                with open(path, "rb") as file:
                    content = file.read()
            except FileNotFoundError:
                return
            try:
                self._catalog = Catalog.decode(content)
            except Unreadable as error:
                aside = f"{path}.corrupt-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
                os.rename(path, aside)
                self._durability.sync_names(self._work_dir.path)
                self._dirty = True
                self.damaged = True
                self.warnings.append(
                    f"{path} was damaged ({error}) and is now {aside}; "
                    "the layers that are certain were taken in again, images must be pulled again"
                )

    def _take_layers_in(self) -> None:
        """Believe the layers that were committed just before a crash, or whose entry was lost."""
        with storage_errors("taking stock of layers", self._work_dir.layers):
            present = set(os.listdir(self._work_dir.layers))
        for digest, facts in list(self._facts.items()):
            if facts.directory not in present or "/" in facts.directory:
                del self._facts[digest]
            elif digest not in self._catalog.layers:
                self._catalog.put_layer(facts.layer(self._guest_path(facts.directory)))
                self._dirty = True
        for digest, layer in list(self._catalog.layers.items()):
            self._catalog.layers[digest] = with_facts(layer, self._facts_of(layer))

    def _facts_of(self, layer: StoredLayer) -> LayerFacts | None:
        """What is known of a layer: here, or beside the foreign store that it lies in."""
        known = self._facts.get(layer.compressed_digest)
        if known is not None:
            return known
        path = self._local_path(layer)
        foreign = os.path.dirname(os.path.dirname(path))
        if foreign == self._work_dir.path:
            return None
        if foreign not in self._foreign_facts:
            self._foreign_facts[foreign] = read_facts(foreign)[0]
        found = self._foreign_facts[foreign].get(layer.compressed_digest)
        return found if found is not None and found.directory == os.path.basename(path) else None

    # -- paths ----------------------------------------------------------------------------------------------

    def _guest_path(self, directory: str) -> str:
        return os.path.join(self._guest_work_dir, "layers", directory)

    def _local_path(self, layer: StoredLayer) -> str:
        """Where a layer is on this machine: paths within the guest's work directory are in ours."""
        inside = f"{self._guest_work_dir}/"
        path = os.path.normpath(layer.store_path)
        if path.startswith(inside):
            return os.path.join(self._work_dir.path, path.removeprefix(inside))
        return path

    def _is_ours(self, layer: StoredLayer) -> bool:
        return os.path.dirname(self._local_path(layer)) == self._work_dir.layers

    def _localised(self, layer: StoredLayer) -> StoredLayer:
        path = self._local_path(layer)
        return layer if path == layer.store_path else dataclasses.replace(layer, store_path=path)

    # -- layers ---------------------------------------------------------------------------------------------

    def layer(self, digest: Digest) -> StoredLayer | None:
        """A layer that can be mounted: it has an entry, here or in a read-only store, and its directory."""
        found = self._catalog.layers.get(digest)
        if found is not None and os.path.isdir(self._local_path(found)):
            return self._localised(found)
        for store in self._read_only:
            found = store.layers.get(digest)
            if found is not None and os.path.isdir(found.store_path):
                return found
        return None

    def layers(self) -> tuple[StoredLayer, ...]:
        """All layers that have an entry, those of this work directory first; each digest once."""
        with self._lock:
            ours = dict(self._catalog.layers)
        for store in self._read_only:
            for digest, layer in store.layers.items():
                ours.setdefault(digest, layer)
        return tuple(self._localised(layer) for layer in ours.values())

    def is_present(self, layer: StoredLayer) -> bool:
        """Whether its directory is there."""
        return os.path.isdir(self._local_path(layer))

    def is_read_only(self, layer: StoredLayer) -> bool:
        """Whether it lies outside of this work directory, where nothing is written or deleted."""
        return not self._is_ours(layer)

    def stage(self, digest: Digest) -> StagedLayer:
        """A place to unpack a layer to.

        Raises:
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        return StagedLayer(self._work_dir, digest)

    def commit_layer(self, staged: StagedLayer, digest: Digest, unpacked: UnpackedLayer) -> StoredLayer:
        """Make a staged layer part of the store; readers, and the next start, see all of it or nothing.

        Repeating it for a layer that is there already is harmless: the staged copy is dropped. The order of the
        steps is in durability.py.

        Raises:
            StorageFull: the file system has no room; the store is as it was.
            StorageFailed: the operating system refuses; the store is as it was.
        """
        with storage_errors(f"committing layer {digest}", self._work_dir.path):
            self._durability.sync_tree(staged.directory)
            with self._lock:
                present = self.layer(digest)
                if present is not None and present.uncompressed_digest == unpacked.diff_id:
                    return present
                name = self._new_name(digest)
                directory = os.path.join(self._work_dir.layers, name)
                facts = LayerFacts.of(digest, name, unpacked)
                self._facts_file.add(facts)
                if os.path.lexists(directory):  # without an entry, or with a wrong one
                    self._work_dir.discard(directory)
                if os.path.exists(staged.record_path):
                    os.rename(staged.record_path, self._record_path(name))
                    self._durability.sync_names(self._work_dir.records)
                os.rename(staged.directory, directory)
                self._durability.sync_names(self._work_dir.layers)
                layer = facts.layer(self._guest_path(name))
                self._facts[digest] = facts
                self._catalog.put_layer(layer)
                self._dirty = True
                return self._localised(layer)

    def _new_name(self, digest: Digest) -> str:
        match self._layer_names:
            case LayerNames.DIGEST:
                return digest.directory_name
            case LayerNames.INDEX:
                numbers = [int(name) for name in os.listdir(self._work_dir.layers) if name.isdecimal()]
                return str(max(numbers, default=-1) + 1)

    def _record_path(self, directory_name: str) -> str:
        return os.path.join(self._work_dir.records, directory_name)

    def record_of(self, layer: StoredLayer) -> str | None:
        """The record of a layer's tar, if there is one: beside the store that the layer lies in."""
        path = self._local_path(layer)
        record = os.path.join(os.path.dirname(os.path.dirname(path)), "records", os.path.basename(path))
        return record if os.path.isfile(record) else None

    @contextmanager
    def pin(self, digests: Iterable[Digest]) -> Iterator[None]:
        """Keep layers from being deleted, those too that are yet to come."""
        pinned = tuple(digests)
        with self._lock:
            self._pins.update(pinned)
        try:
            yield
        finally:
            with self._lock:
                self._pins.subtract(pinned)
                self._pins = +self._pins

    # -- images ---------------------------------------------------------------------------------------------

    def images(self) -> tuple[StoredImage, ...]:
        """All images, those of this work directory first; each id once."""
        with self._lock:
            ours = {record.image_id: self._stored(record) for record in self._catalog.images.values()}
        for store in self._read_only:
            for image_id, record in store.images.items():
                ours.setdefault(image_id, self._stored(record, store.work_dir))
        return tuple(ours.values())

    def image_for(self, reference: str, platform: Platform) -> StoredImage | None:
        """The image that has a name, in its normalised form, and fits a platform."""
        with self._lock:
            candidates = [
                self._stored(self._catalog.images[image_id])
                for image_id in self._by_reference.get(reference, ())
            ]
        for store in self._read_only:
            candidates += [
                self._stored(record, store.work_dir)
                for record in store.images.values()
                if reference in record.references
            ]
        return next((image for image in candidates if _fits(image.config, platform)), None)

    def image_by_manifest(self, digest: Digest) -> StoredImage | None:
        """The image that has a manifest."""
        with self._lock:
            image_id = self._by_manifest.get(digest)
            if image_id is not None:
                return self._stored(self._catalog.images[image_id])
        for store in self._read_only:
            for record in store.images.values():
                if record.manifest_digest == digest:
                    return self._stored(record, store.work_dir)
        return None

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
        images = self.images()
        for image in images:
            if text in (image.image_id, image.image_id.hex, image.manifest_digest) or (
                normalised is not None and normalised in image.references
            ):
                return image
        shortened = text.removeprefix("sha256:")
        if len(shortened) >= _SHORTEST_ID and not shortened.strip("0123456789abcdef"):
            matches = [image for image in images if image.image_id.hex.startswith(shortened)]
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise AmbiguousImage(text, len(matches))
        raise ImageNotPresent(text)

    def record_image(self, resolved: ResolvedImage, layers: Sequence[StoredLayer]) -> StoredImage:
        """Make an image part of the store, under its reference; writes nothing where nothing changes.

        A tag that another image of the same platform had is taken from it, as everywhere; if that was its last
        name, its repository and digest are what is left.

        Raises:
            StorageFull: the file system has no room; meta_store.json is as it was.
            StorageFailed: the operating system refuses; likewise.
        """
        with self._lock:
            record = self._catalog.images.get(resolved.image_id)
            names = record.references if record is not None else ()
            unchanged = (
                record is not None
                and resolved.reference in names
                and record.manifest_digest == resolved.manifest_digest
                and [layer.compressed_digest for layer in record.layers]
                == [layer.compressed_digest for layer in layers]
            )
            if not unchanged:
                self._change(lambda: self._put_image(resolved, names, layers))
            return self._stored(self._catalog.images[resolved.image_id])

    def _put_image(
        self, resolved: ResolvedImage, names: tuple[str, ...], layers: Sequence[StoredLayer]
    ) -> None:
        self._take_name_away(resolved)
        references = tuple(dict.fromkeys([*names, resolved.reference] if resolved.reference else names))
        entries = tuple(self._entry_of(layer) for layer in layers)
        self._catalog.put_image(resolved, references, entries)

    def _change(self, change: Callable[[], object]) -> None:
        """Change the catalog, in memory and on disk or, if that fails, in neither."""
        try:
            with self._catalog.all_or_nothing():
                change()
                self._dirty = True
                self.flush()
        finally:
            self._index()

    def _entry_of(self, layer: StoredLayer) -> StoredLayer:
        """A layer as layer_db has it; one of a read-only store gets an entry that leads there."""
        entry = self._catalog.layers.get(layer.compressed_digest)
        if entry is None or self._local_path(entry) != layer.store_path:
            entry = layer
            self._catalog.put_layer(layer)
        return entry

    def _take_name_away(self, resolved: ResolvedImage) -> None:
        platform = msgspec.json.decode(resolved.config, type=ImageConfig).platform
        for image_id in tuple(self._by_reference.get(resolved.reference, ())):
            record = self._catalog.images[image_id]
            if image_id == resolved.image_id or not _fits(record.config, platform):
                continue
            left = tuple(name for name in record.references if name != resolved.reference)
            if not left:
                left = (f"{_repository(resolved.reference)}@{record.manifest_digest}",)
            self._catalog.rename_image(image_id, left)

    def remove_image(self, image: StoredImage, reference: str | None, force: bool) -> Removal:
        """Forget an image, or one of its names, and delete the layers that nobody uses any more.

        Args:
            image: as `find_image` gave it.
            reference: the name that it was meant by; None: it was meant by its id.
            force: forget it although bundles use it.

        Raises:
            ReadOnlyImage: it lies in a read-only store.
            ImageInUse: bundles use it.
            ImageNotPresent: it has gone meanwhile.
            StorageFull: the file system has no room.
            StorageFailed: the operating system refuses.
        """
        if image.read_only_store:
            raise ReadOnlyImage(reference or image.image_id, image.read_only_store)
        with self._lock:
            record = self._catalog.images.get(image.image_id)
            if record is None:
                raise ImageNotPresent(reference or image.image_id)
            left = tuple(name for name in record.references if name != reference)
            if reference is not None and any("@" not in name for name in left):
                self._change(lambda: self._catalog.rename_image(record.image_id, left))
                return Removal((), (reference,), (), 0)
            bundles = tuple(
                bundle.bundle_path
                for bundle in self._shelf.ready.values()
                if bundle.image_id == image.image_id
            )
            if bundles and not force:
                raise ImageInUse(reference or image.image_id, bundles)
            digests = [layer.compressed_digest for layer in record.layers]
            deletion = self._forget(digests, image.image_id)
        return Removal((image.image_id,), record.references, deletion.layers, deletion.delete())

    def _forget(self, digests: Iterable[Digest], image_id: Digest | None = None) -> Deletion:
        """Drop an image, and those of some layers that nobody else uses; returns what is to be deleted."""
        used = self._used_layers(except_by=image_id)
        unused = [
            self._catalog.layers[digest]
            for digest in dict.fromkeys(digests)
            if digest not in used and digest in self._catalog.layers
        ]

        def drop() -> None:
            if image_id is not None:
                self._catalog.drop_image(image_id)
            for layer in unused:
                self._catalog.drop_layer(layer.compressed_digest)

        deletion = Deletion(self._work_dir, tuple(layer for layer in unused if self._is_ours(layer)))
        if image_id is not None or unused:
            try:
                self._change(drop)
            except StorageFull:
                # a full disk takes no new meta_store.json: make room first. Should the power go now, entries
                # lead to directories that are gone, which the next pull of that image puts right
                deletion.set_aside(self._local_path)
                deletion.delete()
                self._change(drop)
        deletion.set_aside(self._local_path)
        for layer in unused:
            self._facts.pop(layer.compressed_digest, None)
        return deletion

    def _used_layers(self, except_by: Digest | None) -> set[Digest]:
        used = set(self._pins)
        for record in self._catalog.images.values():
            if record.image_id != except_by:
                used.update(layer.compressed_digest for layer in record.layers)
        for bundle in self._shelf.ready.values():
            used.update(bundle.layers)
        return used

    # -- bundles --------------------------------------------------------------------------------------------

    def reserve_bundle(self, bundle_path: str) -> BundleReservation:
        """Make a bundle's directories, nobody else having it; see BundleShelf.reserve for what it raises."""
        return self._shelf.reserve(bundle_path)

    def bundles(self) -> tuple[StoredBundle, ...]:
        """The bundles that are ready, and whether each is mounted now."""
        mounted = self._mounts.mounted()
        with self._lock:
            ready = sorted(self._shelf.ready.values(), key=lambda bundle: bundle.bundle_path)
        return tuple(dataclasses.replace(bundle, mounted=bundle.rootfs in mounted) for bundle in ready)

    def release_bundle(self, bundle_path: str) -> Deleted:
        """Unmount a bundle, delete what was written in it, and the layers that only it still used.

        Raises:
            BundleNotFound: it is no bundle of ours.
            BundleBusy: something uses its rootfs; it stays a bundle.
            StorageFailed: the operating system refuses.
        """
        path = "/" + os.path.normpath(bundle_path).lstrip("/")
        with self._lock:
            bundle = self._shelf.ready.get(path) if bundle_path.startswith("/") else None
            if bundle is None:
                raise BundleNotFound(bundle_path)
            self._shelf.undo(bundle)
            deletion = self._forget(bundle.layers)
        return Deleted(deletion.layers, deletion.delete())

    # -- both -----------------------------------------------------------------------------------------------

    def usage(self) -> StoreUsage:
        """Who uses what now."""
        images_of_layer: dict[Digest, dict[Digest, None]] = {}
        bundles_of_image: dict[Digest, list[str]] = {}
        bundles_of_layer: Counter[Digest] = Counter()
        with self._lock:
            for images in (self._catalog.images, *(store.images for store in self._read_only)):
                for record in images.values():
                    for layer in record.layers:
                        images_of_layer.setdefault(layer.compressed_digest, {})[record.image_id] = None
            for bundle in self._shelf.ready.values():
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
            if self._dirty:
                with storage_errors("writing the meta store", self._catalog_path):
                    self._durability.replace(self._catalog_path, self._catalog.encode(), mode=0o644)
                self._dirty = False

    def _stored(self, record: ImageRecord, read_only_store: str = "") -> StoredImage:
        """An image with its layers as they are known now."""
        layers = tuple(
            self._localised(self._catalog.layers.get(layer.compressed_digest, layer))
            if not read_only_store
            else layer
            for layer in record.layers
        )
        return StoredImage(
            record.image_id, record.manifest_digest, record.references, record.config, layers, read_only_store
        )

    def _index(self) -> None:
        """Make the ways to find images anew; 1 ms for 2,000 of them."""
        by_manifest: dict[Digest, Digest] = {}
        by_reference: dict[str, list[Digest]] = {}
        for record in self._catalog.images.values():
            by_manifest[record.manifest_digest] = record.image_id
            for reference in record.references:
                by_reference.setdefault(reference, []).append(record.image_id)
        self._by_manifest, self._by_reference = by_manifest, by_reference


def _fits(config: bytes, platform: Platform) -> bool:
    """Whether an image is for a platform; a variant that one side leaves open fits any."""
    try:
        built_for = msgspec.json.decode(config, type=ImageConfig).platform
    except (msgspec.DecodeError, InvalidDigest):
        return False
    return (
        built_for.os == platform.os
        and built_for.architecture in ("", platform.architecture)
        and (not built_for.variant or not platform.variant or built_for.variant == platform.variant)
    )


def _repository(reference: str) -> str:
    """A reference without tag and digest."""
    name = reference.partition("@")[0]
    head, slash, last = name.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}"
