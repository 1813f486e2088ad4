"""Images into the store without a bundle: baked ahead of time, or repaired.

The steps are those of a pull (puller.py), up to the mount. What is there already is proved first, whatever the
configuration says of pulls: who bakes an image again, or repairs it, wants it as its digests say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from guestpull_server.admission import Admission
from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Configuration, VerifyReuse
from guestpull_server.errors import GuestpullError, ImageNotFound, InvalidRequest, NotAtRegistry
from guestpull_server.fetching import LayerFetcher
from guestpull_server.layer import LayerWorkers
from guestpull_server.models import (
    Credentials,
    Digest,
    PulledImage,
    PulledLayer,
    ResolvedImage,
    StoredImage,
    platform_of,
)
from guestpull_server.platforms import Platform
from guestpull_server.presence import Presence
from guestpull_server.registry import (
    ImageSource,
    Reference,
    RegistryClient,
    fetch_image,
    is_local,
    open_source,
)
from guestpull_server.requests import BakeRequest, Unobserved, check_pin
from guestpull_server.reuse import ReuseCheck
from guestpull_server.store import Store


class Baker:
    """Brings images into one store. Thread-safe.

    Args:
        configuration: whether layers that an image shares with others are proved, and how long all may take.
        store: where images come to.
        registry: where those come from that are no files.
        workers: they unpack layers, and prove them.
        fetcher: what brings layers into the store.
    """

    def __init__(
        self,
        configuration: Configuration,
        store: Store,
        registry: RegistryClient,
        workers: LayerWorkers,
        fetcher: LayerFetcher,
    ) -> None:
        self._limits = configuration.limits
        self._store = store
        self._registry = registry
        self._fetcher = fetcher
        self._admission = Admission(configuration.limits)
        self._presence = Presence(store, proves=True)
        self._shared_reuse = ReuseCheck(store, configuration.verify_reuse, workers)
        self._reuse = ReuseCheck(store, VerifyReuse.ALWAYS, workers)

    def bake(self, request: BakeRequest) -> PulledImage:
        """Have an image in the store, with no bundle; `rootfs_path` of the result is empty.

        Raises:
            InvalidRequest: a local image has no name, and none was given.
            GuestpullError: as Puller.pull.
        """
        name = str(Reference.parse(request.reference)) if request.reference else ""
        platform = request.platform or Platform.host()
        with self._source(request.source, request.credentials) as (source, cancellation):
            found = self._presence.resolve(source, platform, cancellation)
            resolved = _named(found, name, request.source)
            # layers that it shares with others cost nothing, unless the configuration has them proved
            is_again = any(image.image_id == resolved.image_id for image in self._store.images())
            reuse = self._reuse if is_again else self._shared_reuse
            reuse.discard_changed(resolved, cancellation)
            if self._presence.has_vanished(resolved):
                found = fetch_image(source, platform, cancellation)
                resolved = _named(found, name, request.source)
                reuse.discard_changed(resolved, cancellation)
            pulled = self._keep(resolved, source, cancellation)
        return PulledImage(resolved.image_id, resolved.manifest_digest, resolved.reference, "", pulled)

    def repair(self, image: StoredImage, damaged: Collection[Digest]) -> tuple[PulledLayer, ...]:
        """Download exactly those layers of an image again that are not what they should be, and its config.

        The image is asked for by its manifest's digest, so that nothing else can come in its place, in the
        repositories that it has names of, one after the other.

        Raises:
            NotAtRegistry: no registry has it: it was baked from a file, and must be again.
            LayerInUse: a bundle or a pull uses such a layer.
            GuestpullError: as Puller.pull.
        """
        names: dict[str, str] = {}
        failures: list[GuestpullError] = []
        for name in image.references:
            pinned = dataclasses.replace(Reference.parse(name), tag="", digest=image.manifest_digest)
            names.setdefault(str(pinned), name)
        for place, name in names.items():
            try:
                return self._repair_from(place, name, image, damaged)
            except ImageNotFound:
                continue
            except GuestpullError as error:
                failures.append(error)
        told = " and ".join(names.values()) or image.image_id
        raise failures[0] if failures else NotAtRegistry(told, image.manifest_digest)

    def _repair_from(
        self, pinned: str, name: str, image: StoredImage, damaged: Collection[Digest]
    ) -> tuple[PulledLayer, ...]:
        platform = platform_of(image.config)
        with self._source(pinned, None) as (source, cancellation):
            found = fetch_image(source, platform, cancellation)
            for digest in damaged:
                if self._store.layer(digest) is not None:
                    self._store.discard_layer(digest)
            pulled = self._keep(dataclasses.replace(found, reference=name), source, cancellation)
            self._store.flush()
        return tuple(layer for layer in pulled if not layer.reused)

    def _keep(
        self, resolved: ResolvedImage, source: ImageSource, cancellation: Cancellation
    ) -> tuple[PulledLayer, ...]:
        with self._store.pin(layer.blob.digest for layer in resolved.layers):
            layers, pulled = self._fetcher.fetch(resolved, source, cancellation, Unobserved())
            self._store.record_image(resolved, layers)
        return pulled

    @contextmanager
    def _source(
        self, image: str, credentials: Credentials | None
    ) -> Iterator[tuple[ImageSource, Cancellation]]:
        with (
            self._admission.admitted(image, Cancellation("the pull")) as admitted,
            open_source(
                image, self._registry, credentials, self._limits, self._store.work_dir, admitted.cancellation
            ) as source,
        ):
            admitted.ask_registry(source.registry)
            yield source, admitted.cancellation


def _named(found: ResolvedImage, name: str, source: str) -> ResolvedImage:
    """An image that is to be baked, under the name that it was given, or else the one that it has.

    Raises:
        InvalidRequest: it has none, or one that is another image's.
    """
    resolved = dataclasses.replace(found, reference=name, is_confirmed=True) if name else found
    if not resolved.reference:
        raise InvalidRequest(source, "the image has no name in there", "Give it one by --reference.")
    if name or is_local(source):
        check_pin(source, resolved)
    return resolved
