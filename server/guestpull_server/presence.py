"""What the store has of what is asked for: images that are whole, and whether a policy lets them be used."""

from __future__ import annotations

import msgspec

from guestpull_server.errors import ImageNotPresent
from guestpull_server.models import (
    Descriptor,
    Digest,
    ImageConfig,
    LayerDescriptor,
    Platform,
    PullPolicy,
    ResolvedImage,
    StoredImage,
)
from guestpull_server.registry import Reference
from guestpull_server.store import Store


class Presence:
    """Asks the store. An image of which a layer is missing does not count as present."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def by_policy(self, reference: Reference, platform: Platform, policy: PullPolicy) -> ResolvedImage | None:
        """The image of the store, where the policy lets it be used without asking the registry.

        Raises:
            ImageNotPresent: the registry must not be asked, and there is none.
        """
        match policy:
            case PullPolicy.ALWAYS:
                return None
            case PullPolicy.UNSPECIFIED:
                return self._present(reference, platform) if reference.digest else None
            case PullPolicy.IF_NOT_PRESENT:
                return self._present(reference, platform)
            case PullPolicy.NEVER:
                present = self._present(reference, platform)
                if present is None:
                    raise ImageNotPresent(str(reference))
                return present

    def known(self, manifest_digest: Digest, reference: str) -> ResolvedImage | None:
        """The image of a manifest, under the name that it is asked for by."""
        image = self._store.image_by_manifest(manifest_digest)
        return _as_resolved(image, reference) if image is not None and self._is_whole(image) else None

    def has_vanished(self, resolved: ResolvedImage) -> bool:
        """Whether an image that was resolved by the store has lost a layer since."""
        return any(
            not layer.blob.media_type and self._store.layer(layer.blob.digest) is None
            for layer in resolved.layers
        )

    def _present(self, reference: Reference, platform: Platform) -> ResolvedImage | None:
        """The image that the store has under a reference, if all of its layers are there."""
        image = self._store.image_for(str(reference), platform)
        if image is None and reference.digest is not None:
            image = self._store.image_by_manifest(reference.digest)
            if image is not None and not _fits(image, platform):
                return None
        return _as_resolved(image, str(reference)) if image is not None and self._is_whole(image) else None

    def _is_whole(self, image: StoredImage) -> bool:
        return all(
            (stored := self._store.layer(layer.compressed_digest)) is not None
            and stored.uncompressed_digest == layer.uncompressed_digest
            for layer in image.layers
        )


def _as_resolved(image: StoredImage, reference: str) -> ResolvedImage:
    """An image of the store as if it had been resolved; media types and sizes of its blobs are not known."""
    layers = tuple(
        LayerDescriptor(Descriptor("", layer.compressed_digest, 0), layer.uncompressed_digest)
        for layer in image.layers
    )
    return ResolvedImage(reference, image.manifest_digest, image.image_id, image.config, layers)


def _fits(image: StoredImage, platform: Platform) -> bool:
    built_for = msgspec.json.decode(image.config, type=ImageConfig).platform
    return (built_for.os, built_for.architecture) == (platform.os, platform.architecture)
