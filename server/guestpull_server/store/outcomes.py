"""What the store answers with, beside what every room knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from guestpull_server.models import Digest


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Who uses what, at one moment."""

    bundles_of_image: Mapping[Digest, tuple[str, ...]]
    images_of_layer: Mapping[Digest, tuple[Digest, ...]]
    bundles_of_layer: Mapping[Digest, int]


@dataclass(frozen=True, slots=True)
class Deleted:
    """Layers that went because nobody used them any more, and the bytes of files that went with them."""

    layers: tuple[Digest, ...] = ()
    freed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Removal:
    """What RemoveImage did: images and names that were forgotten, and what was deleted with them."""

    image_ids: tuple[Digest, ...]
    references: tuple[str, ...]
    deleted_layers: tuple[Digest, ...]
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something that nothing refers to: where it is, what it is, and the bytes of its files."""

    path: str
    what: str
    size_bytes: int
