"""Resolves references and reads blobs with the registry room, as a pull does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.models import Credentials, Descriptor, Digest, ResolvedImage
from guestpull_server.platforms import Platform
from guestpull_server.registry import ImageSource, Reference, RegistryClient
from support.images import Layer
from support.waiting import PATIENCE

AMD64: Final = Platform("linux", "amd64")
PATIENT: Final = Limits(
    connect_timeout=PATIENCE,
    read_timeout=PATIENCE,
    max_retry_delay=0.02,
    max_attempts=4,
    min_bytes_per_second=0,
)
"""Limits for registries that send errors: retry soon, and never because of a slow response."""

IMPATIENT: Final = msgspec.structs.replace(
    PATIENT, connect_timeout=0.5, read_timeout=0.3, min_bytes_per_second=10_000
)
"""Limits for registries that do not respond: time out soon.

On a busy machine a working registry may be too slow for them, so do not check the number of requests.
"""

ClientOf: TypeAlias = Callable[..., RegistryClient]
"""Creates a client with settings of the configuration."""


class Pull:
    """Pulls with one client."""

    def __init__(self, client: RegistryClient, cancellation: Cancellation | None = None) -> None:
        self._client = client
        self._cancellation = cancellation or Cancellation("pull")

    def source(self, reference: str, credentials: Credentials | None = None) -> ImageSource:
        """The image of a reference."""
        return self._client.image(Reference.parse(reference), credentials)

    def resolve(
        self,
        reference: str,
        platform: Platform = AMD64,
        *,
        credentials: Credentials | None = None,
        stored: Callable[[Digest], ResolvedImage | None] = lambda _digest: None,
    ) -> ResolvedImage:
        """Parse a reference."""
        source = self.source(reference, credentials)
        manifest = source.manifest(platform, self._cancellation)
        known = stored(manifest.digest)
        return source.image(manifest, self._cancellation) if known is None else manifest.from_store(known)

    def blob(self, reference: str, layer: Layer, *, credentials: Credentials | None = None) -> bytes:
        """All bytes of a layer's blob."""
        return read_blob(self.source(reference, credentials), layer, self._cancellation)


def descriptor_of(layer: Layer) -> Descriptor:
    """The descriptor of a layer's blob."""
    return Descriptor(layer.media_type, Digest(layer.digest), layer.size)


def read_blob(source: ImageSource, layer: Layer, cancellation: Cancellation | None = None) -> bytes:
    """All bytes of a layer's blob, read from a source."""
    with source.open_blob(descriptor_of(layer), cancellation or Cancellation("pull")) as stream:
        return b"".join(iter(lambda: stream.read(64 * 1024), b""))
