"""meta_store.json in memory: image-rs's file, read without losing a key and written in a fixed order.

The file is image-rs's `MetaStore` (guest-components, image-rs/src/meta_store.rs and image.rs): `image_db`,
`layer_db` and `snapshot_db`. Other programs write it too, of other versions: every key that we do not know, at
every level, is kept as it is, to the letter; an entry that we cannot use is kept and not believed. Written,
its entries are sorted, so that the same content gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, TypeVar

import msgspec

from guestpull_server.errors import InvalidDigest
from guestpull_server.models import Decoder, Digest, ImageConfig, ResolvedImage, StoredLayer

FILE_NAME: Final = "meta_store.json"
_Entry = dict[str, msgspec.Raw]
_DATABASES: Final = ("image_db", "layer_db", "snapshot_db")


class Unreadable(Exception):
    """meta_store.json is damaged; the message says how."""


class _LayerMeta(msgspec.Struct, frozen=True):
    """image-rs's LayerMeta."""

    decoder: Decoder
    encrypted: bool
    compressed_digest: str
    uncompressed_digest: str
    store_path: str


class _ImageMeta(msgspec.Struct, frozen=True):
    """What we read of image-rs's ImageMeta; `references` is ours, where an image has several names."""

    id: str
    digest: str
    reference: str
    image_config: msgspec.Raw
    layer_metas: list[_LayerMeta]
    references: list[str] = []


class ImageRecord:
    """An image as meta_store.json has it, with its layers named by their compressed digests."""

    __slots__ = ("config", "image_id", "layers", "manifest_digest", "references")

    def __init__(
        self,
        image_id: Digest,
        manifest_digest: Digest,
        references: tuple[str, ...],
        config: bytes,
        layers: tuple[StoredLayer, ...],
    ) -> None:
        self.image_id = image_id
        self.manifest_digest = manifest_digest
        self.references = references
        self.config = config
        self.layers = layers


