"""Manifests, indexes and image configs: read, checked, and told apart from what cannot be run here.

Follows the OCI image specification (manifest.md, image-index.md, config.md) and Docker's image manifest V2,
schema 2. The bytes have been checked against their digest when they come here; what they say has not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
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
    # layers like any other where a registry has them (OCI image-spec 1.1, layer.md); their `urls` are not followed
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
    """A manifest or an index: which one is told by what it has."""

    schema_version: int = 2
    media_type: str = ""
    artifact_type: str | None = None
    config: _Descriptor | None = None
    layers: list[_Descriptor] | None = None
    manifests: list[_Descriptor] | None = None
    fs_layers: object = None  # of schema 1


class Kind(Enum):
    """What a document is."""

    MANIFEST = "manifest"
    INDEX = "index"


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """An image's manifest: its config, and its layers' blobs, bottom-most first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """An image in an index, with its platform if the index gives one."""

    descriptor: Descriptor
    platform: Platform | None


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """An index: the images in it."""

    entries: tuple[IndexEntry, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Some bytes that a registry gave for a manifest, and what they are called in errors."""

    reference: str
    digest: Digest
    content: bytes
    content_type: str


def read(document: Document, max_layers: int) -> ImageManifest | ImageIndex:
    """Read a manifest or an index.

    Raises:
        UnsupportedImage: it is something else; the error says what.
        InvalidManifest: it is not as its specification says.
        LimitExceeded: it has more layers than allowed.
    """
    parsed = _parse(document)
    kind = _kind(document, parsed)
    match kind:
        case Kind.INDEX:
            return _index(document, parsed)
        case Kind.MANIFEST:
            return _manifest(document, parsed, max_layers)


def _parse(document: Document) -> _Manifest:
    try:
        return msgspec.json.decode(document.content, type=_Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(document.reference, document.digest, str(error)) from None


def _kind(document: Document, parsed: _Manifest) -> Kind:
    """What it is: its shape decides, and what it says of itself must not contradict that.

    Registries' Content-Type lies most often, so that it counts only where the document has no mediaType; one
    that could be read as either kind is neither (CVE-2021-41190).
    """
    said = parsed.media_type or document.content_type.partition(";")[0].strip()
    if parsed.schema_version == 1 or parsed.fs_layers is not None or said.startswith(_SCHEMA_1):
        raise UnsupportedImage(document.reference, "it is a Docker schema 1 manifest, given up in 2017")
    is_manifest = parsed.config is not None or parsed.layers is not None
    is_index = parsed.manifests is not None
    if is_manifest and is_index:
        raise InvalidManifest(document.reference, document.digest, "it is both a manifest and an index")
    if (is_manifest and said in _INDEXES) or (is_index and said in _MANIFESTS):
        raise InvalidManifest(document.reference, document.digest, f"it is no {said}, though it says so")
    if is_index:
        return Kind.INDEX
    if parsed.config is not None:
        return Kind.MANIFEST
    if said and said not in _INDEXES | _MANIFESTS:
        raise UnsupportedImage(document.reference, f"it is of media type {said}")
    raise InvalidManifest(document.reference, document.digest, "it is neither a manifest nor an index")


def _index(document: Document, parsed: _Manifest) -> ImageIndex:
    entries: list[IndexEntry] = []
    for entry in parsed.manifests or ():
        if entry.media_type and entry.media_type not in _INDEXES | _MANIFESTS:
            continue
        if entry.artifact_type and entry.platform is None:
            continue  # a signature, or another thing that belongs to an image
        platform = None
        if entry.platform is not None:
            platform = Platform(entry.platform.os, entry.platform.architecture, entry.platform.variant)
        entries.append(IndexEntry(_descriptor(document, entry), platform))
    return ImageIndex(tuple(entries))


def _manifest(document: Document, parsed: _Manifest, max_layers: int) -> ImageManifest:
    assert parsed.config is not None
    if parsed.config.media_type not in (OCI_CONFIG, DOCKER_CONFIG):
        found = parsed.artifact_type or parsed.config.media_type or "of no type"
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
            document.reference, f"layer {layer.digest} is of media type {media_type or 'none'}"
        )
    return _descriptor(document, layer)


def _descriptor(document: Document, found: _Descriptor) -> Descriptor:
    if not 0 <= found.size < 1 << 63:
        raise InvalidManifest(document.reference, document.digest, f"{found.digest} has size {found.size}")
    try:
        return Descriptor(found.media_type, Digest(found.digest), found.size, found.annotations or {})
    except InvalidDigest as error:
        raise InvalidManifest(document.reference, document.digest, f"{error.digest!r} is no digest") from None


# -- platforms ---------------------------------------------------------------------------------------------


def candidates(reference: str, index: ImageIndex, wanted: Platform) -> tuple[Descriptor, ...]:
    """What in an index may be the image for a platform: one, or several of which each must be looked at.

    It is the nearest one that the platform runs (Platform.distance); of equals the first. Where nothing fits, it
    is the entries that do not say what they are for, such as nested indexes.

    Raises:
        NoMatchingPlatform: there is none; the error lists what there is.
    """
    best: tuple[int, Descriptor] | None = None
    for entry in index.entries:
        rank = None if entry.platform is None else wanted.distance(entry.platform)
        if rank is not None and (best is None or rank < best[0]):
            best = rank, entry.descriptor
    if best is not None:
        return (best[1],)
    unsaid = tuple(entry.descriptor for entry in index.entries if entry.platform is None)
    if unsaid:
        return unsaid
    said = [entry.platform for entry in index.entries if entry.platform and entry.platform.os != "unknown"]
    raise NoMatchingPlatform(reference, str(wanted), ", ".join(dict.fromkeys(map(str, said))))


def check_platform(reference: str, built_for: Platform, wanted: Platform) -> None:
    """Refuse an image that the platform that was asked for does not run.

    Raises:
        UnsupportedImage: it is for another operating system than Linux.
        NoMatchingPlatform: it is for another platform.
    """
    if built_for.os != wanted.os and wanted.os == "linux":
        raise UnsupportedImage(reference, f"it is for {built_for.os} ({built_for})")
    if not wanted.runs(built_for):
        raise NoMatchingPlatform(reference, str(wanted), str(built_for))


# -- configs -----------------------------------------------------------------------------------------------


def read_config(reference: str, digest: Digest, content: bytes) -> ImageConfig:
    """Read an image config.

    Raises:
        InvalidManifest: it is not as its specification says.
    """
    try:
        return msgspec.json.decode(content, type=ImageConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(reference, digest, str(error)) from None


def pair_layers(
    reference: str, digest: Digest, manifest: ImageManifest, config: ImageConfig
) -> tuple[LayerDescriptor, ...]:
    """Put the manifest's blobs and the config's diff_ids together.

    Raises:
        InvalidManifest: they are not as many, or a diff_id is no digest.
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
        raise InvalidManifest(reference, digest, f"diff_id {error.digest!r} is no digest") from None
