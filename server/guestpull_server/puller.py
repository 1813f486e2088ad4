"""The conductor: from an image reference to a bundle, step by step.

    with Puller.open(configuration) as puller:
        pulled = puller.pull(PullRequest("busybox", "/run/bundles/one"))
        baked = puller.baker.bake(BakeRequest("oci-archive:app.tar", reference="registry.example/app:1"))

This is the storage core's front door; a program can use it and never load gRPC. Each step is the work of a
room: the registry resolves, shared downloads fetch and unpack, the store remembers, the snapshot mounts, the
bundle is written. What is there already is not asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from guestpull_server.admission import Admission, AdmittedPull
from guestpull_server.baker import Baker
from guestpull_server.bundle import write_runtime_config
from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Configuration, LayerNames
from guestpull_server.errors import ImageNotPresent, InvalidRequest
from guestpull_server.layer import LayerWorkers
from guestpull_server.models import Credentials, PulledImage, PullPolicy, ResolvedImage, StoredLayer
from guestpull_server.platforms import Platform
from guestpull_server.registry import (
    ImageSource,
    Reference,
    RegistryClient,
    fetch_image,
    is_local,
    open_source,
)
from guestpull_server.requests import PullObserver, PullRequest, Unobserved, check_pin
from guestpull_server.sessions import Sessions, StoreSession
from guestpull_server.snapshot import mount_rootfs
from guestpull_server.store import BundleReservation, Store


class Puller:
    """Pulls images into one work directory, which it owns from `open` to `close`. Thread-safe."""

    def __init__(
        self,
        configuration: Configuration,
        sessions: Sessions,
        registry: RegistryClient,
        workers: LayerWorkers,
    ) -> None:
        self._configuration = configuration
        self._limits = configuration.limits
        self._sessions = sessions
        self._registry = registry
        self._workers = workers
        self.admission = Admission(configuration.limits)

    @property
    def store(self) -> Store:
        """The store as it is now: one that was deleted by others is opened anew.

        Raises:
            GuestpullError: it cannot be; see `open`.
        """
        return self._sessions.current().store

    @property
    def baker(self) -> Baker:
        """Brings images into the store without a bundle; raises as `store` does."""
        return self._sessions.current().baker

    @classmethod
    def open(
        cls,
        configuration: Configuration,
        *,
        guest_work_dir: str | None = None,
        layer_names: LayerNames | None = None,
        watch_bundles: bool = False,
    ) -> Puller:
        """Start the layer workers' fork server and take the work directory over.

        Args:
            configuration: names the work directory, and all else.
            guest_work_dir: where the guest will see the work directory, if that is elsewhere.
            layer_names: how new layers' directories are named; None: as those that are there, or by digest.
            watch_bundles: release bundles that others have taken away, as long as this is open.

        Raises:
            WorkDirInUse: another process has it.
            InvalidRequest: layers are to be named otherwise than those that are there.
            InvalidStore: it is of a form that we do not know.
            InvalidConfiguration: the configuration asks for what cannot be.
        """
        registry = RegistryClient(configuration)
        workers = LayerWorkers(configuration.limits)
        try:
            sessions = Sessions(
                lambda: StoreSession.open(
                    configuration,
                    registry,
                    workers,
                    guest_work_dir=guest_work_dir,
                    layer_names=layer_names,
                    watch_bundles=watch_bundles,
                )
            )
        except BaseException:
            workers.close()
            raise
        return cls(configuration, sessions, registry, workers)

    def close(self, *, tidy: bool = False) -> None:
        """End the layer workers and give the work directory back. Bundles stay mounted.

        Args:
            tidy: leave nothing in the work directory but images and layers, and no traces of time or order.
        """
        self._workers.close()
        self._registry.close()
        self._sessions.close(tidy=tidy)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

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
            self.admission.admitted(request.image, caller) as admitted,
            self._sessions.using(cancellation := admitted.cancellation) as session,
            self._source(request.image, request.credentials, admitted) as source,
            session.store.reserve_bundle(request.bundle_path) as bundle,
            self._resolved(session, reference, source, request, admitted) as resolved,
        ):
            observer.resolved(resolved)
            layers, pulled = session.fetcher.fetch(resolved, source, cancellation, observer)
            admitted.work_here()
            with bundle.opened() as directory:
                session.store.with_room(lambda: _mount(layers, bundle, directory, cancellation))
                observer.mounted(bundle.rootfs)
                session.store.with_room(
                    lambda: write_runtime_config(
                        bundle.bundle_path,
                        bundle.rootfs,
                        resolved.config,
                        directory,
                        bundle.writes_config,
                        self._limits,
                        cancellation,
                    )
                )
            cancellation.check()
            image = session.store.record_image(resolved, layers)
            session.store.with_room(lambda: bundle.commit(image))
        return PulledImage(
            resolved.image_id, resolved.manifest_digest, resolved.reference, bundle.rootfs, pulled
        )

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
        self, image: str, credentials: Credentials | None, admitted: AdmittedPull
    ) -> Iterator[ImageSource]:
        if is_local(image):  # inflating an archive takes as long as a registry
            admitted.ask_registry("")
        with open_source(
            image,
            self._registry,
            credentials,
            self._limits,
            self._configuration.work_dir,
            admitted.cancellation,
        ) as source:
            yield source

    @contextmanager
    def _resolved(
        self,
        session: StoreSession,
        reference: Reference | None,
        source: ImageSource,
        request: PullRequest,
        admitted: AdmittedPull,
    ) -> Iterator[ResolvedImage]:
        """Resolve the reference, and keep its layers from being deleted, those that may be reused."""
        resolved = self._resolve(session, reference, source, request, admitted)
        while True:
            checked = session.reuse.discard_changed(resolved, admitted.cancellation)
            with session.store.pin(layer.blob.digest for layer in resolved.layers):
                vanished = session.presence.has_vanished(resolved)
                if not vanished and session.reuse.is_checked(resolved, checked):
                    yield resolved
                    return
            if not vanished:
                continue  # something came into sight that nobody has checked
            # an image of the store was removed before its layers were pinned, or altered: the registry has it
            if request.policy is PullPolicy.NEVER:
                raise ImageNotPresent(request.image)
            platform = request.platform or Platform.host()
            admitted.ask_registry(source.registry)
            resolved = fetch_image(source, platform, admitted.cancellation)

    def _resolve(
        self,
        session: StoreSession,
        reference: Reference | None,
        source: ImageSource,
        request: PullRequest,
        admitted: AdmittedPull,
    ) -> ResolvedImage:
        """What was asked for, by the policy: from the store, or from its source."""
        platform = request.platform or Platform.host()
        if reference is not None:
            present = session.presence.by_policy(reference, platform, request.policy)
            if present is not None:
                return present
        admitted.ask_registry(source.registry)
        resolved = session.presence.resolve(source, platform, admitted.cancellation)
        if reference is None:
            check_pin(request.image, resolved)
        return resolved


def _mount(
    layers: Sequence[StoredLayer], bundle: BundleReservation, directory: int, cancellation: Cancellation
) -> None:
    """Mount the rootfs; may be repeated on a disk that was full."""
    bundle.clear_overlay()
    mount_rootfs(layers, bundle.overlay_directory, bundle.rootfs, directory, cancellation)
