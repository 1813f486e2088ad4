"""The results of calls: the messages of image_service.proto as frozen data classes.

Sizes are in bytes, digests are `sha256:<hex>`, paths are absolute in the service's mount namespace.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias


class PullPolicy(Enum):
    """When to contact the registry; names and values are the .proto's."""

    UNSPECIFIED = 0
    ALWAYS = 1
    IF_NOT_PRESENT = 2
    NEVER = 3


@dataclass(frozen=True, slots=True)
class PulledLayer:
    """One layer of a pull."""

    compressed_digest: str
    uncompressed_digest: str
    reused: bool
    downloaded_bytes: int


@dataclass(frozen=True, slots=True)
class PulledImage:
    """A pulled image in its bundle. `layers` is bottom-most first."""

    image_id: str
    manifest_digest: str
    reference: str
    rootfs_path: str
    downloaded_bytes: int
    layers: tuple[PulledLayer, ...]


@dataclass(frozen=True, slots=True)
class ResolvedLayer:
    """A layer that a pull needs; its size is 0 if the image comes from the store."""

    compressed_digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """Event: the reference was resolved to a manifest."""

    reference: str
    image_id: str
    manifest_digest: str
    layers: tuple[ResolvedLayer, ...]


@dataclass(frozen=True, slots=True)
class LayerProgress:
    """Event: compressed bytes of a layer received so far, and in total."""

    compressed_digest: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class LayerDone:
    """Event: a layer is in the store."""

    compressed_digest: str
    reused: bool
    downloaded_bytes: int


@dataclass(frozen=True, slots=True)
class Mounted:
    """Event: the root filesystem is mounted."""

    rootfs_path: str


PullEvent: TypeAlias = Resolved | LayerProgress | LayerDone | Mounted | PulledImage
"""The events of a pull with progress; the last one is the PulledImage."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image of the store. `layers` are compressed digests, bottom-most first."""

    id: str
    digest: str
    reference: str
    references: tuple[str, ...]
    layers: tuple[str, ...]
    size_bytes: int
    platform: str
    bundles: tuple[str, ...]
    read_only_store: str


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the store; `bundles` is the number of bundles that use it."""

    compressed_digest: str
    uncompressed_digest: str
    decoder: str
    encrypted: bool
    store_path: str
    size_bytes: int
    images: tuple[str, ...]
    bundles: int
    present: bool
    read_only: bool


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was created and not released."""

    bundle_path: str
    image_id: str
    reference: str
    mounted: bool


@dataclass(frozen=True, slots=True)
class Removal:
    """The result of removing an image. `image_ids` is empty if only one of several references was removed."""

    image_ids: tuple[str, ...]
    references: tuple[str, ...]
    deleted_layers: tuple[str, ...]
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Release:
    """The layers that were deleted along with a released bundle."""

    deleted_layers: tuple[str, ...]
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Collection:
    """The layers that garbage collection deleted or, with `dry_run`, would delete."""

    deleted_layers: tuple[str, ...]
    freed_bytes: int
