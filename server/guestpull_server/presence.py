"""What the store has of what is asked for: images that are whole, and whether a policy lets them be used.

Where layers are proved before they are reused, an image is proved before it is: its config must have the digest
that its id is, and its layers must be those of that config. What is not proved counts as not present, so that the
registry is asked for it; an image of another program (image-rs), which keeps no proofs, is taken as it is.
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
    PullPolicy,
    ResolvedImage,
    StoredImage,
    platform_of,
)
from guestpull_server.platforms import Platform
from guestpull_server.registry import ImageSource, Reference
from guestpull_server.store import Store

_log = logging.getLogger(__name__)


class Presence:
    """Asks the store. An image of which a layer is missing does not count as present.

    Args:
        store: what is asked.
        proves: whether an image must be proved.
    """

    def __init__(self, store: Store, *, proves: bool) -> None:
        self._store = store
        self._proves = proves

    def by_policy(self, reference: Reference, platform: Platform, policy: PullPolicy) -> ResolvedImage | None:
        """The image of the store, where the policy lets it be used without asking the registry.

        Raises:
            ImageNotPresent: the registry must not be asked, and there is none.
            ImageChanged: the registry must not be asked, and the image is not what its id says.
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
        """Resolve an image at its source; take it from the store if its manifest is there.

        Raises:
            GuestpullError: as `ImageSource.manifest` and `ImageSource.image`.
        """
        manifest = source.manifest(platform, cancellation)
        stored = self._store.image_by_manifest(manifest.digest)
        # a registry is not asked for the manifest of a pinned reference
        is_confirmed = not source.registry or "@" not in source.reference
        known = _unless_altered(
            lambda: self._usable(stored, source.reference, manifest.digest, is_confirmed=is_confirmed)
        )
        return source.image(manifest, cancellation) if known is None else manifest.from_store(known)

    def has_vanished(self, resolved: ResolvedImage) -> bool:
        """Whether an image that was resolved by the store has lost a layer since."""
        return any(
            not layer.blob.media_type and self._store.layer(layer.blob.digest) is None
            for layer in resolved.layers
        )

    def _unchanged(self, reference: Reference, platform: Platform) -> ResolvedImage | None:
        return _unless_altered(lambda: self._present(reference, platform))

    def _present(self, reference: Reference, platform: Platform) -> ResolvedImage | None:
        """The image that the store has under a reference, if all of its layers are there.

        Raises:
            ImageChanged: it is not what its id says.
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
            return None  # whatever somebody called it
        return self._usable(image, str(reference), manifest, is_confirmed=is_confirmed)

    def _usable(
        self, image: StoredImage | None, reference: str, manifest_digest: Digest, *, is_confirmed: bool
    ) -> ResolvedImage | None:
        if image is None or not self._is_whole(image):
            return None
        config = self._store.proved_config(image) if self._proves else image.config
        resolved = _as_resolved(image, reference, manifest_digest, config)
        return dataclasses.replace(resolved, is_confirmed=is_confirmed)

    def _is_whole(self, image: StoredImage) -> bool:
        return all(
            (stored := self._store.layer(layer.compressed_digest)) is not None
            and stored.uncompressed_digest == layer.uncompressed_digest
            for layer in image.layers
        )


def _unless_altered(find: Callable[[], ResolvedImage | None]) -> ResolvedImage | None:
    """Take an image that is not what its id says for one that is not there: the registry has it."""
    try:
        return find()
    except ImageChanged as error:
        _log.warning("an image was altered", extra={"facts": error.facts()})
        return None


def _as_resolved(image: StoredImage, reference: str, manifest_digest: Digest, config: bytes) -> ResolvedImage:
    """An image of the store as if it had been resolved; media types and sizes of its blobs are not known."""
    layers = tuple(
        LayerDescriptor(Descriptor("", layer.compressed_digest, 0), layer.uncompressed_digest)
        for layer in image.layers
    )
    return ResolvedImage(reference, manifest_digest, image.image_id, config, layers)
