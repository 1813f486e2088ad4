"""Pulls an image reference into a bundle, step by step.

    with Puller.open(configuration) as puller:
        pulled = puller.pull(PullRequest("busybox", "/run/bundles/one"))
        fetched = puller.fetch(ImageRequest("oci-archive:app.tar", purpose=Purpose.BAKE))

This is the interface of the storage core; a program can use it without loading gRPC. The pipeline (pull/) brings
the image's layers into the store, snapshot/ mounts them, bundle/ writes config.json, and the store records image
and bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from guestpull_server.bundle import write_runtime_config
from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Configuration, LayerNames
from guestpull_server.layer import LayerWorkers
from guestpull_server.models import PulledImage
from guestpull_server.pull import (
    Acquired,
    Admission,
    Background,
    ImageRequest,
    PullObserver,
    PullRequest,
    Sessions,
    StoreSession,
    Unobserved,
    check_request,
)
from guestpull_server.registry import RegistryClient
from guestpull_server.snapshot import mount_rootfs
from guestpull_server.store import BundleReservation, Store


class Puller:
    """Pulls images into one work directory, which it owns from `open` to `close`. Thread-safe.

    Attributes:
        admission: the queue in front of all pulls.
    """

    def __init__(
        self,
        configuration: Configuration,
        sessions: Sessions,
        registry: RegistryClient,
        workers: LayerWorkers,
    ) -> None:
        self._configuration = configuration
        self._sessions = sessions
        self._registry = registry
        self._workers = workers
        self.admission = Admission(configuration.limits)

    @property
    def store(self) -> Store:
        """The current store. It is opened again if other programs have deleted it.

        Raises:
            GuestpullError: the store cannot be opened; see `open`.
        """
        return self._sessions.current().store

    @classmethod
    def open(
        cls,
        configuration: Configuration,
        *,
        guest_work_dir: str | None = None,
        layer_names: LayerNames | None = None,
        background: Sequence[Callable[[Store], Background]] = (),
    ) -> Puller:
        """Start the layer workers' fork server and take over the work directory.

        Args:
            configuration: names the work directory, and has all other settings.
            guest_work_dir: path of the work directory in the guest, if it differs.
            layer_names: how to name new layers' directories. None means like the existing ones, else by digest.
            background: background work, started for each store that is opened.

        Raises:
            WorkDirInUse: another process owns the work directory.
            InvalidRequest: the existing layers are named in another way than `layer_names`.
            InvalidStore: the work directory has an unknown format.
            InvalidConfiguration: the configuration cannot be used.
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
                    background=background,
                )
            )
        except BaseException:
            workers.close()
            raise
        return cls(configuration, sessions, registry, workers)

    def close(self, *, tidy: bool = False) -> None:
        """Stop the layer workers and release the work directory. Bundles stay mounted.

        Args:
            tidy: leave only images and layers in the work directory, in a reproducible form.
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
        """Pull an image into a bundle. A pull that fails leaves no bundle, no mount, and no part of a layer.

        Raises:
            GuestpullError: see the table of errors in README.md.
        """
        observer = observer or Unobserved()
        caller = cancellation or Cancellation("the pull")
        check_request(request.image_request, self._configuration)
        with (
            self.admission.admitted(request.image, caller) as admitted,
            self._sessions.using(admitted.cancellation) as session,
            session.store.reserve_bundle(request.bundle_path) as bundle,
            session.acquirer.acquire(request.image_request, admitted, observer) as acquired,
        ):
            self._make_bundle(session.store, bundle, acquired, admitted.cancellation, observer)
        return _result(acquired, bundle.rootfs)

    def fetch(
        self,
        request: ImageRequest,
        cancellation: Cancellation | None = None,
        observer: PullObserver | None = None,
    ) -> PulledImage:
        """Bring an image into the store, without a bundle; `rootfs_path` of the result is empty.

        Raises:
            GuestpullError: see the table of errors in README.md.
        """
        caller = cancellation or Cancellation("the pull")
        check_request(request, self._configuration)
        with (
            self.admission.admitted(request.image, caller) as admitted,
            self._sessions.using(admitted.cancellation) as session,
            session.acquirer.acquire(request, admitted, observer or Unobserved()) as acquired,
        ):
            session.store.record_image(acquired.image, acquired.layers)
        return _result(acquired, "")

    def _make_bundle(
        self,
        store: Store,
        bundle: BundleReservation,
        acquired: Acquired,
        cancellation: Cancellation,
        observer: PullObserver,
    ) -> None:
        """Mount the rootfs, write config.json, and record image and bundle."""

        def mount() -> None:
            bundle.clear_overlay()  # a first attempt may have filled it until the disk was full
            mount_rootfs(acquired.layers, bundle.overlay_directory, bundle.rootfs, directory, cancellation)

        def write_config() -> None:
            write_runtime_config(
                bundle.bundle_path,
                bundle.rootfs,
                acquired.image.config,
                directory,
                bundle.writes_config,
                self._configuration.limits,
                cancellation,
            )

        with bundle.opened() as directory:
            store.with_room(mount)
            observer.mounted(bundle.rootfs)
            store.with_room(write_config)
        cancellation.check()
        image = store.record_image(acquired.image, acquired.layers)
        store.with_room(lambda: bundle.commit(image))


def _result(acquired: Acquired, rootfs: str) -> PulledImage:
    image = acquired.image
    return PulledImage(image.image_id, image.manifest_digest, image.reference, rootfs, acquired.pulled)
