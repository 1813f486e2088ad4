"""The conductor: from an image reference to a bundle, step by step.

    with Puller.open(configuration) as puller:
        pulled = puller.pull(PullRequest("busybox", "/run/bundles/one"))
        baked = puller.bake(BakeRequest("oci-archive:app.tar", reference="registry.example/app:1"))

This is the storage core's front door; a program can use it and never load gRPC. Each step is the work of a
room: the registry resolves, flights download and unpack, the store remembers, the snapshot mounts, the bundle
is written. What is there already is not asked for.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import msgspec

from guestpull_server.bundle import write_runtime_config
from guestpull_server.config import Configuration
from guestpull_server.errors import (
    DeadlineExceeded,
    ImageNotPresent,
    InvalidRequest,
    LimitExceeded,
    TooManyPulls,
)
from guestpull_server.flights import Flights
from guestpull_server.layer import LayerWorkers
from guestpull_server.models import (
    Cancellation,
    Credentials,
    Descriptor,
    Digest,
    ImageConfig,
    LayerDescriptor,
    Platform,
    PulledImage,
    PulledLayer,
    PullPolicy,
    ResolvedImage,
    StoredImage,
    StoredLayer,
)
from guestpull_server.registry import ImageSource, Reference, RegistryClient, is_local, open_source
from guestpull_server.snapshot import OverlayMounts, mount_rootfs
from guestpull_server.store import LayerNames, Store
from guestpull_server.turns import Turns


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


class Puller:
    """Pulls images into one work directory, which it owns from `open` to `close`. Thread-safe."""

    def __init__(
        self, configuration: Configuration, store: Store, registry: RegistryClient, workers: LayerWorkers
    ) -> None:
        self.store = store
        self._configuration = configuration
        self._limits = configuration.limits
        self._registry = registry
        self._workers = workers
        self._flights = Flights(store, workers, configuration.limits)
        self._turns = Turns(configuration.limits.max_concurrent_pulls)
        self._idle = threading.Condition()
        self._pulls = 0

    @classmethod
    def open(
        cls,
        configuration: Configuration,
        *,
        guest_work_dir: str | None = None,
        layer_names: LayerNames = LayerNames.DIGEST,
    ) -> Puller:
        """Start the layer workers' fork server and take the work directory over.

        Args:
            configuration: names the work directory, and all else.
            guest_work_dir: where the guest will see the work directory, if that is elsewhere.
            layer_names: how new layers' directories are named.

        Raises:
            WorkDirInUse: another process has it.
            InvalidStore: it is of a form that we do not know.
            InvalidConfiguration: the configuration asks for what cannot be.
        """
        registry = RegistryClient(configuration)
        store = Store.open(
            configuration.work_dir,
            OverlayMounts(),
            guest_work_dir=guest_work_dir,
            additional_stores=configuration.additional_stores,
            bundle_roots=configuration.bundle_roots,
            layer_names=layer_names,
        )
        try:
            return cls(configuration, store, registry, LayerWorkers(configuration.limits))
        except BaseException:
            store.close()
            raise

    def close(self, *, tidy: bool = False) -> None:
        """End the layer workers and give the work directory back. Bundles stay mounted.

        Args:
            tidy: leave nothing in the work directory but images and layers, and no traces of time or order.
        """
        self._workers.close()
        self._registry.close()
        self.store.close(tidy=tidy)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pulls_under_way(self) -> int:
        """Pulls that are under way or wait for their turn."""
        return self._pulls

    def wait_until_idle(self) -> None:
        """Return once no pull is under way any more; cancelled ones take a moment to clean up."""
        with self._idle:
            self._idle.wait_for(lambda: self._pulls == 0)

    def pull(
        self,
        request: PullRequest,
        cancellation: Cancellation | None = None,
        observer: PullObserver | None = None,
    ) -> PulledImage:
        """Make an image a bundle. A pull that fails leaves no bundle, no mount, and no part of a layer.

        Raises:
            GuestpullError: the errors of the table in README.md.
        """
        reference = self._reference(request.image)
        observer = observer or Unobserved()
        caller = cancellation or Cancellation("the pull")
        with (
            self._admitted(request.image, caller) as cancellation,
            self._source(request.image, request.credentials, cancellation) as source,
            self.store.reserve_bundle(request.bundle_path) as bundle,
            self._resolved(reference, source, request, cancellation) as resolved,
        ):
            observer.resolved(resolved)
            layers, pulled = self._fetch_layers(resolved, source, cancellation, observer)
            mount_rootfs(layers, bundle.overlay_directory, bundle.rootfs)
            observer.mounted(bundle.rootfs)
            write_runtime_config(bundle.bundle_path, bundle.rootfs, resolved.config)
            cancellation.check()
            bundle.commit(self.store.record_image(resolved, layers))
        return _result(resolved, pulled, bundle.rootfs)

    def bake(
        self,
        request: BakeRequest,
        cancellation: Cancellation | None = None,
        observer: PullObserver | None = None,
    ) -> PulledImage:
        """Have an image in the store, with no bundle; `rootfs_path` of the result is empty.

        Raises:
            InvalidRequest: a local image has no name, and none was given.
            GuestpullError: as `pull`.
        """
        name = str(Reference.parse(request.reference)) if request.reference else ""
        observer = observer or Unobserved()
        caller = cancellation or Cancellation("the pull")
        platform = request.platform or Platform.host()
        with (
            self._admitted(request.source, caller) as cancellation,
            self._source(request.source, request.credentials, cancellation) as source,
        ):
            found = source.resolve(
                platform, cancellation, lambda digest: self._known(digest, source.reference)
            )
            resolved = dataclasses.replace(found, reference=name or found.reference)
            if not resolved.reference:
                raise InvalidRequest(
                    request.source, "the image has no name in there", "Give it one by --reference."
                )
            observer.resolved(resolved)
            with self.store.pin(layer.blob.digest for layer in resolved.layers):
                layers, pulled = self._fetch_layers(resolved, source, cancellation, observer)
                self.store.record_image(resolved, layers)
        return _result(resolved, pulled, "")

    def repair(
        self, image: StoredImage, damaged: Collection[Digest], cancellation: Cancellation | None = None
    ) -> tuple[PulledLayer, ...]:
        """Download exactly those layers of an image again that are not what they should be.

        The image is asked for by its manifest's digest, so that nothing else can come in its place.

        Raises:
            InvalidReference: the image has no name of a registry: it was baked from a file, and must be again.
            LayerInUse: a bundle or a pull uses such a layer.
            GuestpullError: as `pull`.
        """
        name = Reference.parse(image.references[0] if image.references else "")
        reference = dataclasses.replace(name, tag="", digest=image.manifest_digest)
        platform = msgspec.json.decode(image.config, type=ImageConfig).platform
        caller = cancellation or Cancellation("the repair")
        with (
            self._admitted(str(reference), caller) as cancellation,
            self._source(str(reference), None, cancellation) as source,
        ):
            found = source.resolve(platform, cancellation, lambda _digest: None)
            resolved = dataclasses.replace(found, reference=str(name))
            for digest in damaged:
                if self.store.layer(digest) is not None:
                    self.store.discard_layer(digest)
            with self.store.pin(layer.blob.digest for layer in resolved.layers):
                layers, pulled = self._fetch_layers(resolved, source, cancellation, Unobserved())
                self.store.record_image(resolved, layers)
                self.store.flush()
        return tuple(layer for layer in pulled if not layer.reused)

    # -- the steps ------------------------------------------------------------------------------------------

    def _reference(self, image: str) -> Reference | None:
        """What an image is called at its registry; None for a local one, where these are allowed."""
        if not is_local(image):
            return Reference.parse(image)
        if not self._configuration.allow_local_images:
            raise InvalidRequest(
                "image_url",
                f"{image} is a local image",
                "The configuration must say allow_local_images: true.",
            )
        return None

    @contextmanager
    def _source(
        self, image: str, credentials: Credentials | None, cancellation: Cancellation
    ) -> Iterator[ImageSource]:
        with open_source(
            image, self._registry, credentials, self._limits, self.store.work_dir, cancellation
        ) as source:
            yield source

    @contextmanager
    def _admitted(self, image: str, caller: Cancellation) -> Iterator[Cancellation]:
        """Wait for a turn in the queue of pulls, and bound the pull's time."""
        with self._idle:
            if self._pulls >= self._limits.max_queued_pulls:
                raise TooManyPulls(self._limits.max_queued_pulls)
            self._pulls += 1
        try:
            with (
                caller.nested(f"pull of {image}", self._limits.max_pull_seconds) as cancellation,
                self._turns.take(cancellation),
            ):
                yield cancellation
        except DeadlineExceeded:
            if caller.cancelled:
                raise
            raise LimitExceeded(
                f"pull of {image}", "max_pull_seconds", self._limits.max_pull_seconds
            ) from None
        finally:
            with self._idle:
                self._pulls -= 1
                self._idle.notify_all()

    @contextmanager
    def _resolved(
        self,
        reference: Reference | None,
        source: ImageSource,
        request: PullRequest,
        cancellation: Cancellation,
    ) -> Iterator[ResolvedImage]:
        """Resolve the reference, and keep its layers from being deleted."""
        resolved = self._resolve(reference, source, request, cancellation)
        with self.store.pin(layer.blob.digest for layer in resolved.layers):
            if not self._has_vanished(resolved):
                yield resolved
                return
        # an image of the store was removed before its layers were pinned: it must come from the registry
        if request.policy is PullPolicy.NEVER:
            raise ImageNotPresent(request.image)
        platform = request.platform or Platform.host()
        resolved = source.resolve(platform, cancellation, lambda _digest: None)
        with self.store.pin(layer.blob.digest for layer in resolved.layers):
            yield resolved

    def _has_vanished(self, resolved: ResolvedImage) -> bool:
        return any(
            not layer.blob.media_type and self.store.layer(layer.blob.digest) is None
            for layer in resolved.layers
        )

    def _resolve(
        self,
        reference: Reference | None,
        source: ImageSource,
        request: PullRequest,
        cancellation: Cancellation,
    ) -> ResolvedImage:
        """What was asked for, by the policy: from the store, or from its source."""
        platform = request.platform or Platform.host()
        if reference is not None:
            present = self._by_policy(reference, platform, request.policy)
            if present is not None:
                return _as_resolved(present, str(reference))
        return source.resolve(platform, cancellation, lambda digest: self._known(digest, source.reference))

    def _by_policy(self, reference: Reference, platform: Platform, policy: PullPolicy) -> StoredImage | None:
        """The image of the store, where the policy lets it be used without asking the registry."""
        match policy:
            case PullPolicy.ALWAYS:
                return None
            case PullPolicy.UNSPECIFIED:
                return self._present(reference, platform) if reference.digest else None
            case PullPolicy.IF_NOT_PRESENT:
                return self._present(reference, platform)
            case PullPolicy.NEVER:
                present = self._present(reference, platform)
                if present is None:
                    raise ImageNotPresent(str(reference))
                return present

    def _fetch_layers(
        self,
        resolved: ResolvedImage,
        source: ImageSource,
        cancellation: Cancellation,
        observer: PullObserver,
    ) -> tuple[tuple[StoredLayer, ...], tuple[PulledLayer, ...]]:
        """All layers, bottom-most first: those that the store has, and those that must be downloaded."""
        fetched: dict[Digest, tuple[StoredLayer, PulledLayer]] = {}
        missing: dict[Digest, LayerDescriptor] = {}
        for layer in resolved.layers:
            if layer.blob.digest in fetched or layer.blob.digest in missing:
                continue
            stored = self.store.layer(layer.blob.digest)
            if stored is None or stored.uncompressed_digest != layer.diff_id:
                # where they differ, the store's entry or the image lies: the blob tells which
                missing[layer.blob.digest] = layer
            else:
                fetched[layer.blob.digest] = stored, _reused(stored)
                observer.layer_done(fetched[layer.blob.digest][1])
        if missing:
            fetched |= self._download(missing.values(), source, cancellation, observer)
        in_order = [fetched[layer.blob.digest] for layer in resolved.layers]
        return tuple(stored for stored, _ in in_order), tuple(pulled for _, pulled in in_order)

    def _download(
        self,
        missing: Iterable[LayerDescriptor],
        source: ImageSource,
        cancellation: Cancellation,
        observer: PullObserver,
    ) -> dict[Digest, tuple[StoredLayer, PulledLayer]]:
        """Download layers, a few at once; the first failure stops the others, and is raised at their end."""
        lock = threading.Lock()

        def download(layer: LayerDescriptor) -> tuple[StoredLayer, PulledLayer]:
            def progress(done_bytes: int) -> None:
                with lock:
                    observer.layer_progress(layer, done_bytes)

            fetched = self._flights.fetch(layer, source, stop, progress)
            pulled = PulledLayer(
                layer.blob.digest,
                layer.diff_id,
                reused=fetched.downloaded_bytes == 0,
                downloaded_bytes=fetched.downloaded_bytes,
            )
            with lock:
                observer.layer_done(pulled)
            return fetched.layer, pulled

        at_once = self._configuration.max_concurrent_layer_downloads_per_image
        with (
            cancellation.nested() as stop,
            ThreadPoolExecutor(max(1, at_once), thread_name_prefix="layers") as pool,
        ):
            downloads = {layer.blob.digest: pool.submit(download, layer) for layer in missing}
            done, _ = wait(downloads.values(), return_when=FIRST_EXCEPTION)
            failure = next((error for one in done if (error := one.exception()) is not None), None)
            if failure is not None:
                stop.cancel()
                pool.shutdown(wait=True, cancel_futures=True)
                raise failure
            return {digest: one.result() for digest, one in downloads.items()}

    # -- what the store has ---------------------------------------------------------------------------------

    def _present(self, reference: Reference, platform: Platform) -> StoredImage | None:
        """The image that the store has under a reference, if all of its layers are there."""
        image = self.store.image_for(str(reference), platform)
        if image is None and reference.digest is not None:
            image = self.store.image_by_manifest(reference.digest)
            if image is not None and not _fits(image, platform):
                return None
        return image if image is not None and self._is_whole(image) else None

    def _known(self, manifest_digest: Digest, reference: str) -> ResolvedImage | None:
        image = self.store.image_by_manifest(manifest_digest)
        return _as_resolved(image, reference) if image is not None and self._is_whole(image) else None

    def _is_whole(self, image: StoredImage) -> bool:
        return all(
            (stored := self.store.layer(layer.compressed_digest)) is not None
            and stored.uncompressed_digest == layer.uncompressed_digest
            for layer in image.layers
        )


def _result(resolved: ResolvedImage, pulled: tuple[PulledLayer, ...], rootfs: str) -> PulledImage:
    return PulledImage(resolved.image_id, resolved.manifest_digest, resolved.reference, rootfs, pulled)


def _as_resolved(image: StoredImage, reference: str) -> ResolvedImage:
    """An image of the store as if it had been resolved; media types and sizes of its blobs are not known."""
    layers = tuple(
        LayerDescriptor(Descriptor("", layer.compressed_digest, 0), layer.uncompressed_digest)
        for layer in image.layers
    )
    return ResolvedImage(reference, image.manifest_digest, image.image_id, image.config, layers)


def _reused(stored: StoredLayer) -> PulledLayer:
    return PulledLayer(stored.compressed_digest, stored.uncompressed_digest, reused=True, downloaded_bytes=0)


def _fits(image: StoredImage, platform: Platform) -> bool:
    built_for = msgspec.json.decode(image.config, type=ImageConfig).platform
    return (built_for.os, built_for.architecture) == (platform.os, platform.architecture)
