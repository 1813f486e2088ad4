"""The interface that all sources of images share, registries and local files alike.

An image is read in two steps, so that the caller can look in its store in between:

    manifest = source.manifest(platform, cancellation)    # at most one small request
    image = source.image(manifest, cancellation)          # the manifest, if it was not read yet, and the config
    with source.open_blob(image.layers[0].blob, cancellation) as stream:
        ...
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from guestpull_server.cancellation import Cancellation
from guestpull_server.models import Descriptor, Digest, ResolvedImage, platform_of
from guestpull_server.platforms import Platform
from guestpull_server.registry.manifests import Document, check_platform


@dataclass(frozen=True, slots=True)
class ResolvedManifest:
    """The digest that a reference stands for, and what was read to find it.

    Attributes:
        digest: of the manifest; of a pinned reference or a nested index, possibly that of an index.
        platform: the requested platform.
        document: the manifest; None if it was not read.
        image: the whole image; None unless the choice of the manifest depended on its config.
        index: the image index that led here; empty if none was read.
    """

    digest: Digest
    platform: Platform
    document: Document | None = None
    image: ResolvedImage | None = None
    index: bytes = b""

    def from_store(self, image: ResolvedImage) -> ResolvedImage:
        """Use an image of the store that has this manifest, instead of reading it from the source.

        Raises:
            UnsupportedImage: the image is for another operating system than Linux.
            NoMatchingPlatform: the image is for another platform.
        """
        check_platform(image.reference, platform_of(image.config), self.platform)
        return dataclasses.replace(image, index=self.index)


class ImageSource(Protocol):
    """Access to one image at a registry or in a local file."""

    @property
    def reference(self) -> str:
        """The name to store the image under; empty if the source has none."""

    @property
    def registry(self) -> str:
        """`host[:port]` of the registry that the reference names; empty for a local file."""

    def manifest(self, platform: Platform, cancellation: Cancellation) -> ResolvedManifest:
        """Find the manifest of the image for a platform.

        Raises:
            GuestpullError: the image does not exist, or cannot be read.
        """

    def image(self, manifest: ResolvedManifest, cancellation: Cancellation) -> ResolvedImage:
        """Read the image that a manifest describes.

        Raises:
            GuestpullError: the image cannot be read, or does not run on the platform.
        """

    def open_blob(self, blob: Descriptor, cancellation: Cancellation) -> BlobStream:
        """Open a blob of the image. Thread-safe: several blobs can be read concurrently."""


class BlobStream(Protocol):
    """The bytes of one blob, in order. A context manager that releases all resources on exit."""

    @property
    def received_bytes(self) -> int:
        """The number of bytes received so far, including those received twice."""

    def read(self, limit: int) -> bytes:
        """Return the next bytes, at most `limit`; empty at the end.

        The end is reported only after size and digest of the whole blob were verified.

        Raises:
            DigestMismatch: the bytes do not have the descriptor's digest.
            SizeMismatch: there are more or fewer bytes than the descriptor says.
            GuestpullError: the bytes cannot be read.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def fetch_image(source: ImageSource, platform: Platform, cancellation: Cancellation) -> ResolvedImage:
    """Resolve an image at its source only.

    Raises:
        GuestpullError: as `ImageSource.manifest` and `ImageSource.image`.
    """
    return source.image(source.manifest(platform, cancellation), cancellation)