class Catalog:
    """The three databases. Not thread-safe; paths in it are the guest's, as they are written."""

    def __init__(self) -> None:
        self._document: _Entry = {}
        self._images: dict[str, _Entry] = {}
        self._layers: dict[str, _Entry] = {}
        self.images: dict[Digest, ImageRecord] = {}
        self.layers: dict[Digest, StoredLayer] = {}
        self.unusable: list[str] = []
        """Entries that are kept but not believed; a phrase each."""

    @classmethod
    def decode(cls, content: bytes) -> Catalog:
        """Read the file.

        Raises:
            Unreadable: it is no MetaStore.
        """
        catalog = cls()
        try:
            catalog._document = msgspec.json.decode(content, type=_Entry)
            for name in ("image_db", "layer_db"):
                if name not in catalog._document:
                    raise Unreadable(f"it has no {name}")
            catalog._images = msgspec.json.decode(catalog._document.pop("image_db"), type=dict[str, _Entry])
            catalog._layers = msgspec.json.decode(catalog._document.pop("layer_db"), type=dict[str, _Entry])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Unreadable(str(error)) from None
        for key, entry in catalog._layers.items():
            catalog._believe_layer(key, entry)
        for key, entry in catalog._images.items():
            catalog._believe_image(key, entry)
        return catalog

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

    def put_layer(self, layer: StoredLayer) -> None:
        """Add a layer, or put its entry right; keys that we do not know stay."""
        entry = self._layers.get(layer.compressed_digest, {})
        self._layers[layer.compressed_digest] = entry | _layer_entry(layer)
        self.layers[layer.compressed_digest] = layer

    def drop_layer(self, digest: Digest) -> None:
        """Forget a layer."""
        self._layers.pop(digest, None)
        self.layers.pop(digest, None)

    # -- images ---------------------------------------------------------------------------------------------

    def put_image(
        self, resolved: ResolvedImage, references: tuple[str, ...], layers: tuple[StoredLayer, ...]
    ) -> None:
        """Add an image, or put its entry right; keys that we do not know stay."""
        record = ImageRecord(resolved.image_id, resolved.manifest_digest, references, resolved.config, layers)
        unknown = dict(self._images.get(resolved.image_id, {}))
        unknown.pop("references", None)
        named = _encoded({"reference": references[0] if references else ""})
        if len(references) > 1:
            named |= _encoded({"references": references})
        # a layer that occurs twice stands once, at its topmost place: image-rs hands this list to overlayfs
        once = {layer.compressed_digest: layer for layer in reversed(layers)}
        metas = [_layer_entry(layer) for layer in reversed(once.values())]
        self._images[resolved.image_id] = (
            unknown
            | _encoded({"id": resolved.image_id, "digest": resolved.manifest_digest})
            | named
            | {"image_config": msgspec.Raw(resolved.config)}
            | {"signed": unknown.get("signed", msgspec.Raw(b"false"))}
            | _encoded({"layer_metas": metas})
        )
        self.images[resolved.image_id] = record

    def rename_image(self, image_id: Digest, references: tuple[str, ...]) -> None:
        """Give an image other names."""
        record = self.images[image_id]
        entry = self._images[image_id] | _encoded({"reference": references[0] if references else ""})
        entry.pop("references", None)
        if len(references) > 1:
            entry |= _encoded({"references": references})
        self._images[image_id] = entry
        self.images[image_id] = ImageRecord(
            record.image_id, record.manifest_digest, references, record.config, record.layers
        )

    def drop_image(self, image_id: Digest) -> None:
        """Forget an image."""
        self._images.pop(image_id, None)
        self.images.pop(image_id, None)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undo what was changed within, should it not end well."""
        before = (dict(self._images), dict(self._layers), dict(self.images), dict(self.layers))
        try:
            yield
        except BaseException:
            self._images, self._layers, self.images, self.layers = before
            raise

    # -- reading --------------------------------------------------------------------------------------------

    def _believe_layer(self, key: str, entry: _Entry) -> None:
        try:
            layer = _stored(_convert(entry, _LayerMeta))
            if layer.compressed_digest != key:
                raise Unreadable("its key is another digest")
            self.layers[layer.compressed_digest] = layer
        except (msgspec.ValidationError, InvalidDigest, Unreadable) as error:
            self.unusable.append(f"layer_db entry {key[:100]!r} cannot be used: {error}")

    def _believe_image(self, key: str, entry: _Entry) -> None:
        try:
            meta = _convert(entry, _ImageMeta)
            image_id = Digest(key)
            if meta.id != key:
                raise Unreadable("its key is another digest")
            names = dict.fromkeys([*([meta.reference] if meta.reference else []), *meta.references])
            metas = [_stored(layer) for layer in meta.layer_metas]
            config = bytes(meta.image_config)
            self.images[image_id] = ImageRecord(
                image_id, Digest(meta.digest), tuple(names), config, _in_full(config, metas)
            )
        except (msgspec.DecodeError, InvalidDigest, Unreadable) as error:
            self.unusable.append(f"image_db entry {key[:100]!r} cannot be used: {error}")


def _in_full(config: bytes, metas: list[StoredLayer]) -> tuple[StoredLayer, ...]:
    """The layers as the manifest has them: where one occurs twice, layer_metas has it once."""
    rootfs = msgspec.json.decode(config, type=ImageConfig).rootfs
    diff_ids = (rootfs.diff_ids if rootfs else None) or []
    if len(diff_ids) == len(metas):
        return tuple(metas)
    by_diff_id = {layer.uncompressed_digest: layer for layer in metas}
    try:
        return tuple(by_diff_id[Digest(diff_id)] for diff_id in diff_ids)
    except KeyError:
        raise Unreadable("its layer_metas are not the config's diff_ids") from None


_Meta = TypeVar("_Meta", _LayerMeta, _ImageMeta)


def _convert(entry: Mapping[str, msgspec.Raw], wanted: type[_Meta]) -> _Meta:
    return msgspec.json.decode(msgspec.json.encode(entry), type=wanted)


def _stored(meta: _LayerMeta) -> StoredLayer:
    if not os.path.isabs(meta.store_path) or "\0" in meta.store_path:
        raise Unreadable(f"store_path {meta.store_path[:100]!r} is not absolute")
    return StoredLayer(
        Digest(meta.compressed_digest),
        Digest(meta.uncompressed_digest),
        meta.decoder,
        meta.store_path,
        meta.encrypted,
    )


def _layer_entry(layer: StoredLayer) -> _Entry:
    return _encoded(
        {
            "decoder": layer.decoder,
            "encrypted": layer.encrypted,
            "compressed_digest": layer.compressed_digest,
            "uncompressed_digest": layer.uncompressed_digest,
            "store_path": layer.store_path,
        }
    )


def _encoded(fields: Mapping[str, object]) -> _Entry:
    return {key: msgspec.Raw(msgspec.json.encode(value, enc_hook=str)) for key, value in fields.items()}
