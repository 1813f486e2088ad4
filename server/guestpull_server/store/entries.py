"""Entries of meta_store.json: decode them, and encode them without losing unknown keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Final, Literal, TypeAlias, TypeVar

import msgspec

from guestpull_server.errors import InvalidDigest
from guestpull_server.models import Decoder, Digest, ImageConfig, StoredLayer

Entry: TypeAlias = dict[str, msgspec.Raw]
"""A JSON object of the file, with undecoded values."""

_MAX_NESTING: Final = 100  # levels of an image config; image-rs's JSON reader rejects the whole file at 128


class Unreadable(Exception):
    """meta_store.json, or an entry of it, is unusable; the message says why."""


class _LayerMeta(msgspec.Struct, frozen=True):
    """image-rs's LayerMeta."""

    decoder: Literal["Uncompressed", "Gzip", "Zstd"]
    encrypted: bool
    compressed_digest: str
    uncompressed_digest: str
    store_path: str


class _ImageMeta(msgspec.Struct, frozen=True):
    """The fields that we use of image-rs's ImageMeta; `references` and `digests` are our additions."""

    id: str
    digest: str
    reference: str
    image_config: msgspec.Raw
    layer_metas: list[_LayerMeta]
    signed: bool = False
    references: list[str] = []
    digests: list[str] = []


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image's entry in meta_store.json.

    Attributes:
        image_id: the digest of the config.
        manifest_digest: the digest of the platform's manifest that has these layers.
        references: the image's names.
        config: the image config as it is in the file.
        layers: the layers of `layer_metas` in the order of the config, bottom-most first.
        metas: `layer_metas` as it is in the file; empty if the record does not come from a file.
        other_digests: digests of manifests of the same image with other blobs (compressed differently), for which
            the image has names.
        signed: image-rs's flag.
    """

    image_id: Digest
    manifest_digest: Digest
    references: tuple[str, ...]
    config: bytes
    layers: tuple[StoredLayer, ...]
    metas: tuple[StoredLayer, ...] = ()
    other_digests: tuple[Digest, ...] = ()
    signed: bool = False

    @property
    def manifest_digests(self) -> tuple[Digest, ...]:
        """The digests of all manifests known to be of the image; that of its layers first."""
        return (self.manifest_digest, *self.other_digests)

    @property
    def diff_ids(self) -> list[Digest]:
        """The diff_ids of the layers, bottom-most first."""
        return [layer.uncompressed_digest for layer in self.layers]


# -- reading ------------------------------------------------------------------------------------------------


class EntryReader:
    """Decodes the entries of one file. Checks digests and layers that occur several times only once."""

    def __init__(self) -> None:
        self._digests: dict[str, Digest] = {}
        self._layers: dict[_LayerMeta, StoredLayer] = {}

    def layers(self, entries: Entry) -> Iterator[tuple[str, StoredLayer | Unreadable]]:
        """Decode the entries of a layer_db; yield for each the layer, or why it is unusable."""
        for key, meta in _metas_of(entries, _LayerMeta):
            try:
                yield key, self._keyed_layer(key, meta)
            except Unreadable as problem:
                yield key, problem

    def images(self, entries: Entry) -> Iterator[tuple[str, ImageRecord | Unreadable]]:
        """Decode the entries of an image_db; yield for each the image, or why it is unusable."""
        for key, meta in _metas_of(entries, _ImageMeta):
            try:
                yield key, self._image(key, meta)
            except Unreadable as problem:
                yield key, problem

    def _keyed_layer(self, key: str, meta: _LayerMeta | Unreadable) -> StoredLayer:
        if isinstance(meta, Unreadable):
            raise meta
        if meta.compressed_digest != key:
            raise Unreadable("its key is not its digest")
        return self._layer(meta)

    def _image(self, key: str, meta: _ImageMeta | Unreadable) -> ImageRecord:
        if isinstance(meta, Unreadable):
            raise meta
        if meta.id != key:
            raise Unreadable("its key is not its digest")
        config = bytes(meta.image_config)
        metas = tuple(self._layer(layer) for layer in meta.layer_metas)
        layers = _in_full(config, metas)
        names = dict.fromkeys(name for name in (meta.reference, *meta.references) if name)
        digest, *others = dict.fromkeys(map(self._digest, (meta.digest, *meta.digests)))
        return ImageRecord(
            self._digest(key), digest, tuple(names), config, layers, metas, tuple(others), meta.signed
        )

    def _layer(self, meta: _LayerMeta) -> StoredLayer:
        found = self._layers.get(meta)
        if found is None:
            if not meta.store_path.startswith("/") or "\0" in meta.store_path:
                raise Unreadable(f"store_path {meta.store_path[:100]!r} is not absolute")
            found = self._layers[meta] = StoredLayer(
                self._digest(meta.compressed_digest),
                self._digest(meta.uncompressed_digest),
                Decoder(meta.decoder),
                meta.store_path,
                meta.encrypted,
            )
        return found

    def _digest(self, text: str) -> Digest:
        found = self._digests.get(text)
        if found is None:
            try:
                found = self._digests[text] = Digest(text)
            except InvalidDigest:
                raise Unreadable(f"{text[:100]!r} is not a digest") from None
        return found


_Meta = TypeVar("_Meta", _LayerMeta, _ImageMeta)


def _metas_of(entries: Entry, wanted: type[_Meta]) -> Iterator[tuple[str, _Meta | Unreadable]]:
    try:
        # decoding all at once is ten times as fast as one by one
        metas = msgspec.json.decode(msgspec.json.encode(entries), type=dict[str, wanted])  # type: ignore[valid-type]
        yield from metas.items()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        for key, entry in entries.items():
            try:
                yield key, msgspec.json.decode(entry, type=wanted)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                yield key, Unreadable(str(error))


def _in_full(config: bytes, metas: tuple[StoredLayer, ...]) -> tuple[StoredLayer, ...]:
    """Return the layers as the manifest lists them; layer_metas has a layer that occurs twice only once."""
    try:
        rootfs = msgspec.json.decode(config, type=ImageConfig).rootfs
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(f"its image_config: {error}") from None
    diff_ids = (rootfs.diff_ids if rootfs else None) or []
    if [layer.uncompressed_digest for layer in metas] == diff_ids:
        return metas
    by_diff_id: dict[str, StoredLayer] = {layer.uncompressed_digest: layer for layer in metas}
    if by_diff_id.keys() != set(diff_ids):
        raise Unreadable("its layer_metas are not the layers of its image_config")
    return tuple(by_diff_id[diff_id] for diff_id in diff_ids)


def metas_problem(
    record: ImageRecord, layers: Mapping[Digest, StoredLayer], *, of_another_program: bool
) -> str:
    """Return what is wrong with an image's `layer_metas`, which image-rs mounts in this order, or "".

    Args:
        record: the image.
        layers: the layers in layer_db.
        of_another_program: image-rs keeps a layer that occurs twice at its bottom-most position.
    """
    if not record.metas:
        return ""
    if len({meta.compressed_digest for meta in record.metas}) < len(record.metas):
        return "its layer_metas contain a layer twice"
    written = [meta.uncompressed_digest for meta in record.metas]
    wanted = record.diff_ids
    in_order = written == wanted or _topmost(written) == _topmost(wanted)
    if not in_order and not (of_another_program and written == list(dict.fromkeys(wanted))):
        return "its layer_metas are not in the order of the diff_ids in its image_config"
    for meta in record.metas:
        entry = layers.get(meta.compressed_digest, meta)
        if entry is not meta and differ(entry, meta):
            return f"its layer_metas and layer_db differ on layer {meta.compressed_digest}"
    return ""


def _topmost(diff_ids: list[Digest]) -> list[Digest]:
    return list(dict.fromkeys(reversed(diff_ids)))


def check_config(config: bytes) -> None:
    """Refuse an image config that would make meta_store.json unreadable.

    Raises:
        Unreadable: it is not a JSON object, or nests values too deeply.
    """
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


def decode_entry(entry: msgspec.Raw | None) -> Entry:
    """Decode an entry in order to change it; one that cannot be decoded counts as empty."""
    with suppress(msgspec.DecodeError):
        return msgspec.json.decode(entry, type=Entry) if entry is not None else {}
    return {}


def encode_entry(entry: Entry) -> msgspec.Raw:
    """Encode an entry."""
    return msgspec.Raw(msgspec.json.encode(entry))


def differ(one: StoredLayer, other: StoredLayer) -> bool:
    """Return whether the entries of two layers differ."""
    return (one.store_path, one.uncompressed_digest, one.decoder, one.encrypted) != (
        other.store_path,
        other.uncompressed_digest,
        other.decoder,
        other.encrypted,
    )


def metas_fields(layers: tuple[StoredLayer, ...], image: Entry) -> Entry:
    """Return the `layer_metas` field of an image.

    A layer that occurs twice is written once, at its topmost position: image-rs passes this list to overlayfs.
    """
    before: dict[str, Entry] = {}
    with suppress(KeyError, msgspec.DecodeError):
        for meta in msgspec.json.decode(image["layer_metas"], type=list[Entry]):
            before[msgspec.json.decode(meta["compressed_digest"], type=str)] = meta
    return encoded(
        {
            "layer_metas": [
                before.get(layer.compressed_digest, {}) | layer_fields(layer) for layer in each_once(layers)
            ]
        }
    )


def each_once(layers: tuple[StoredLayer, ...]) -> tuple[StoredLayer, ...]:
    """Return the layers of an image without repetitions; each at its topmost position."""
    once = {layer.compressed_digest: layer for layer in reversed(layers)}
    return tuple(reversed(once.values()))


def name_fields(references: tuple[str, ...]) -> Entry:
    """Return the name fields of an image; `references` is written only if there are several."""
    names: dict[str, object] = {"reference": references[0] if references else ""}
    if len(references) > 1:
        names["references"] = references
    return encoded(names)


def digest_fields(record: ImageRecord) -> Entry:
    """Return the manifest digest fields of an image; `digests` is written only if there are several."""
    digests: dict[str, object] = {"digest": record.manifest_digest}
    if record.other_digests:
        digests["digests"] = record.manifest_digests
    return encoded(digests)


def layer_fields(layer: StoredLayer) -> Entry:
    """Return all fields of a layer's entry."""
    return encoded(
        {
            "decoder": layer.decoder,
            "encrypted": layer.encrypted,
            "compressed_digest": layer.compressed_digest,
            "uncompressed_digest": layer.uncompressed_digest,
            "store_path": layer.store_path,
        }
    )


def encoded(fields: Mapping[str, object]) -> Entry:
    """Encode the values of an entry."""
    return {key: msgspec.Raw(msgspec.json.encode(value, enc_hook=str)) for key, value in fields.items()}
