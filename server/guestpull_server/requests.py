"""What is asked of the conductor, and who may watch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from guestpull_server.errors import InvalidRequest
from guestpull_server.models import Credentials, LayerDescriptor, PulledLayer, PullPolicy, ResolvedImage
from guestpull_server.platforms import Platform
from guestpull_server.registry import Reference


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What a caller wants: an image, as a bundle, for a platform (the host's where it names none)."""

    image: str
    bundle_path: str
    credentials: Credentials | None = None
    policy: PullPolicy = PullPolicy.UNSPECIFIED
    platform: Platform | None = None


@dataclass(frozen=True, slots=True)
class BakeRequest:
    """An image that is to be in the store, without a bundle.

    `source` is a reference, or a local image (registry/local). `reference` is the name that the image will be
    asked for by, where that is another than its source's.
    """

    source: str
    reference: str = ""
    credentials: Credentials | None = None
    platform: Platform | None = None


class PullObserver(Protocol):
    """Whoever wants to know how a pull goes. Called from several threads, at most one call at a time."""

    def resolved(self, image: ResolvedImage) -> None:
        """The reference is resolved; nothing is downloaded yet."""

    def layer_progress(self, layer: LayerDescriptor, done_bytes: int) -> None:
        """So many compressed bytes of a layer have come."""

    def layer_done(self, layer: PulledLayer) -> None:
        """A layer is in the store."""

    def mounted(self, rootfs_path: str) -> None:
        """The root filesystem is mounted."""


class Unobserved:
    """A PullObserver that does not care."""

    def resolved(self, image: ResolvedImage) -> None:
        """Nothing."""

    def layer_progress(self, layer: LayerDescriptor, done_bytes: int) -> None:
        """Nothing."""

    def layer_done(self, layer: PulledLayer) -> None:
        """Nothing."""

    def mounted(self, rootfs_path: str) -> None:
        """Nothing."""


def check_pin(source: str, resolved: ResolvedImage) -> None:
    """Refuse a name that is pinned to a digest that the image does not have.

    Of an image of a registry, the pin has led to the manifest; what a file, or its user, calls an image proves
    nothing.

    Raises:
        InvalidRequest: it is such a name.
    """
    pin = Reference.parse(resolved.reference).digest if resolved.reference else None
    if pin not in (None, resolved.manifest_digest) and not (resolved.index and pin.matches(resolved.index)):
        problem = (
            f"{resolved.reference} is another image: the manifest in there is {resolved.manifest_digest}"
        )
        raise InvalidRequest(source, problem, "Give it a tag by --reference, or that digest.")
