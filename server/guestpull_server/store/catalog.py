"""meta_store.json in memory: image-rs's file, read without losing a key and written in a fixed order.

The file is image-rs's `MetaStore` (guest-components, image-rs/src/meta_store.rs and image.rs): `image_db`,
`layer_db` and `snapshot_db`. Other programs write it too, of other versions: every key that we do not know, at
every level, is kept as it is, to the letter; an entry that we cannot use is kept and not believed. Written,
its entries are sorted, so that the same content gives the same bytes.
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
    differ,
    digest_fields,
    each_once,
    encoded,
    layer_fields,
    metas_fields,
    name_fields,
    read_entry,
    written_entry,
)
from guestpull_server.store.files import NoFile, read_file

FILE_NAME: Final = "meta_store.json"
_DATABASES: Final = ("image_db", "layer_db", "snapshot_db")


@dataclasses.dataclass(frozen=True, slots=True)
class UnusableEntry:
    """An entry that is kept but not believed: what it is the entry of, and why, as a phrase."""

    key: str
    phrase: str

    def __str__(self) -> str:
        return self.phrase


class Catalog:
    """The three databases. Not thread-safe; paths in it are the guest's, as they are written.

    Attributes:
        images: the images that are believed.
        layers: the layers that are believed.
        unusable: the entries that are kept but not believed.
        touched: the images that changed since whoever looks here cleared it.
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
    def decode(cls, content: bytes, misplaced: Callable[[StoredLayer], str] = lambda _layer: "") -> Catalog:
        """Read the file.

        Args:
            content: of the file.
            misplaced: why a layer cannot be where its entry says; empty if it can.

        Raises:
            Unreadable: it is no MetaStore.
        """
        catalog = cls()
        try:
            content.decode()  # reading around values does not find what is no UTF-8 in them
            document = msgspec.json.decode(content, type=Entry)
            for name in ("image_db", "layer_db"):
                if name not in document:
                    raise Unreadable(f"it has no {name}")
            catalog._images = msgspec.json.decode(document.pop("image_db"), type=Entry)
            catalog._layers = msgspec.json.decode(document.pop("layer_db"), type=Entry)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Unreadable(str(error)) from None
        catalog._document = document
        reader = EntryReader()
        for key, layer in reader.layers(catalog._layers):
            problem = str(layer) if isinstance(layer, Unreadable) else misplaced(layer)
            if problem or isinstance(layer, Unreadable):
                phrase = f"layer_db entry {key[:100]!r} cannot be used: {problem}"
                catalog.unusable.append(UnusableEntry(key, phrase))
            else:
                catalog.layers[layer.compressed_digest] = layer
        for key, image in reader.images(catalog._images):
            if isinstance(image, Unreadable):
                phrase = f"image_db entry {key[:100]!r} cannot be used: {image}"
                catalog.unusable.append(UnusableEntry(key, phrase))
            else:
                catalog.images[image.image_id] = image
        return catalog

    @classmethod
    def read(cls, work_dir: str, misplaced: Callable[[StoredLayer], str]) -> Catalog | None:
        """Read the file of a work directory; None where there is none.

        Raises:
            Unreadable: it is no MetaStore, or no file.
            OSError: the operating system refuses.
        """
        try:
            content = read_file(os.path.join(work_dir, FILE_NAME))
        except NoFile as error:
            raise Unreadable(str(error)) from None
        return cls.decode(content, misplaced) if content is not None else None

    def encode(self) -> bytes:
        """The file's content."""
        document: dict[str, object] = {
            "image_db": dict(sorted(self._images.items())),
            "layer_db": dict(sorted(self._layers.items())),
            "snapshot_db": self._document.get("snapshot_db", msgspec.Raw(b"{}")),
        }
        document |= {key: value for key, value in self._document.items() if key not in _DATABASES}
        return msgspec.json.encode(document, enc_hook=str)

    # -- layers ---------------------------------------------------------------------------------------------

    def put_layers(self, *layers: StoredLayer) -> None:
        """Add layers, or put their entries right, and what images say of them; keys that we do not know stay."""
        put = {layer.compressed_digest: layer for layer in layers}
        for digest, layer in put.items():
            self._layers[digest] = written_entry(read_entry(self._layers.get(digest)) | layer_fields(layer))
        self.layers |= put
        for record in list(self.images.values()):
            meant = tuple(put.get(one.compressed_digest, one) for one in record.layers)
            if any(
                differ(one, layer)
                for one, layer in zip(record.layers, meant, strict=True)
                if one is not layer
            ):
                self._put_metas(record, meant)

    def drop_layer(self, digest: Digest) -> None:
        """Forget a layer."""
        self._layers.pop(digest, None)
        self.layers.pop(digest, None)

    # -- images ---------------------------------------------------------------------------------------------

    def image_entry(self, image_id: Digest) -> msgspec.Raw | None:
        """An image's entry as it is written."""
        return self._images.get(image_id)

    def put_image(self, record: ImageRecord) -> None:
        """Add an image, or put its entry right; keys that we do not know stay.

        Raises:
            Unreadable: its config would make the file one that nobody can read.
        """
        check_config(record.config)
        before = read_entry(self._images.get(record.image_id))
        self._images[record.image_id] = written_entry(
            {key: value for key, value in before.items() if key not in ("references", "digests")}
            | encoded({"id": record.image_id})
            | digest_fields(record)
            | name_fields(record.references)
            | {"image_config": msgspec.Raw(record.config)}
            | {"signed": before.get("signed", msgspec.Raw(b"false"))}
            | metas_fields(record.layers, before)
        )
        self.images[record.image_id] = record
        self.touched.add(record.image_id)

    def take_in(self, record: ImageRecord, entry: msgspec.Raw) -> None:
        """Add an image by the entry that it had."""
        self._images[record.image_id] = entry
        self.images[record.image_id] = record

    def rename_image(self, image_id: Digest, references: tuple[str, ...]) -> None:
        """Give an image other names."""
        entry = {
            key: value for key, value in read_entry(self._images[image_id]).items() if key != "references"
        }
        self._images[image_id] = written_entry(entry | name_fields(references))
        self.images[image_id] = dataclasses.replace(self.images[image_id], references=references)
        self.touched.add(image_id)

    def drop_image(self, image_id: Digest) -> None:
        """Forget an image."""
        self._images.pop(image_id, None)
        self.images.pop(image_id, None)
        self.touched.add(image_id)

    def put_metas_right(self, image_id: Digest) -> None:
        """Have an image say of its layers what layer_db says, in the order of its config."""
        record = self.images[image_id]
        layers = tuple(self.layers.get(layer.compressed_digest, layer) for layer in record.layers)
        self._put_metas(record, layers)

    def _put_metas(self, record: ImageRecord, layers: tuple[StoredLayer, ...]) -> None:
        entry = read_entry(self._images[record.image_id])
        self._images[record.image_id] = written_entry(entry | metas_fields(layers, entry))
        self.images[record.image_id] = dataclasses.replace(record, layers=layers, metas=each_once(layers))
        self.touched.add(record.image_id)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undo what was changed within, should it not end well."""
        before = (dict(self._images), dict(self._layers), dict(self.images), dict(self.layers))
        try:
            yield
        except BaseException:
            self._images, self._layers, self.images, self.layers = before
            raise
