"""The conductor: from an image reference to a bundle, step by step.

    with Puller.open(configuration) as puller:
        pulled = puller.pull(PullRequest("busybox", "/run/bundles/one"))

This is the storage core's front door; a program can use it and never load gRPC. Each step is the work of a
room: the registry resolves, flights download and unpack, the store remembers, the snapshot mounts, the bundle
is written. What is there already is not asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
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
    DigestMismatch,
    ImageNotPresent,
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
from guestpull_server.registry import ImageSource, Reference, RegistryClient
from guestpull_server.snapshot import OverlayMounts, mount_rootfs
from guestpull_server.store import Store
from guestpull_server.turns import Turns


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What a caller wants: an image, as a bundle, for a platform (the host's where it names none)."""

    image: str
    bundle_path: str
    credentials: Credentials | None = None
    policy: PullPolicy = PullPolicy.UNSPECIFIED
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
    def open(cls, configuration: Configuration) -> Puller:
        """Start the layer workers' fork server and take the work directory over.

        Raises:
            WorkDirInUse: another process has it.
            InvalidStore: it is of a form that we do not know.
            InvalidConfiguration: the configuration asks for what cannot be.
        """
        registry = RegistryClient(configuration)
        store = Store.open(
            configuration.work_dir,
            OverlayMounts(),
            additional_stores=configuration.additional_stores,
            bundle_roots=configuration.bundle_roots,
        )
        try:
            return cls(configuration, store, registry, LayerWorkers(configuration.limits))
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """End the layer workers and give the work directory back. Bundles stay mounted."""
        self._workers.close()
        self._registry.close()
        self.store.close()

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
        reference = Reference.parse(request.image)
        observer = observer or Unobserved()
        caller = cancellation or Cancellation(f"pull of {reference}")
        with self._admitted(reference, caller) as cancellation:
            source = self._registry.image(reference, request.credentials)
            with (
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
        return PulledImage(
            resolved.image_id, resolved.manifest_digest, resolved.reference, bundle.rootfs, pulled
        )

    # -- the steps ------------------------------------------------------------------------------------------

    @contextmanager
    def _admitted(self, reference: Reference, caller: Cancellation) -> Iterator[Cancellation]:
        """Wait for a turn in the queue of pulls, and bound the pull's time."""
        with self._idle:
            if self._pulls >= self._limits.max_queued_pulls:
                raise TooManyPulls(self._limits.max_queued_pulls)
            self._pulls += 1
        try:
            with (
                caller.nested(f"pull of {reference}", self._limits.max_pull_seconds) as cancellation,
                self._turns.take(cancellation),
            ):
                yield cancellation
        except DeadlineExceeded:
            if caller.cancelled:
                raise
            raise LimitExceeded(
                f"pull of {reference}", "max_pull_seconds", self._limits.max_pull_seconds
            ) from None
        finally:
            with self._idle:
                self._pulls -= 1
                self._idle.notify_all()

    @contextmanager
    def _resolved(
        self, reference: Reference, source: ImageSource, request: PullRequest, cancellation: Cancellation
    ) -> Iterator[ResolvedImage]:
        """Resolve the reference, and keep its layers from being deleted."""
        resolved = self._resolve(reference, source, request, cancellation)
        with self.store.pin(layer.blob.digest for layer in resolved.layers):
            if not self._has_vanished(resolved):
                yield resolved
                return
        # an image of the store was removed before its layers were pinned: it must come from the registry
        if request.policy is PullPolicy.NEVER:
            raise ImageNotPresent(str(reference))
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
        self, reference: Reference, source: ImageSource, request: PullRequest, cancellation: Cancellation
    ) -> ResolvedImage:
        """What the reference stands for, by the policy: from the store, or from the registry."""
        platform = request.platform or Platform.host()
        match request.policy:
            case PullPolicy.ALWAYS:
                present = None
            case PullPolicy.UNSPECIFIED:
                present = self._present(reference, platform) if reference.digest else None
            case PullPolicy.IF_NOT_PRESENT:
                present = self._present(reference, platform)
            case PullPolicy.NEVER:
                present = self._present(reference, platform)
                if present is None:
                    raise ImageNotPresent(str(reference))
        if present is not None:
            return _as_resolved(present, str(reference))
        return source.resolve(platform, cancellation, lambda digest: self._known(digest, str(reference)))

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
            if stored is None:
                missing[layer.blob.digest] = layer
            else:
                fetched[layer.blob.digest] = stored, _reused(stored, layer)
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
        return all(self.store.layer(layer.compressed_digest) is not None for layer in image.layers)


def _as_resolved(image: StoredImage, reference: str) -> ResolvedImage:
    """An image of the store as if it had been resolved; media types and sizes of its blobs are not known."""
    layers = tuple(
        LayerDescriptor(Descriptor("", layer.compressed_digest, 0), layer.uncompressed_digest)
        for layer in image.layers
    )
    return ResolvedImage(reference, image.manifest_digest, image.image_id, image.config, layers)


def _reused(stored: StoredLayer, wanted: LayerDescriptor) -> PulledLayer:
    if stored.uncompressed_digest != wanted.diff_id:
        raise DigestMismatch(
            "diff_id of layer", wanted.diff_id, stored.uncompressed_digest, stored.store_path
        )
    return PulledLayer(stored.compressed_digest, stored.uncompressed_digest, reused=True, downloaded_bytes=0)


def _fits(image: StoredImage, platform: Platform) -> bool:
    built_for = msgspec.json.decode(image.config, type=ImageConfig).platform
    return (built_for.os, built_for.architecture) == (platform.os, platform.architecture)
