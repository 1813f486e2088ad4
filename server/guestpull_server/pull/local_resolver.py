"""Resolves references from the local store, subject to the pull policy.

An image is not used if one of its layers is missing. If images are verified before use, the digest of the config
must be the image's id, and the layers must be those of the config. An image that fails counts as absent, so that
the registry is used instead. An image that another program (image-rs) stored has nothing to verify it against;
it is used as it is.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from guestpull_server.cancellation import Cancellation
from guestpull_server.errors import ImageChanged, ImageNotPresent
from guestpull_server.models import (
    Descriptor,
    Digest,
    LayerDescriptor,
    Origin,
    PullPolicy,
    ResolvedImage,
    StoredImage,
    platform_of,
)
from guestpull_server.platforms import Platform
from guestpull_server.registry import ImageSource, Reference
from guestpull_server.store import Store

_log = logging.getLogger(__name__)


class LocalResolver:
    """Resolves references from one store. Thread-safe.

    Args:
        store: holds the images.
        verifies: whether to verify an image before it is used.
    """

    def __init__(self, store: Store, *, verifies: bool) -> None:
        self._store = store
        self._verifies = verifies

    def by_policy(self, reference: Reference, platform: Platform, policy: PullPolicy) -> ResolvedImage | None:
        """Return an image of the store if the policy allows using it without contacting the registry.

        Raises:
            ImageNotPresent: the policy is NEVER, and the store does not have the image.
            ImageChanged: the policy is NEVER, and the image does not match its id.
        """
        match policy:
            case PullPolicy.ALWAYS:
                return None
            case PullPolicy.UNSPECIFIED:
                return self._unchanged(reference, platform) if reference.digest else None
            case PullPolicy.IF_NOT_PRESENT:
                return self._unchanged(reference, platform)
            case PullPolicy.NEVER:
                present = self._present(reference, platform)
                if present is None:
                    raise ImageNotPresent(str(reference))
                return present

    def resolve(self, source: ImageSource, platform: Platform, cancellation: Cancellation) -> ResolvedImage:
        """Resolve an image at its source. Use the image of the store if that has the manifest.

        Raises:
            GuestpullError: as `ImageSource.manifest` and `ImageSource.image`.
        """
        manifest = source.manifest(platform, cancellation)
        stored = self._store.image_by_manifest(manifest.digest)
        # for a pinned reference, the registry was not contacted
        is_confirmed = not source.registry or "@" not in source.reference
        known = _unless_altered(
            lambda: self._usable(stored, source.reference, manifest.digest, is_confirmed=is_confirmed)
        )
        return source.image(manifest, cancellation) if known is None else manifest.from_store(known)

    def is_incomplete(self, image: ResolvedImage) -> bool:
        """Return whether a layer of an image that was found in the store was removed since."""
        return image.origin is Origin.STORE and any(
            self._store.layer(layer.blob.digest) is None for layer in image.layers
        )

    def _unchanged(self, reference: Reference, platform: Platform) -> ResolvedImage | None:
        return _unless_altered(lambda: self._present(reference, platform))

    def _present(self, reference: Reference, platform: Platform) -> ResolvedImage | None:
        """Return the image with a reference if the store has all of its layers.

        Raises:
            ImageChanged: the image does not match its id.
        """
        image = self._store.image_for(str(reference), platform)
        is_confirmed = image is not None
        if image is None and reference.digest is not None:
            image = self._store.image_by_manifest(reference.digest)
            if image is not None and not platform.runs(platform_of(image.config)):
                return None
        if image is None:
            return None
        manifest: Digest | None = image.manifest_digest
        if reference.digest is not None:
            manifest = self._store.manifest_for_pin(image, reference.digest)
        if manifest is None:
            return None  # the reference is pinned to another image's digest
        return self._usable(image, str(reference), manifest, is_confirmed=is_confirmed)

    def _usable(
        self, image: StoredImage | None, reference: str, manifest_digest: Digest, *, is_confirmed: bool
    ) -> ResolvedImage | None:
        if image is None or not self._is_whole(image):
            return None
        config = self._store.proved_config(image) if self._verifies else image.config
        resolved = _as_resolved(image, reference, manifest_digest, config)
        return dataclasses.replace(resolved, is_confirmed=is_confirmed)

    def _is_whole(self, image: StoredImage) -> bool:
        return all(
            (stored := self._store.layer(layer.compressed_digest)) is not None
            and stored.uncompressed_digest == layer.uncompressed_digest
            for layer in image.layers
        )


def _unless_altered(find: Callable[[], ResolvedImage | None]) -> ResolvedImage | None:
    """Treat an image that does not match its id as absent, so that the registry is used."""
    try:
        return find()
    except ImageChanged as error:
        _log.warning("an image was altered", extra={"fields": error.facts()})
        return None


def _as_resolved(image: StoredImage, reference: str, manifest_digest: Digest, config: bytes) -> ResolvedImage:
    """Describe an image of the store as a resolved image."""
    layers = tuple(
        LayerDescriptor(Descriptor("", layer.compressed_digest, 0), layer.uncompressed_digest)
        for layer in image.layers
    )
    return ResolvedImage(reference, manifest_digest, image.image_id, config, layers, origin=Origin.STORE)
