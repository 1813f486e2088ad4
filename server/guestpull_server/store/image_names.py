"""Find images by id, by manifest digest, by reference, and by platform."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeVar

from guestpull_server.errors import AmbiguousImage, ImageNotPresent
from guestpull_server.models import Digest, StoredImage, platform_of, without_password
from guestpull_server.platforms import Platform
from guestpull_server.store.entries import ImageRecord

_SHORTEST_ID: Final = 12  # digits; the length in which Docker and podman show ids
_HEX: Final = frozenset("0123456789abcdef")
_Image = TypeVar("_Image", ImageRecord, StoredImage)


class ImageNames:
    """An index of one store's images. Built anew when they change: 1 ms for 2,000 images."""

    def __init__(self, images: Mapping[Digest, ImageRecord]) -> None:
        self._by_id: dict[str, ImageRecord] = dict(images.items())
        self._by_manifest: dict[str, ImageRecord] = {}
        self._by_reference: dict[str, list[ImageRecord]] = {}
        for record in images.values():
            for digest in record.other_digests:
                self._by_manifest[digest] = record
        for record in images.values():
            self._by_manifest[record.manifest_digest] = record
            for reference in record.references:
                self._by_reference.setdefault(reference, []).append(record)

    def named(self, reference: str) -> Sequence[ImageRecord]:
        """Return the images that have a name: one for each platform."""
        return self._by_reference.get(reference, ())

    def with_manifest(self, digest: str) -> ImageRecord | None:
        """Return the image that has a manifest, or None."""
        return self._by_manifest.get(digest)

    def exactly(self, text: str, normalised: str | None) -> ImageRecord | None:
        """Return the image with this full id, manifest digest, or reference, or None."""
        found = self._by_id.get(text) or self._by_id.get(f"sha256:{text}") or self._by_manifest.get(text)
        if found is not None or normalised is None:
            return found
        named = self.named(normalised)
        return best_fit(named, Platform.host()) or (named[0] if named else None)

    def beginning_with(self, digits: str) -> Sequence[ImageRecord]:
        """Return the images whose ids start with these digits."""
        return [record for record in self._by_id.values() if record.image_id.hex.startswith(digits)]


def find(stores: Sequence[ImageNames], text: str, normalised: str | None) -> tuple[ImageRecord, int]:
    """Return the image that a text identifies, and the number of its store; the first store wins.

    Args:
        stores: where to look.
        text: a full image id, or at least its first 12 digits, with or without the algorithm; a manifest digest;
            or a reference.
        normalised: the full reference, if the text is one.

    Raises:
        ImageNotPresent: no image matches.
        AmbiguousImage: several images match a shortened id.
    """
    for number, names in enumerate(stores):
        found = names.exactly(text, normalised)
        if found is not None:
            return found, number
    digits = text.removeprefix("sha256:")
    if len(digits) < _SHORTEST_ID or not _HEX.issuperset(digits):
        raise ImageNotPresent(without_password(text))
    matches: dict[Digest, tuple[ImageRecord, int]] = {}
    for number, names in enumerate(stores):
        for record in names.beginning_with(digits):
            matches.setdefault(record.image_id, (record, number))
    if not matches:
        raise ImageNotPresent(text)
    if len(matches) > 1:
        raise AmbiguousImage(text, len(matches))
    return next(iter(matches.values()))


def best_fit(images: Iterable[_Image], platform: Platform) -> _Image | None:
    """Return the image that fits a platform best, the first of equals; None if none fits."""
    offered = [(platform_of(image.config), image) for image in images]
    run = [(platform.distance(built_for), image) for built_for, image in offered if platform.runs(built_for)]
    # no distance: the image has no architecture, or an unknown variant
    return min(run, key=lambda one: math.inf if one[0] is None else one[0], default=(None, None))[1]


def is_same(one: Platform, other: Platform) -> bool:
    """Return whether two images of these platforms cannot share a name; an empty field matches any value."""
    return (
        one.os == other.os
        and _agree(one.architecture, other.architecture)
        and _agree(one.variant, other.variant)
    )


def _agree(one: str, other: str) -> bool:
    return not one or not other or one == other


def repository(reference: str) -> str:
    """Return a reference without tag and digest."""
    name = reference.partition("@")[0]
    head, slash, last = name.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}"
