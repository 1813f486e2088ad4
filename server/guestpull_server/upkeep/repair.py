"""Repairs one image of the store: downloads its damaged layers and its config again."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from guestpull_server.errors import GuestpullError, ImageNotFound, NotAtRegistry
from guestpull_server.models import Digest, PulledLayer, StoredImage, platform_of
from guestpull_server.pull import ImageRequest, Purpose
from guestpull_server.puller import Puller
from guestpull_server.registry import Reference


def repair(puller: Puller, image: StoredImage, damaged: Collection[Digest]) -> tuple[PulledLayer, ...]:
    """Download the damaged layers of an image again, and no others. Return the downloaded layers.

    Try each repository in which the image has a name, until one has the image. Request it by its manifest's
    digest, so that no other image can be downloaded.

    Raises:
        NotAtRegistry: no registry has the image. It was baked from a file, and must be baked again.
        LayerInUse: a bundle or a pull uses a damaged layer.
        GuestpullError: what `Puller.fetch` raises.
    """
    name_of: dict[str, str] = {}  # by pinned reference
    failures: list[GuestpullError] = []
    for name in image.references:
        pinned = dataclasses.replace(Reference.parse(name), tag="", digest=image.manifest_digest)
        name_of.setdefault(str(pinned), name)
    for pinned_name, name in name_of.items():
        request = ImageRequest(
            pinned_name,
            platform=platform_of(image.config),
            purpose=Purpose.REPAIR,
            name=name,
            damaged=tuple(damaged),
        )
        try:
            pulled = puller.fetch(request)
        except ImageNotFound:
            continue
        except GuestpullError as error:
            failures.append(error)
            continue
        puller.store.flush()
        return tuple(layer for layer in pulled.layers if not layer.reused)
    names = " and ".join(name_of.values()) or image.image_id
    raise failures[0] if failures else NotAtRegistry(names, image.manifest_digest)
