"""The images of a store: find, record, name and repair them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Sequence
from functools import partial

from guestpull_server.errors import ImageChanged, InvalidManifest
from guestpull_server.models import Digest, ResolvedImage, StoredImage, StoredLayer, platform_of
from guestpull_server.platforms import Platform
from guestpull_server.store.entries import ImageRecord, Unreadable
from guestpull_server.store.image_backups import backups_except, has_backup, manifest_for_pin, prove_image
from guestpull_server.store.image_names import best_fit, find, is_same, repository
from guestpull_server.store.layer_paths import LayerPaths
from guestpull_server.store.metadata_db import MetadataDb
from guestpull_server.store.read_only import ReadOnlyStore


class ImageRepository:
    """The images of one work directory, and of its read-only stores. Thread-safe.

    Args:
        work_dir: the work directory.
        db: the state on disk; guarded by `lock`.
        paths: where layers are.
        read_only: other stores.
        lock: the store's lock.
    """

    def __init__(
        self,
        work_dir: str,
        db: MetadataDb,
        paths: LayerPaths,
        read_only: Sequence[ReadOnlyStore],
        lock: threading.RLock,
    ) -> None:
        self._work_dir = work_dir
        self._db = db
        self._paths = paths
        self._read_only = read_only
        self._lock = lock

    def all(self) -> tuple[StoredImage, ...]:
        """Return all images, our own first; an image of several stores once for each set of names."""
        with self._lock:
            images = [self._stored(record) for record in self._db.meta_store.images.values()]
        listed = {image.image_id: set(image.references) for image in images}
        for store in self._read_only:
            for image_id, record in store.images.items():
                names = tuple(name for name in record.references if name not in listed.get(image_id, ()))
                if names or image_id not in listed:
                    images.append(_read_only_image(dataclasses.replace(record, references=names), store))
                    listed.setdefault(image_id, set()).update(names)
        return tuple(images)

    def named(self, reference: str, platform: Platform) -> StoredImage | None:
        """Return the image that has a name and fits a platform best, or None."""
        with self._lock:
            found = [self._stored(record) for record in self._db.names.named(reference)]
        for store in self._read_only:
            found += [_read_only_image(record, store) for record in store.names.named(reference)]
        return best_fit(found, platform)

    def with_manifest(self, digest: Digest) -> StoredImage | None:
        """Return the image that has a manifest, or None."""
        with self._lock:
            record = self._db.names.with_manifest(digest)
            if record is not None:
                return self._stored(record)
        for store in self._read_only:
            record = store.names.with_manifest(digest)
            if record is not None:
                return _read_only_image(record, store)
        return None

    def manifest_for_pin(self, image: StoredImage, pin: Digest) -> Digest | None:
        """Return the manifest of the image that the digest in a reference leads to, or None."""
        return manifest_for_pin(image.read_only_store or self._work_dir, pin, image.manifest_digests)

    def proved_config(self, image: StoredImage, *, ours: bool) -> bytes:
        """Return the image config, checked against the image id; unchecked if no layer is `ours`."""
        store = image.read_only_store or self._work_dir
        proved = prove_image(store, image.image_id, image.config)
        if proved is None:
            if ours:
                raise ImageChanged(image.image_id, store, "its config does not match the image id")
            return image.config
        if list(proved.diff_ids) != [layer.uncompressed_digest for layer in image.layers]:
            raise ImageChanged(image.image_id, store, "its layers are not those in its config")
        if proved.backup is not None and proved.backup.manifest_digests != image.manifest_digests:
            raise ImageChanged(image.image_id, store, "its backup has another manifest digest")
        return proved.config

    def find(self, text: str, normalised: str | None) -> StoredImage:
        """Return the image that a text identifies, or raise."""
        with self._lock:
            names = [self._db.names, *(store.names for store in self._read_only)]
            record, number = find(names, text, normalised)
            if number == 0:
                return self._stored(record)
        return _read_only_image(record, self._read_only[number - 1])

    def record(self, resolved: ResolvedImage, layers: Sequence[StoredLayer]) -> StoredImage:
        """Write the record of an image, unless nothing changes or a read-only store has it."""
        with self._lock:
            record = self._db.meta_store.images.get(resolved.image_id)
            resolved = dataclasses.replace(resolved, reference=_name_to_record(resolved, record))
            if record is None:
                for store in self._read_only:
                    covered = store.covers(resolved.image_id, resolved.manifest_digest, resolved.reference)
                    if covered is not None:
                        return _read_only_image(covered, store)
            self._keep_index(resolved)
            put = self._updated(resolved, layers, record)
            if put is record:
                self._db.flush()
            else:
                self._db.change(lambda: self._put_image(put, resolved.reference))
            return self._stored(self._db.meta_store.images[resolved.image_id])

    def _updated(
        self, resolved: ResolvedImage, layers: Sequence[StoredLayer], record: ImageRecord | None
    ) -> ImageRecord:
        """Return the record to write for an image; the same object if the existing record needs no change."""
        known = record or ImageRecord(resolved.image_id, resolved.manifest_digest, (), b"", ())
        is_same_form = resolved.manifest_digest in known.manifest_digests and [
            layer.compressed_digest for layer in known.layers
        ] == [layer.compressed_digest for layer in layers]
        if (
            is_same_form
            and (not resolved.reference or resolved.reference in known.references)
            and known.config == resolved.config.strip()  # another program may have reformatted it
            and all(self._has_entry(layer) for layer in layers)
        ):
            return known
        names = dict.fromkeys(name for name in (*known.references, resolved.reference) if name)
        # tags first: people know an image by its tags
        references = tuple(sorted(names, key=lambda name: "@" in name))
        digest = known.manifest_digest if is_same_form else resolved.manifest_digest
        others = {resolved.manifest_digest, *known.manifest_digests} - {digest}
        return ImageRecord(
            resolved.image_id,
            digest,
            references,
            resolved.config,
            tuple(layers),
            other_digests=self._with_names(others, references),
            signed=known.signed,
        )

    def _with_names(self, digests: Iterable[Digest], references: Iterable[str]) -> tuple[Digest, ...]:
        """Return the manifests that have a name among the references."""
        pins = [Digest(pin) for name in references if (pin := name.partition("@")[2])]
        return tuple(
            digest
            for digest in sorted(digests)
            if any(manifest_for_pin(self._work_dir, pin, [digest]) for pin in pins)
        )

    def _keep_index(self, resolved: ResolvedImage) -> None:
        """Keep the index that proves that the digest in a reference leads to the image."""
        pin = resolved.reference.partition("@")[2]
        if resolved.index and pin and Digest(pin).matches(resolved.index):
            self._db.keep_index(Digest(pin), resolved.index)

    def _put_image(self, record: ImageRecord, reference: str) -> None:
        self._take_name_away(record, reference)
        for layer in record.layers:
            if not self._has_entry(layer):  # a layer of a read-only store gets an entry that points there
                self._db.meta_store.put_layers(layer)
        entries = tuple(self._db.meta_store.layers[layer.compressed_digest] for layer in record.layers)
        try:
            self._db.meta_store.put_image(dataclasses.replace(record, layers=entries))
        except Unreadable as error:
            raise InvalidManifest(reference or record.image_id, record.image_id, str(error)) from None

    def rename(self, image_id: Digest, references: tuple[str, ...]) -> None:
        """Change the names of an image.

        Raises:
            StorageFull: the file system has no room; meta_store.json is unchanged.
            StorageFailed: the operating system refuses; likewise.
        """
        self._db.change(lambda: self._db.meta_store.rename_image(image_id, references), frees=True)

    def repair(self) -> tuple[Digest, ...]:
        """Correct each image record or backup by the other, where that is proved; return the images."""
        repaired: list[Digest] = []
        with self._lock:
            meta_store = self._db.meta_store
            for record in list(meta_store.images.values()):
                proved = prove_image(self._work_dir, record.image_id, record.config)
                if proved is None:
                    continue
                correct = proved.corrected(record)
                if correct != record:
                    self._db.change(partial(meta_store.put_image, correct))
                elif proved.backup is None and has_backup(self._work_dir, record.image_id):
                    self._db.change(partial(meta_store.touched.add, record.image_id))
                else:
                    continue
                repaired.append(record.image_id)
            for record, entry in backups_except(self._work_dir, meta_store.images):
                if meta_store.image_entry(record.image_id) is not None:  # an entry that cannot be used
                    self._db.change(partial(meta_store.restore_image, record, entry))
                    repaired.append(record.image_id)
        return tuple(repaired)

    def sort_names(self) -> None:
        """Sort the names of each image, so that they do not depend on the order of pulls.

        Raises:
            StorageFull: the file system has no room; meta_store.json is unchanged.
            StorageFailed: the operating system refuses; likewise.
        """
        for record in list(self._db.meta_store.images.values()):
            references = tuple(sorted(record.references, key=lambda name: ("@" in name, name)))
            if references != record.references:
                self.rename(record.image_id, references)

    def keep(self, image: StoredImage) -> None:
        """Record an image again if it was removed while a bundle of it was being made; under the lock."""
        if image.read_only_store or image.image_id in self._db.meta_store.images:
            return
        record = ImageRecord(
            image.image_id,
            image.manifest_digest,
            image.references,
            image.config,
            image.layers,
            other_digests=image.other_digests,
            signed=image.signed,
        )
        self._db.change(lambda: self._put_image(record, "".join(image.references[:1])))

    def _has_entry(self, layer: StoredLayer) -> bool:
        entry = self._db.meta_store.layers.get(layer.compressed_digest)
        return entry is not None and self._paths.local(entry) == layer.store_path

    def _take_name_away(self, image: ImageRecord, reference: str) -> None:
        platform = platform_of(image.config)
        for record in self._db.names.named(reference):
            if record.image_id == image.image_id or not is_same(platform_of(record.config), platform):
                continue
            left = tuple(name for name in record.references if name != reference)
            if not left:
                left = (f"{repository(reference)}@{record.manifest_digest}",)
            self._db.meta_store.rename_image(record.image_id, left)

    def _stored(self, record: ImageRecord) -> StoredImage:
        """Return an image with the current entries of its layers."""
        return StoredImage(
            record.image_id,
            record.manifest_digest,
            record.references,
            record.config,
            tuple(self._paths.localised(self._known(layer)) for layer in record.layers),
            other_digests=record.other_digests,
            signed=record.signed,
        )

    def _known(self, layer: StoredLayer) -> StoredLayer:
        known = self._db.meta_store.layers.get(layer.compressed_digest, layer)
        return known if known.uncompressed_digest == layer.uncompressed_digest else layer


def _name_to_record(resolved: ResolvedImage, record: ImageRecord | None) -> str:
    """Return the reference of an image, or "" if nobody has confirmed that its repository has the image."""
    known = () if record is None else record.references
    if resolved.is_confirmed or repository(resolved.reference) in map(repository, known):
        return resolved.reference
    return ""


def _read_only_image(record: ImageRecord, store: ReadOnlyStore) -> StoredImage:
    return StoredImage(
        record.image_id,
        record.manifest_digest,
        record.references,
        record.config,
        record.layers,
        store.work_dir,
        record.other_digests,
        record.signed,
    )
