"""Requests to the pipeline, and the observer of their progress."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from guestpull_server.models import (
    Credentials,
    Digest,
    LayerDescriptor,
    PulledLayer,
    PullPolicy,
    ResolvedImage,
)
from guestpull_server.platforms import Platform


class Purpose(Enum):
    """Why an image is acquired. It decides what may be reused from the store."""

    PULL = "pull"
    """Reuse images and layers of the store. Verify them as the configuration requires (`verify_reuse`)."""
    BAKE = "bake"
    """Like PULL, but verify an image that is already in the store in full, and always allow local images."""
    REPAIR = "repair"
    """Reuse undamaged layers only. Get manifest and config from the source."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A request to bring an image into the store.

    Attributes:
        image: a reference, or a local image (`oci:PATH`, see registry/local).
        credentials: for the registry.
        policy: when to contact the registry.
        platform: None means the host's.
        purpose: why the image is acquired.
        name: the reference to record the image under. Empty means the one that its source gives it.
        damaged: layers to delete from the store first, so that they are downloaded again.
    """

    image: str
    credentials: Credentials | None = None
    policy: PullPolicy = PullPolicy.UNSPECIFIED
    platform: Platform | None = None
    purpose: Purpose = Purpose.PULL
    name: str = ""
    damaged: tuple[Digest, ...] = ()


@dataclass(frozen=True, slots=True)
class PullRequest:
    """A request to pull an image into a bundle. `platform` None means the host's."""

    image: str
    bundle_path: str
    credentials: Credentials | None = None
    policy: PullPolicy = PullPolicy.UNSPECIFIED
    platform: Platform | None = None

    @property
    def image_request(self) -> ImageRequest:
        """The request without the bundle."""
        return ImageRequest(self.image, self.credentials, self.policy, self.platform)


class PullObserver(Protocol):
    """Observes the progress of a pull. Several threads call it, one at a time."""

    def resolved(self, image: ResolvedImage) -> None:
        """The reference is resolved; nothing has been downloaded yet."""

    def layer_progress(self, layer: LayerDescriptor, done_bytes: int) -> None:
        """`done_bytes` compressed bytes of a layer were received."""

    def layer_done(self, layer: PulledLayer) -> None:
        """A layer is in the store."""

    def mounted(self, rootfs_path: str) -> None:
        """The root filesystem is mounted."""


class Unobserved:
    """A PullObserver that does nothing."""

    def resolved(self, image: ResolvedImage) -> None:
        """Do nothing."""

    def layer_progress(self, layer: LayerDescriptor, done_bytes: int) -> None:
        """Do nothing."""

    def layer_done(self, layer: PulledLayer) -> None:
        """Do nothing."""

    def mounted(self, rootfs_path: str) -> None:
        """Do nothing."""
