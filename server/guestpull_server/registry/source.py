"""What a pull needs of wherever an image comes from, be it a registry or a file."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TypeAlias

from guestpull_server.cancellation import Cancellation
from guestpull_server.models import Descriptor, Digest, ResolvedImage
from guestpull_server.platforms import Platform

Stored: TypeAlias = Callable[[Digest], ResolvedImage | None]
"""Asked with a manifest's digest before anything more is fetched: who knows the image already says what it is."""


class ImageSource(Protocol):
    """Where one image comes from: a registry, or a local file."""

    @property
    def reference(self) -> str:
        """The name that the image is to be stored under; empty if its source does not say."""

    def resolve(self, platform: Platform, cancellation: Cancellation, stored: Stored) -> ResolvedImage:
        """Find the image for a platform.

        Args:
            platform: that the image must run on.
            cancellation: of the caller.
            stored: who knows what is here already.

        Raises:
            GuestpullError: there is none, or it cannot be had, read, or run.
        """

    def open_blob(self, blob: Descriptor, cancellation: Cancellation) -> BlobStream:
        """The bytes of one of its blobs. Thread-safe: blobs may be read side by side."""


class BlobStream(Protocol):
    """The bytes of one blob, in order, from wherever. A context manager; leaving it lets go of everything."""

    @property
    def received_bytes(self) -> int:
        """Bytes that came over the wire so far, those that came twice included."""

    def read(self, limit: int) -> bytes:
        """The next bytes, as many as there are at once and at most `limit`; none at the end.

        The end is told only after size and digest of the whole were verified.

        Raises:
            DigestMismatch: the bytes do not have the descriptor's digest.
            SizeMismatch: they are more or fewer than it says.
            GuestpullError: they cannot be had.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
