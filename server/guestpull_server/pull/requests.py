"""What is asked of the pipeline, and who observes its progress."""

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
    """Why an image is acquired. It decides what of the store may be used instead of the source."""

    PULL = "pull"
    """Images and layers of the store are reused, verified as the configuration says (`verify_reuse`)."""
    BAKE = "bake"
    """Likewise, but an image that is in the store already is verified whole. Local images are always allowed."""
    REPAIR = "repair"
    """Only undamaged layers are reused. Manifest and config come from the source."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """An image that is to be in the store.

    Attributes:
        image: a reference, or a local image (`oci:PATH`, see registry/local).
        credentials: for the registry.
        policy: when the registry is asked.
        platform: None means the host's.
        purpose: of the request.
        name: the reference to record the image under; empty means the one that its source gives it.
        damaged: layers to delete before they are looked for in the store, and so to download again.
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
    """An image that is to become a bundle. `platform` None means the host's."""

    image: str
    bundle_path: str
    credentials: Credentials | None = None
    policy: PullPolicy = PullPolicy.UNSPECIFIED
    platform: Platform | None = None

    @property
    def wanted(self) -> ImageRequest:
        """The image, without the bundle."""
        return ImageRequest(self.image, self.credentials, self.policy, self.platform)


class PullObserver(Protocol):
    """Observes the progress of a pull. Called from several threads, by one at a time."""

    def resolved(self, image: ResolvedImage) -> None:
        """The reference is resolved; nothing has been downloaded yet."""

    def layer_progress(self, layer: LayerDescriptor, done_bytes: int) -> None:
        """So many compressed bytes of a layer were received."""

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
