"""How images are found: by id, by their manifest's digest, by reference; and which platform they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from guestpull_server.errors import AmbiguousImage, ImageNotPresent
from guestpull_server.models import Digest, ImageConfig, Platform
from guestpull_server.store.entries import ImageRecord

_SHORTEST_ID: Final = 12  # digits; as Docker and podman show ids
_HEX: Final = frozenset("0123456789abcdef")


class ImageNames:
    """The images of one store, by all that they are called. Made anew when they change: 1 ms for 2,000."""

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
        """The images of a name: one for each platform."""
        return self._by_reference.get(reference, ())

    def with_manifest(self, digest: str) -> ImageRecord | None:
        """The image that has a manifest."""
        return self._by_manifest.get(digest)

    def exactly(self, text: str, normalised: str | None) -> ImageRecord | None:
        """The image that a whole id, a manifest's digest, or a reference means."""
        found = self._by_id.get(text) or self._by_id.get(f"sha256:{text}") or self._by_manifest.get(text)
        if found is not None or normalised is None:
            return found
        named = self.named(normalised)
        host = Platform.host()
        return next((one for one in named if fits(one.config, host)), named[0] if named else None)

    def beginning_with(self, digits: str) -> Sequence[ImageRecord]:
        """The images whose ids begin so."""
        return [record for record in self._by_id.values() if record.image_id.hex.startswith(digits)]


def find(stores: Sequence[ImageNames], text: str, normalised: str | None) -> tuple[ImageRecord, int]:
    """The image that somebody means, and which of some stores it is in; the first store wins.

    Args:
        stores: where to look.
        text: an image id, whole or its first 12 digits or more, with or without its algorithm; a manifest's
            digest; or a reference.
        normalised: the reference in full, where the text is one.

    Raises:
        ImageNotPresent: there is none.
        AmbiguousImage: a shortened id fits several.
    """
    for number, names in enumerate(stores):
        found = names.exactly(text, normalised)
        if found is not None:
            return found, number
    digits = text.removeprefix("sha256:")
    if len(digits) < _SHORTEST_ID or not _HEX.issuperset(digits):
        raise ImageNotPresent(text)
    matches: dict[Digest, tuple[ImageRecord, int]] = {}
    for number, names in enumerate(stores):
        for record in names.beginning_with(digits):
            matches.setdefault(record.image_id, (record, number))
    if not matches:
        raise ImageNotPresent(text)
    if len(matches) > 1:
        raise AmbiguousImage(text, len(matches))
    return next(iter(matches.values()))


def fits(config: bytes, platform: Platform) -> bool:
    """Whether an image is for a platform; a variant that one side leaves open fits any."""
    try:
        built_for = msgspec.json.decode(config, type=ImageConfig).platform
    except msgspec.DecodeError:
        return False
    return (
        built_for.os == platform.os
        and built_for.architecture in ("", platform.architecture)
        and (not built_for.variant or not platform.variant or built_for.variant == platform.variant)
    )


def repository(reference: str) -> str:
    """A reference without tag and digest."""
    name = reference.partition("@")[0]
    head, slash, last = name.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}"
