"""Brings the layers of an image into the store, and pins them there as long as the caller needs them.

    with acquirer.acquire(request, admitted, observer) as acquired:
        acquired.image, acquired.layers

The steps:

  1. open      the source: a registry, or a local file
  2. resolve   the reference, from the store where the policy allows it, else at the source
  3. verify    the layers that are in the store, as the purpose requires; delete those that changed
  4. pin       the image's layers; if one was removed meanwhile, continue with step 2 at the source
  5. fetch     the layers that are missing

Pulls, bakes and repairs differ only in what they may reuse from the store (`Purpose`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from guestpull_server.config import Configuration, VerifyReuse
from guestpull_server.errors import ImageNotPresent, InvalidRequest
from guestpull_server.layer import LayerWorkers
from guestpull_server.models import Digest, PulledLayer, PullPolicy, ResolvedImage, StoredLayer
from guestpull_server.platforms import Platform
from guestpull_server.pull.admission import AdmittedPull
from guestpull_server.pull.layer_fetcher import LayerFetcher
from guestpull_server.pull.layer_verification import LayerVerification
from guestpull_server.pull.local_resolver import LocalResolver
from guestpull_server.pull.requests import ImageRequest, PullObserver, Purpose
from guestpull_server.pull.shared_downloads import SharedDownloads
from guestpull_server.registry import (
    ImageSource,
    Reference,
    RegistryClient,
    fetch_image,
    is_local,
    open_source,
)
from guestpull_server.store import Store


@dataclass(frozen=True, slots=True)
class Acquired:
    """An image and its layers in the store, bottom-most first. `pulled` reports what was downloaded."""

    image: ResolvedImage
    layers: tuple[StoredLayer, ...]
    pulled: tuple[PulledLayer, ...]


def check_request(request: ImageRequest, configuration: Configuration) -> None:
    """Refuse an invalid request before it enters the queue.

    Raises:
        InvalidReference: the image is not a reference.
        InvalidRequest: the image is local, and the configuration does not allow local images.
    """
    if not is_local(request.image):
        Reference.parse(request.image)
    elif request.purpose is Purpose.PULL and not configuration.allow_local_images:
        problem = f"{request.image} is a local image"
        raise InvalidRequest("image_url", problem, "Set allow_local_images to true in the configuration.")


class Acquirer:
    """Brings images into one store. Thread-safe.

    Args:
        configuration: what may be pulled, and what is verified.
        store: receives the layers.
        registry: resolves references.
        workers: unpack and verify layers.
    """

    def __init__(
        self, configuration: Configuration, store: Store, registry: RegistryClient, workers: LayerWorkers
    ) -> None:
        self._configuration = configuration
        self._store = store
        self._registry = registry
        verifies = configuration.verify_reuse is not VerifyReuse.NEVER
        self._resolver = LocalResolver(store, verifies=verifies)
        self._verifying_resolver = LocalResolver(store, verifies=True)
        self._verification = LayerVerification(store, configuration.verify_reuse, workers)
        self._full_verification = LayerVerification(store, VerifyReuse.ALWAYS, workers)
        self._no_verification = LayerVerification(store, VerifyReuse.NEVER, workers)
        self._fetcher = LayerFetcher(
            store,
            SharedDownloads(store, workers, configuration.limits),
            configuration.max_concurrent_layer_downloads_per_image,
        )

    @contextmanager
    def acquire(
        self, request: ImageRequest, admitted: AdmittedPull, observer: PullObserver
    ) -> Iterator[Acquired]:
        """Bring an image's layers into the store, and pin them while the block runs.

        The block must record the image: otherwise its layers count as unused afterwards.

        Raises:
            GuestpullError: see the table of errors in README.md.
        """
        with (
            self._opened(request, admitted) as source,
            self._pinned(request, source, admitted) as image,
        ):
            observer.resolved(image)
            layers, pulled = self._fetcher.fetch(image, source, admitted.cancellation, observer)
            admitted.work_here()
            yield Acquired(image, layers, pulled)

    # -- the steps ------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self, request: ImageRequest, admitted: AdmittedPull) -> Iterator[ImageSource]:
        if is_local(request.image):  # decompressing an archive can take as long as a download
            admitted.use_registry("")
        with open_source(
            request.image,
            self._registry,
            request.credentials,
            self._configuration.limits,
            self._store.work_dir,
            admitted.cancellation,
        ) as source:
            yield source

    @contextmanager
    def _pinned(
        self, request: ImageRequest, source: ImageSource, admitted: AdmittedPull
    ) -> Iterator[ResolvedImage]:
        """Resolve the image, verify its layers, and pin them."""
        image = self._resolved(request, source, admitted)
        for digest in request.damaged:
            if self._store.layer(digest) is not None:
                self._store.discard_layer(digest)
        while True:
            verification = self._verification_for(request.purpose, image.image_id)
            verified = verification.discard_changed(image, admitted.cancellation)
            with self._store.pin(layer.blob.digest for layer in image.layers):
                incomplete = self._resolver.is_incomplete(image)
                if not incomplete and verification.covers(image, verified):
                    yield image
                    return
            if not incomplete:
                continue  # the copy of another store replaced a deleted layer: verify it
            # the image was removed, or found changed, before its layers were pinned
            if request.policy is PullPolicy.NEVER:
                raise ImageNotPresent(request.image)
            image = self._from_source(request, source, admitted)

    def _resolved(self, request: ImageRequest, source: ImageSource, admitted: AdmittedPull) -> ResolvedImage:
        platform = request.platform or Platform.host()
        match request.purpose:
            case Purpose.PULL:
                if not is_local(request.image):
                    reference = Reference.parse(request.image)
                    present = self._resolver.by_policy(reference, platform, request.policy)
                    if present is not None:
                        return present
                resolver = self._resolver
            case Purpose.BAKE:
                resolver = self._verifying_resolver
            case Purpose.REPAIR:
                return self._from_source(request, source, admitted)
        admitted.use_registry(source.registry)
        return _named(resolver.resolve(source, platform, admitted.cancellation), request)

    def _from_source(
        self, request: ImageRequest, source: ImageSource, admitted: AdmittedPull
    ) -> ResolvedImage:
        admitted.use_registry(source.registry)
        platform = request.platform or Platform.host()
        return _named(fetch_image(source, platform, admitted.cancellation), request)

    def _verification_for(self, purpose: Purpose, image_id: Digest) -> LayerVerification:
        match purpose:
            case Purpose.PULL:
                return self._verification
            case Purpose.BAKE:
                # verify all layers of an image that is baked again, but not those that a new image shares
                is_baked_again = any(image.image_id == image_id for image in self._store.images())
                return self._full_verification if is_baked_again else self._verification
            case Purpose.REPAIR:
                return self._no_verification  # an audit has found the damaged layers


def _named(image: ResolvedImage, request: ImageRequest) -> ResolvedImage:
    """Return the image under the requested name, or else the name that its source gives it.

    Raises:
        InvalidRequest: the image is to be baked and has no name, or its name is pinned to another image's
            digest.
    """
    if request.name:
        image = dataclasses.replace(image, reference=request.name, is_confirmed=True)
    if request.purpose is Purpose.BAKE and not image.reference:
        raise InvalidRequest(request.image, "the image has no name there", "Name it with --reference.")
    if is_local(request.image) or (request.name and request.purpose is Purpose.BAKE):
        _check_pin(request.image, image)
    return image


def _check_pin(source: str, image: ResolvedImage) -> None:
    """Refuse a name that is pinned to a digest that the image does not have.

    Only needed if the name comes from a file or a user: a registry resolves the pin itself.

    Raises:
        InvalidRequest: the name is pinned to another digest.
    """
    pin = Reference.parse(image.reference).digest if image.reference else None
    if pin not in (None, image.manifest_digest) and not (image.index and pin.matches(image.index)):
        problem = f"{image.reference} does not match the image: its manifest is {image.manifest_digest}"
        raise InvalidRequest(source, problem, "Use --reference with a tag, or with that digest.")
