"""meta_store.json: image-rs's file, read without losing a key and written in a fixed order.

The file is image-rs's `MetaStore` (guest-components, image-rs/src/meta_store.rs and image.rs): `image_db`,
`layer_db` and `snapshot_db`. Programs of other versions write it too. Unknown keys are preserved byte for byte, at
every level. Entries that cannot be used are preserved and ignored. Entries are sorted when they are written, so
that the same content gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from guestpull_server.models import Digest, StoredLayer
from guestpull_server.store.entries import (
    Entry,
    EntryReader,
    ImageRecord,
    Unreadable,
    check_config,
    decode_entry,
    differ,
    digest_fields,
    each_once,
    encode_entry,
    encoded,
    layer_fields,
    metas_fields,
    name_fields,
)
from guestpull_server.store.filesystem import NotAFile, read_file

FILE_NAME: Final = "meta_store.json"
_DATABASES: Final = ("image_db", "layer_db", "snapshot_db")


@dataclasses.dataclass(frozen=True, slots=True)
class UnusableEntry:
    """An entry that is preserved but ignored: its key, and why, as a phrase."""

    key: str
    phrase: str

    def __str__(self) -> str:
        return self.phrase


class MetaStore:
    """The content of the file. Not thread-safe. Its paths are those of the guest.

    Attributes:
        images: the usable image entries.
        layers: the usable layer entries.
        unusable: the entries that are preserved but ignored.
        touched: the images that changed since the last `clear` of this set.
    """

    def __init__(self) -> None:
        self._document: Entry = {}
        self._images: dict[str, msgspec.Raw] = {}
        self._layers: dict[str, msgspec.Raw] = {}
        self.images: dict[Digest, ImageRecord] = {}
        self.layers: dict[Digest, StoredLayer] = {}
        self.unusable: list[UnusableEntry] = []
        self.touched: set[Digest] = set()

    @classmethod
    def decode(cls, content: bytes, misplaced: Callable[[StoredLayer], str] = lambda _layer: "") -> MetaStore:
        """Decode the file.

        Args:
            content: the content of the file.
            misplaced: returns why a layer's store_path cannot be its directory, or "".

        Raises:
            Unreadable: it is not a MetaStore.
        """
        store = cls()
        try:
            content.decode()  # the decoder skips values, and would not notice invalid UTF-8 in them
            document = msgspec.json.decode(content, type=Entry)
            for name in ("image_db", "layer_db"):
                if name not in document:
                    raise Unreadable(f"it has no {name}")
            store._images = msgspec.json.decode(document.pop("image_db"), type=Entry)
            store._layers = msgspec.json.decode(document.pop("layer_db"), type=Entry)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Unreadable(str(error)) from None
        store._document = document
        reader = EntryReader()
        for key, layer in reader.layers(store._layers):
            problem = str(layer) if isinstance(layer, Unreadable) else misplaced(layer)
            if problem or isinstance(layer, Unreadable):
                phrase = f"layer_db entry {key[:100]!r} cannot be used: {problem}"
                store.unusable.append(UnusableEntry(key, phrase))
            else:
                store.layers[layer.compressed_digest] = layer
        for key, image in reader.images(store._images):
            if isinstance(image, Unreadable):
                phrase = f"image_db entry {key[:100]!r} cannot be used: {image}"
                store.unusable.append(UnusableEntry(key, phrase))
            else:
                store.images[image.image_id] = image
        return store

    @classmethod
    def read(cls, work_dir: str, misplaced: Callable[[StoredLayer], str]) -> MetaStore | None:
        """Read the file of a work directory; return None if it does not exist.

        Raises:
            Unreadable: it is not a MetaStore, or not a regular file.
            OSError: the operating system refuses.
        """
        try:
            content = read_file(os.path.join(work_dir, FILE_NAME))
        except NotAFile as error:
            raise Unreadable(str(error)) from None
        return cls.decode(content, misplaced) if content is not None else None

    def encode(self) -> bytes:
        """Return the content of the file."""
        document: dict[str, object] = {
            "image_db": dict(sorted(self._images.items())),
            "layer_db": dict(sorted(self._layers.items())),
            "snapshot_db": self._document.get("snapshot_db", msgspec.Raw(b"{}")),
        }
        document |= {key: value for key, value in self._document.items() if key not in _DATABASES}
        return msgspec.json.encode(document, enc_hook=str)

    # -- layers ---------------------------------------------------------------------------------------------

    def put_layers(self, *layers: StoredLayer) -> None:
        """Add or correct the entries of layers, and their copies in image entries; preserve unknown keys."""
        put = {layer.compressed_digest: layer for layer in layers}
        for digest, layer in put.items():
            self._layers[digest] = encode_entry(decode_entry(self._layers.get(digest)) | layer_fields(layer))
        self.layers |= put
        for record in list(self.images.values()):
            current = tuple(put.get(one.compressed_digest, one) for one in record.layers)
            if any(
                differ(one, layer)
                for one, layer in zip(record.layers, current, strict=True)
                if one is not layer
            ):
                self._put_metas(record, current)

    def drop_layer(self, digest: Digest) -> None:
        """Delete a layer's entry."""
        self._layers.pop(digest, None)
        self.layers.pop(digest, None)

    # -- images ---------------------------------------------------------------------------------------------

    def image_entry(self, image_id: Digest) -> msgspec.Raw | None:
        """Return an image's entry as it is in the file, or None."""
        return self._images.get(image_id)

    def put_image(self, record: ImageRecord) -> None:
        """Add or correct the entry of an image; preserve unknown keys.

        Raises:
            Unreadable: with its config, the file could not be read any more.
        """
        check_config(record.config)
        before = decode_entry(self._images.get(record.image_id))
        self._images[record.image_id] = encode_entry(
            {key: value for key, value in before.items() if key not in ("references", "digests")}
            | encoded({"id": record.image_id})
            | digest_fields(record)
            | name_fields(record.references)
            | {"image_config": msgspec.Raw(record.config)}
            | encoded({"signed": record.signed})
            | metas_fields(record.layers, before)
        )
        self.images[record.image_id] = record
        self.touched.add(record.image_id)

    def restore_image(self, record: ImageRecord, entry: msgspec.Raw) -> None:
        """Add an image with the entry that it had before."""
        self._images[record.image_id] = entry
        self.images[record.image_id] = record

    def rename_image(self, image_id: Digest, references: tuple[str, ...]) -> None:
        """Change the names of an image."""
        entry = {
            key: value for key, value in decode_entry(self._images[image_id]).items() if key != "references"
        }
        self._images[image_id] = encode_entry(entry | name_fields(references))
        self.images[image_id] = dataclasses.replace(self.images[image_id], references=references)
        self.touched.add(image_id)

    def drop_image(self, image_id: Digest) -> None:
        """Delete an image's entry."""
        self._images.pop(image_id, None)
        self.images.pop(image_id, None)
        self.touched.add(image_id)

    def correct_layer_metas(self, image_id: Digest) -> None:
        """Make an image's layer_metas match layer_db, in the order of its config."""
        record = self.images[image_id]
        layers = tuple(self.layers.get(layer.compressed_digest, layer) for layer in record.layers)
        self._put_metas(record, layers)

    def _put_metas(self, record: ImageRecord, layers: tuple[StoredLayer, ...]) -> None:
        entry = decode_entry(self._images[record.image_id])
        self._images[record.image_id] = encode_entry(entry | metas_fields(layers, entry))
        self.images[record.image_id] = dataclasses.replace(record, layers=layers, metas=each_once(layers))
        self.touched.add(record.image_id)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undo all changes made in the context if it raises."""
        before = (dict(self._images), dict(self._layers), dict(self.images), dict(self.layers))
        try:
            yield
        except BaseException:
            self._images, self._layers, self.images, self.layers = before
            raise
