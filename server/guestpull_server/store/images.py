"""The images of a store: how they are found, recorded, and named."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Sequence
from functools import partial

from guestpull_server.errors import ImageChanged, InvalidManifest
from guestpull_server.models import Digest, ResolvedImage, StoredImage, StoredLayer, platform_of
from guestpull_server.platforms import Platform
from guestpull_server.store.copies import copies_of_others, has_copy, led_to, prove_image
from guestpull_server.store.entries import ImageRecord, Unreadable
from guestpull_server.store.ledger import Ledger
from guestpull_server.store.names import best_fit, find, is_same, repository
from guestpull_server.store.paths import LayerPaths
from guestpull_server.store.readonly import ReadOnlyStore


class ImageShelf:
    """The images of one work directory, and of the read-only stores beside it. Thread-safe.

    Args:
        work_dir: the work directory.
        ledger: what is written down of them; guarded by `lock`.
        paths: where layers are, for the guest and here.
        read_only: other stores.
        lock: the store's.
    """

    def __init__(
        self,
        work_dir: str,
        ledger: Ledger,
        paths: LayerPaths,
        read_only: Sequence[ReadOnlyStore],
        lock: threading.RLock,
    ) -> None:
        self._work_dir = work_dir
        self._ledger = ledger
        self._paths = paths
        self._read_only = read_only
        self._lock = lock

    def all(self) -> tuple[StoredImage, ...]:
        """See Store.images."""
        with self._lock:
            images = [self._stored(record) for record in self._ledger.catalog.images.values()]
        told = {image.image_id: set(image.references) for image in images}
        for store in self._read_only:
            for image_id, record in store.images.items():
                names = tuple(name for name in record.references if name not in told.get(image_id, ()))
                if names or image_id not in told:
                    images.append(_read_only_image(dataclasses.replace(record, references=names), store))
                    told.setdefault(image_id, set()).update(names)
        return tuple(images)

    def named(self, reference: str, platform: Platform) -> StoredImage | None:
        """See Store.image_for."""
        with self._lock:
            found = [self._stored(record) for record in self._ledger.names.named(reference)]
        for store in self._read_only:
            found += [_read_only_image(record, store) for record in store.names.named(reference)]
        return best_fit(found, platform)

    def with_manifest(self, digest: Digest) -> StoredImage | None:
        """See Store.image_by_manifest."""
        with self._lock:
            record = self._ledger.names.with_manifest(digest)
            if record is not None:
                return self._stored(record)
        for store in self._read_only:
            record = store.names.with_manifest(digest)
            if record is not None:
                return _read_only_image(record, store)
        return None

    def manifest_for_pin(self, image: StoredImage, pin: Digest) -> Digest | None:
        """See Store.manifest_for_pin."""
        return led_to(image.read_only_store or self._work_dir, pin, image.manifest_digests)

    def proved_config(self, image: StoredImage, *, ours: bool) -> bytes:
        """See Store.proved_config; `ours`: whether we unpacked one of its layers."""
        store = image.read_only_store or self._work_dir
        proved = prove_image(store, image.image_id, image.config)
        if proved is None:
            if ours:
                raise ImageChanged(image.image_id, store, "its config has another digest")
            return image.config
        if list(proved.diff_ids) != [layer.uncompressed_digest for layer in image.layers]:
            raise ImageChanged(image.image_id, store, "its layers are not those that its config names")
        if proved.copy is not None and proved.copy.manifest_digests != image.manifest_digests:
            raise ImageChanged(image.image_id, store, "its copy has another manifest's digest")
        return proved.config

    def find(self, text: str, normalised: str | None) -> StoredImage:
        """See Store.find_image."""
        with self._lock:
            names = [self._ledger.names, *(store.names for store in self._read_only)]
            record, number = find(names, text, normalised)
            if number == 0:
                return self._stored(record)
        return _read_only_image(record, self._read_only[number - 1])

    def record(self, resolved: ResolvedImage, layers: Sequence[StoredLayer]) -> StoredImage:
        """See Store.record_image."""
        with self._lock:
            record = self._ledger.catalog.images.get(resolved.image_id)
            resolved = dataclasses.replace(resolved, reference=_name_to_record(resolved, record))
            if record is None:
                for store in self._read_only:
                    covered = store.covers(resolved.image_id, resolved.manifest_digest, resolved.reference)
                    if covered is not None:
                        return _read_only_image(covered, store)
            self._keep_index(resolved)
            put = self._wanted(resolved, layers, record)
            if put is record:
                self._ledger.flush()
            else:
                self._ledger.change(lambda: self._put_image(put, resolved.reference))
            return self._stored(self._ledger.catalog.images[resolved.image_id])

    def _wanted(
        self, resolved: ResolvedImage, layers: Sequence[StoredLayer], record: ImageRecord | None
    ) -> ImageRecord:
        """What is to be recorded of an image; the very record that there is, where that says all of it."""
        known = record or ImageRecord(resolved.image_id, resolved.manifest_digest, (), b"", ())
        is_same_form = resolved.manifest_digest in known.manifest_digests and [
            layer.compressed_digest for layer in known.layers
        ] == [layer.compressed_digest for layer in layers]
        if (
            is_same_form
            and (not resolved.reference or resolved.reference in known.references)
            and known.config == resolved.config.strip()  # another program may have written it anew
            and all(self._has_entry(layer) for layer in layers)
        ):
            return known
        names = dict.fromkeys(name for name in (*known.references, resolved.reference) if name)
        # tags first: an image is known by what people call it
        references = tuple(sorted(names, key=lambda name: "@" in name))
        digest = known.manifest_digest if is_same_form else resolved.manifest_digest
        others = {resolved.manifest_digest, *known.manifest_digests} - {digest}
        return ImageRecord(
            resolved.image_id,
            digest,
            references,
            resolved.config,
            tuple(layers),
            other_digests=self._named_ones(others, references),
        )

    def _named_ones(self, digests: Iterable[Digest], references: Iterable[str]) -> tuple[Digest, ...]:
        """Those of some manifests that names lead to."""
        pins = [Digest(pin) for name in references if (pin := name.partition("@")[2])]
        return tuple(
            digest for digest in sorted(digests) if any(led_to(self._work_dir, pin, [digest]) for pin in pins)
        )

    def _keep_index(self, resolved: ResolvedImage) -> None:
        """Keep what proves that the digest in a reference leads to the image, where it is not its manifest's."""
        pin = resolved.reference.partition("@")[2]
        if resolved.index and pin and Digest(pin).matches(resolved.index):
            self._ledger.keep_index(Digest(pin), resolved.index)

    def _put_image(self, record: ImageRecord, reference: str) -> None:
        self._take_name_away(record, reference)
        for layer in record.layers:
            if not self._has_entry(layer):  # one of a read-only store gets an entry that leads there
                self._ledger.catalog.put_layers(layer)
        entries = tuple(self._ledger.catalog.layers[layer.compressed_digest] for layer in record.layers)
        try:
            self._ledger.catalog.put_image(dataclasses.replace(record, layers=entries))
        except Unreadable as error:
            raise InvalidManifest(reference or record.image_id, record.image_id, str(error)) from None

    def rename(self, image_id: Digest, references: tuple[str, ...]) -> None:
        """Give an image other names.

        Raises:
            StorageFull: the file system has no room; meta_store.json is as it was.
            StorageFailed: the operating system refuses; likewise.
        """
        self._ledger.change(lambda: self._ledger.catalog.rename_image(image_id, references), frees=True)

    def mend(self) -> tuple[Digest, ...]:
        """See Store.mend_images."""
        mended: list[Digest] = []
        with self._lock:
            catalog = self._ledger.catalog
            for record in list(catalog.images.values()):
                proved = prove_image(self._work_dir, record.image_id, record.config)
                if proved is None:
                    continue
                right = proved.corrected(record)
                if right != record:
                    self._ledger.change(partial(catalog.put_image, right))
                elif proved.copy is None and has_copy(self._work_dir, record.image_id):
                    self._ledger.change(partial(catalog.touched.add, record.image_id))
                else:
                    continue
                mended.append(record.image_id)
            for record, entry in copies_of_others(self._work_dir, catalog.images):
                if catalog.image_entry(record.image_id) is not None:  # which cannot be used
                    self._ledger.change(partial(catalog.take_in, record, entry))
                    mended.append(record.image_id)
        return tuple(mended)

    def sort_names(self) -> None:
        """Have no image's names tell in which order they were given.

        Raises:
            StorageFull: the file system has no room; meta_store.json is as it was.
            StorageFailed: the operating system refuses; likewise.
        """
        for record in list(self._ledger.catalog.images.values()):
            references = tuple(sorted(record.references, key=lambda name: ("@" in name, name)))
            if references != record.references:
                self.rename(record.image_id, references)

    def keep(self, image: StoredImage) -> None:
        """Record an image again that was removed while a bundle of it was being made; under the lock."""
        if image.read_only_store or image.image_id in self._ledger.catalog.images:
            return
        record = ImageRecord(
            image.image_id,
            image.manifest_digest,
            image.references,
            image.config,
            image.layers,
            other_digests=image.other_digests,
        )
        self._ledger.change(lambda: self._put_image(record, "".join(image.references[:1])))

    def _has_entry(self, layer: StoredLayer) -> bool:
        entry = self._ledger.catalog.layers.get(layer.compressed_digest)
        return entry is not None and self._paths.local(entry) == layer.store_path

    def _take_name_away(self, image: ImageRecord, reference: str) -> None:
        platform = platform_of(image.config)
        for record in self._ledger.names.named(reference):
            if record.image_id == image.image_id or not is_same(platform_of(record.config), platform):
                continue
            left = tuple(name for name in record.references if name != reference)
            if not left:
                left = (f"{repository(reference)}@{record.manifest_digest}",)
            self._ledger.catalog.rename_image(record.image_id, left)

    def _stored(self, record: ImageRecord) -> StoredImage:
        """An image with its layers as they are known now."""
        return StoredImage(
            record.image_id,
            record.manifest_digest,
            record.references,
            record.config,
            tuple(self._paths.localised(self._known(layer)) for layer in record.layers),
            other_digests=record.other_digests,
        )

    def _known(self, layer: StoredLayer) -> StoredLayer:
        known = self._ledger.catalog.layers.get(layer.compressed_digest, layer)
        return known if known.uncompressed_digest == layer.uncompressed_digest else layer


def _name_to_record(resolved: ResolvedImage, record: ImageRecord | None) -> str:
    """The reference of an image, or nothing if nobody has confirmed that its repository has the image."""
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
    )
