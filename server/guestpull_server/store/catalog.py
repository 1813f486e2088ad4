"""meta_store.json in memory: image-rs's file, read without losing a key and written in a fixed order.

The file is image-rs's `MetaStore` (guest-components, image-rs/src/meta_store.rs and image.rs): `image_db`,
`layer_db` and `snapshot_db`. Other programs write it too, of other versions: every key that we do not know, at
every level, is kept as it is, to the letter; an entry that we cannot use is kept and not believed. Written,
its entries are sorted, so that the same content gives the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final, Literal, TypeAlias, TypeVar

import msgspec

from guestpull_server.errors import InvalidDigest
from guestpull_server.models import Decoder, Digest, ImageConfig, StoredLayer

FILE_NAME: Final = "meta_store.json"
Entry: TypeAlias = dict[str, msgspec.Raw]
"""An object of the file, its values as they are written."""

_DATABASES: Final = ("image_db", "layer_db", "snapshot_db")
_MAX_NESTING: Final = 100  # of an image config; image-rs's JSON reader gives the whole file up at 128


class Unreadable(Exception):
    """meta_store.json, or an entry of it, cannot be used; the message says why."""


class _LayerMeta(msgspec.Struct, frozen=True):
    """image-rs's LayerMeta."""

    decoder: Literal["Uncompressed", "Gzip", "Zstd"]
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


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image as meta_store.json has it; `layers` as its own `layer_metas` say them."""

    image_id: Digest
    manifest_digest: Digest
    references: tuple[str, ...]
    config: bytes
    layers: tuple[StoredLayer, ...]


class Catalog:
    """The three databases. Not thread-safe; paths in it are the guest's, as they are written.

    Attributes:
        images: the images that are believed.
        layers: the layers that are believed.
        unusable: the entries that are kept but not believed; a phrase each.
        touched: the images that changed since whoever looks here cleared it.
    """

    def __init__(self) -> None:
        self._document: Entry = {}
        self._images: dict[str, msgspec.Raw] = {}
        self._layers: dict[str, msgspec.Raw] = {}
        self.images: dict[Digest, ImageRecord] = {}
        self.layers: dict[Digest, StoredLayer] = {}
        self.unusable: list[str] = []
        self.touched: set[Digest] = set()

    @classmethod
    def decode(cls, content: bytes) -> Catalog:
        """Read the file.

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
        seen = _Seen()
        for key, layer_meta in _all_of(catalog._layers, _LayerMeta):
            try:
                catalog.layers[seen.digest(key)] = _layer_of(key, layer_meta, seen)
            except (Unreadable, InvalidDigest) as error:
                catalog.unusable.append(f"layer_db entry {key[:100]!r} cannot be used: {error}")
        for key, image_meta in _all_of(catalog._images, _ImageMeta):
            try:
                catalog.images[seen.digest(key)] = _image_of(key, image_meta, seen)
            except (Unreadable, InvalidDigest) as error:
                catalog.unusable.append(f"image_db entry {key[:100]!r} cannot be used: {error}")
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
        """Add a layer, or put its entry right, and what images say of it; keys that we do not know stay."""
        digest = layer.compressed_digest
        self._layers[digest] = _written(_read(self._layers.get(digest)) | _layer_entry(layer))
        self.layers[digest] = layer
        for image_id, record in list(self.images.items()):
            if any(one.compressed_digest == digest and _differ(one, layer) for one in record.layers):
                layers = tuple(layer if one.compressed_digest == digest else one for one in record.layers)
                entry = _read(self._images[image_id])
                self._images[image_id] = _written(entry | _metas(layers, entry))
                self.images[image_id] = dataclasses.replace(record, layers=layers)
                self.touched.add(image_id)

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
        _check_config(record.config)
        before = _read(self._images.get(record.image_id))
        self._images[record.image_id] = _written(
            {key: value for key, value in before.items() if key != "references"}
            | _encoded({"id": record.image_id, "digest": record.manifest_digest})
            | _names(record.references)
            | {"image_config": msgspec.Raw(record.config)}
            | {"signed": before.get("signed", msgspec.Raw(b"false"))}
            | _metas(record.layers, before)
        )
        self.images[record.image_id] = record
        self.touched.add(record.image_id)

    def take_in(self, record: ImageRecord, entry: msgspec.Raw) -> None:
        """Add an image by the entry that it had."""
        self._images[record.image_id] = entry
        self.images[record.image_id] = record

    def rename_image(self, image_id: Digest, references: tuple[str, ...]) -> None:
        """Give an image other names."""
        entry = {key: value for key, value in _read(self._images[image_id]).items() if key != "references"}
        self._images[image_id] = _written(entry | _names(references))
        self.images[image_id] = dataclasses.replace(self.images[image_id], references=references)
        self.touched.add(image_id)

    def drop_image(self, image_id: Digest) -> None:
        """Forget an image."""
        self._images.pop(image_id, None)
        self.images.pop(image_id, None)
        self.touched.add(image_id)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undo what was changed within, should it not end well."""
        before = (dict(self._images), dict(self._layers), dict(self.images), dict(self.layers))
        try:
            yield
        except BaseException:
            self._images, self._layers, self.images, self.layers = before
            raise


# -- reading ------------------------------------------------------------------------------------------------


def image_of(key: str, entry: msgspec.Raw) -> ImageRecord:
    """The image that an entry of image_db describes.

    Raises:
        Unreadable: it cannot be used, or contradicts itself.
    """
    ((_, meta),) = _all_of({key: entry}, _ImageMeta)
    return _image_of(key, meta, _Seen())


class _Seen:
    """Digests and layers that were read already: each stands in the file several times, and is checked once."""

    def __init__(self) -> None:
        self._digests: dict[str, Digest] = {}
        self._layers: dict[_LayerMeta, StoredLayer] = {}

    def digest(self, text: str) -> Digest:
        found = self._digests.get(text)
        if found is None:
            found = self._digests[text] = Digest(text)
        return found

    def layer(self, meta: _LayerMeta) -> StoredLayer:
        found = self._layers.get(meta)
        if found is None:
            if not meta.store_path.startswith("/") or "\0" in meta.store_path:
                raise Unreadable(f"store_path {meta.store_path[:100]!r} is not absolute")
            found = self._layers[meta] = StoredLayer(
                self.digest(meta.compressed_digest),
                self.digest(meta.uncompressed_digest),
                Decoder(meta.decoder),
                meta.store_path,
                meta.encrypted,
            )
        return found


_Meta = TypeVar("_Meta", _LayerMeta, _ImageMeta)


def _all_of(entries: Entry, wanted: type[_Meta]) -> Iterator[tuple[str, _Meta | str]]:
    """The entries by what they mean; where one cannot be read, a text says why."""
    try:
        # all at once is ten times as fast as one by one
        metas = msgspec.json.decode(msgspec.json.encode(entries), type=dict[str, wanted])  # type: ignore[valid-type]
        yield from metas.items()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        for key, entry in entries.items():
            try:
                yield key, msgspec.json.decode(entry, type=wanted)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                yield key, str(error)


def _layer_of(key: str, meta: _LayerMeta | str, seen: _Seen) -> StoredLayer:
    if isinstance(meta, str):
        raise Unreadable(meta)
    if meta.compressed_digest != key:
        raise Unreadable("its key is another digest")
    return seen.layer(meta)


def _image_of(key: str, meta: _ImageMeta | str, seen: _Seen) -> ImageRecord:
    if isinstance(meta, str):
        raise Unreadable(meta)
    if meta.id != key:
        raise Unreadable("its key is another digest")
    config = bytes(meta.image_config)
    try:
        layers = _in_full(config, [seen.layer(layer) for layer in meta.layer_metas])
        names = dict.fromkeys(name for name in (meta.reference, *meta.references) if name)
        return ImageRecord(seen.digest(key), seen.digest(meta.digest), tuple(names), config, layers)
    except (msgspec.DecodeError, UnicodeDecodeError, InvalidDigest) as error:
        raise Unreadable(str(error)) from None


def _in_full(config: bytes, metas: list[StoredLayer]) -> tuple[StoredLayer, ...]:
    """The layers as the manifest has them: where one occurs twice, layer_metas has it once."""
    rootfs = msgspec.json.decode(config, type=ImageConfig).rootfs
    diff_ids = (rootfs.diff_ids if rootfs else None) or []
    if [layer.uncompressed_digest for layer in metas] == diff_ids:
        return tuple(metas)
    by_diff_id: dict[str, StoredLayer] = {layer.uncompressed_digest: layer for layer in metas}
    if by_diff_id.keys() != set(diff_ids):
        raise Unreadable("its layer_metas are not the layers that its image_config names")
    return tuple(by_diff_id[diff_id] for diff_id in diff_ids)


def _check_config(config: bytes) -> None:
    """Refuse what would spoil the file that the config becomes a part of."""
    try:
        nested: list[object] = [msgspec.json.decode(config, type=dict[str, object])]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(str(error)) from None
    for _ in range(_MAX_NESTING):
        inner: list[object] = []
        for one in nested:
            inner += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        nested = inner
        if not nested:
            return
    raise Unreadable(f"it nests values more than {_MAX_NESTING} deep")


# -- writing ------------------------------------------------------------------------------------------------


def _read(entry: msgspec.Raw | None) -> Entry:
    """An entry, to be changed; what is none counts as empty."""
    with suppress(msgspec.DecodeError):
        return msgspec.json.decode(entry, type=Entry) if entry is not None else {}
    return {}


def _written(entry: Entry) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(entry))


def _differ(one: StoredLayer, other: StoredLayer) -> bool:
    """Whether two layers have different entries."""
    return (one.store_path, one.uncompressed_digest, one.decoder, one.encrypted) != (
        other.store_path,
        other.uncompressed_digest,
        other.decoder,
        other.encrypted,
    )


def _metas(layers: tuple[StoredLayer, ...], image: Entry) -> Entry:
    """An image's `layer_metas`.

    A layer that occurs twice stands once, at its topmost place: image-rs hands this list to overlayfs.
    """
    before: dict[str, Entry] = {}
    with suppress(KeyError, msgspec.DecodeError):
        for meta in msgspec.json.decode(image["layer_metas"], type=list[Entry]):
            before[msgspec.json.decode(meta["compressed_digest"], type=str)] = meta
    once = {layer.compressed_digest: layer for layer in reversed(layers)}
    return _encoded(
        {
            "layer_metas": [
                before.get(digest, {}) | _layer_entry(layer) for digest, layer in reversed(once.items())
            ]
        }
    )


def _names(references: tuple[str, ...]) -> Entry:
    names: dict[str, object] = {"reference": references[0] if references else ""}
    if len(references) > 1:
        names["references"] = references
    return _encoded(names)


def _layer_entry(layer: StoredLayer) -> Entry:
    return _encoded(
        {
            "decoder": layer.decoder,
            "encrypted": layer.encrypted,
            "compressed_digest": layer.compressed_digest,
            "uncompressed_digest": layer.uncompressed_digest,
            "store_path": layer.store_path,
        }
    )


def _encoded(fields: Mapping[str, object]) -> Entry:
    return {key: msgspec.Raw(msgspec.json.encode(value, enc_hook=str)) for key, value in fields.items()}
