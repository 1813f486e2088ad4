"""Parses and validates manifests, indexes and image configs, and rejects what is not a runnable image.

Follows the OCI image specification (manifest.md, image-index.md, config.md) and Docker's image manifest V2,
schema 2. The caller has verified the digest of the bytes, but their content is untrusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from guestpull_server.errors import (
    InvalidDigest,
    InvalidManifest,
    LimitExceeded,
    NoMatchingPlatform,
    UnsupportedImage,
)
from guestpull_server.models import Descriptor, Digest, ImageConfig, LayerDescriptor
from guestpull_server.platforms import Platform

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
ACCEPTED: Final = f"{OCI_MANIFEST}, {OCI_INDEX}, {DOCKER_MANIFEST}, {DOCKER_LIST}"

_INDEXES: Final = frozenset({OCI_INDEX, DOCKER_LIST})
_MANIFESTS: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
_SCHEMA_1: Final = "application/vnd.docker.distribution.manifest.v1+"
_LAYER_PREFIXES: Final = (
    OCI_LAYER,
    "application/vnd.docker.image.rootfs.diff.tar",
    # ordinary layers if the registry has them (OCI image-spec 1.1, layer.md); `urls` are ignored
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)


class _Platform(msgspec.Struct, frozen=True):
    os: str = ""
    architecture: str = ""
    variant: str = ""


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    platform: _Platform | None = None
    artifact_type: str | None = None
    annotations: dict[str, str] | None = None


class _Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """The fields of a manifest or an index."""

    schema_version: int = 2
    media_type: str = ""
    artifact_type: str | None = None
    config: _Descriptor | None = None
    layers: list[_Descriptor] | None = None
    manifests: list[_Descriptor] | None = None
    fs_layers: object = None  # of schema 1


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """The manifest of an image. The layers are bottom-most first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """An image in an index, with its platform if the index gives one."""

    descriptor: Descriptor
    platform: Platform | None


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """An image index."""

    entries: tuple[IndexEntry, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """The bytes of a manifest or index, and the reference that errors name."""

    reference: str
    digest: Digest
    content: bytes
    content_type: str


def read(document: Document, max_layers: int) -> ImageManifest | ImageIndex:
    """Parse a manifest or an index.

    Raises:
        UnsupportedImage: the document is something else; the error says what.
        InvalidManifest: the document does not follow its specification.
        LimitExceeded: the image has too many layers.
    """
    parsed = _parse(document)
    if _is_index(document, parsed):
        return _index(document, parsed)
    return _manifest(document, parsed, max_layers)


def _parse(document: Document) -> _Manifest:
    try:
        return msgspec.json.decode(document.content, type=_Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(document.reference, document.digest, str(error)) from None


def _is_index(document: Document, parsed: _Manifest) -> bool:
    """Tell an index from a manifest by the fields present; the media type must not contradict them.

    Content-Type is often wrong, so it is used only if the document has no mediaType. Reject a document that can be
    read as both kinds (CVE-2021-41190).
    """
    media_type = parsed.media_type or document.content_type.partition(";")[0].strip()
    if parsed.schema_version == 1 or parsed.fs_layers is not None or media_type.startswith(_SCHEMA_1):
        raise UnsupportedImage(document.reference, "it is a Docker schema 1 manifest")
    is_manifest = parsed.config is not None or parsed.layers is not None
    is_index = parsed.manifests is not None
    if is_manifest and is_index:
        raise InvalidManifest(document.reference, document.digest, "it is both a manifest and an index")
    if (is_manifest and media_type in _INDEXES) or (is_index and media_type in _MANIFESTS):
        raise InvalidManifest(
            document.reference, document.digest, f"its media type {media_type} contradicts its content"
        )
    if is_index or parsed.config is not None:
        return is_index
    if media_type and media_type not in _INDEXES | _MANIFESTS:
        raise UnsupportedImage(document.reference, f"it has media type {media_type}")
    raise InvalidManifest(document.reference, document.digest, "it is neither a manifest nor an index")


def _index(document: Document, parsed: _Manifest) -> ImageIndex:
    entries: list[IndexEntry] = []
    for entry in parsed.manifests or ():
        if entry.media_type and entry.media_type not in _INDEXES | _MANIFESTS:
            continue
        if entry.artifact_type and entry.platform is None:
            continue  # a signature or other artifact
        platform = None
        if entry.platform is not None:
            platform = Platform(entry.platform.os, entry.platform.architecture, entry.platform.variant)
        entries.append(IndexEntry(_descriptor(document, entry), platform))
    return ImageIndex(tuple(entries))


def _manifest(document: Document, parsed: _Manifest, max_layers: int) -> ImageManifest:
    assert parsed.config is not None
    if parsed.config.media_type not in (OCI_CONFIG, DOCKER_CONFIG):
        found = parsed.artifact_type or parsed.config.media_type or "without a type"
        raise UnsupportedImage(document.reference, f"it is an artifact ({found}), not an image")
    layers = tuple(_layer(document, layer) for layer in parsed.layers or ())
    if len(layers) > max_layers:
        raise LimitExceeded(f"{document.reference}: the number of layers", "max_layers", max_layers)
    return ImageManifest(_descriptor(document, parsed.config), layers)


def _layer(document: Document, layer: _Descriptor) -> Descriptor:
    media_type = layer.media_type
    if media_type.endswith("+encrypted"):
        raise UnsupportedImage(document.reference, f"layer {layer.digest} is encrypted ({media_type})")
    if not media_type.startswith(_LAYER_PREFIXES):
        raise UnsupportedImage(
            document.reference, f"layer {layer.digest} has media type {media_type or 'none'}"
        )
    return _descriptor(document, layer)


def _descriptor(document: Document, found: _Descriptor) -> Descriptor:
    if not 0 <= found.size < 1 << 63:
        raise InvalidManifest(document.reference, document.digest, f"{found.digest} has size {found.size}")
    try:
        return Descriptor(found.media_type, Digest(found.digest), found.size, found.annotations or {})
    except InvalidDigest as error:
        raise InvalidManifest(
            document.reference, document.digest, f"invalid digest {error.digest!r}"
        ) from None


# -- platforms ---------------------------------------------------------------------------------------------


def candidates(reference: str, index: ImageIndex, requested: Platform) -> tuple[Descriptor, ...]:
    """Return the entries of an index that can be the image for a platform.

    This is the entry that runs on the platform at the smallest Platform.distance, the first of equals. If there is
    none, these are all entries without a platform, such as nested indexes; the caller must examine each.

    Raises:
        NoMatchingPlatform: no entry matches; the error lists the available platforms.
    """
    best: tuple[int, Descriptor] | None = None
    for entry in index.entries:
        rank = None if entry.platform is None else requested.distance(entry.platform)
        if rank is not None and (best is None or rank < best[0]):
            best = rank, entry.descriptor
    if best is not None:
        return (best[1],)
    without_platform = tuple(entry.descriptor for entry in index.entries if entry.platform is None)
    if without_platform:
        return without_platform
    available = [
        entry.platform for entry in index.entries if entry.platform and entry.platform.os != "unknown"
    ]
    raise NoMatchingPlatform(reference, str(requested), ", ".join(dict.fromkeys(map(str, available))))


def check_platform(reference: str, built_for: Platform, requested: Platform) -> None:
    """Verify that an image runs on the requested platform.

    Raises:
        UnsupportedImage: the image is for another operating system than Linux.
        NoMatchingPlatform: the image is for another platform.
    """
    if built_for.os != requested.os and requested.os == "linux":
        raise UnsupportedImage(reference, f"it is built for {built_for.os} ({built_for})")
    if not requested.runs(built_for):
        raise NoMatchingPlatform(reference, str(requested), str(built_for))


# -- configs -----------------------------------------------------------------------------------------------


def read_config(reference: str, digest: Digest, content: bytes) -> ImageConfig:
    """Parse an image config.

    Raises:
        InvalidManifest: the config does not follow its specification.
    """
    try:
        return msgspec.json.decode(content, type=ImageConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(reference, digest, str(error)) from None


def pair_layers(
    reference: str, digest: Digest, manifest: ImageManifest, config: ImageConfig
) -> tuple[LayerDescriptor, ...]:
    """Pair the manifest's blobs with the config's diff_ids.

    Raises:
        InvalidManifest: their numbers differ, or a diff_id is not a digest.
    """
    diff_ids = (config.rootfs.diff_ids if config.rootfs else None) or []
    if len(diff_ids) != len(manifest.layers):
        problem = f"the config has {len(diff_ids)} diff_ids, the manifest {len(manifest.layers)} layers"
        raise InvalidManifest(reference, digest, problem)
    try:
        return tuple(
            LayerDescriptor(blob, Digest(diff_id))
            for blob, diff_id in zip(manifest.layers, diff_ids, strict=True)
        )
    except InvalidDigest as error:
        raise InvalidManifest(reference, digest, f"invalid diff_id {error.digest!r}") from None
