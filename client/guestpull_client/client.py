"""The typed client: the service's calls as methods, its messages as data classes, its errors as exceptions.

    with Client() as client:
        pulled = client.pull("busybox", "/run/bundles/one")
        for event in client.pull_with_progress("debian:12", "/run/bundles/two"):
            ...
        client.release_bundle("/run/bundles/one")

A client keeps one connection, opened by its first call, and is thread-safe. A process that forks should make its
client after it did so, as gRPC asks.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, TypeVar, cast

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from guestpull_client import errors
from guestpull_client.addresses import ADDRESS_VARIABLE, address_or_default, target_of
from guestpull_client.models import (
    Bundle,
    Collection,
    Image,
    Layer,
    LayerDone,
    LayerProgress,
    Mounted,
    PulledImage,
    PulledLayer,
    PullEvent,
    PullPolicy,
    Release,
    Removal,
    Resolved,
    ResolvedLayer,
)
from guestpull_protos import image_service_pb2 as pb
from guestpull_protos import image_service_pb2_grpc as pb_grpc

_DOMAIN: Final = "guestpull"
_DETAILS: Final = "grpc-status-details-bin"
_MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024  # lists of stores with tens of thousands of layers
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for a service beyond this machine: its authorities, and who we are."""

    authorities: str
    certificate: str
    key: str


class Client:
    """A connection to a guestpulld. A context manager.

    Args:
        address: `unix:///path` or `host:port`; without one, $GUESTPULL_ADDRESS, or the daemon's default.
        timeout: seconds that a call may take, where the call does not say otherwise; None, or more than a
            century: as long as it takes.
        tls: for a service beyond this machine.

    Raises:
        InvalidArgument: the address is none, or a TLS file cannot be read.
    """

    def __init__(
        self, address: str | None = None, timeout: float | None = None, tls: TlsFiles | None = None
    ) -> None:
        self.address = address_or_default(address)
        self._timeout = timeout
        target = target_of(self.address)
        options = (
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.enable_http_proxy", 0),
        )
        if tls is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, _tls_credentials(tls), options)
        self._service = pb_grpc.ImageServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection; calls that are under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    # -- pulling --------------------------------------------------------------------------------------------

    def pull(
        self,
        image: str,
        bundle: str,
        *,
        auth: str = "",
        policy: PullPolicy = PullPolicy.UNSPECIFIED,
        platform: str = "",
        timeout: float | None = None,
    ) -> PulledImage:
        """Make an image a bundle that a runtime can start.

        Args:
            image: a reference.
            bundle: the bundle's directory, as the service sees it; a relative one is made absolute here.
            auth: `user:password` for the registry.
            policy: when the registry is asked.
            platform: `os/architecture[/variant]`; the host's where it is empty.
            timeout: seconds.

        Raises:
            GuestpullError: the pull failed; there is no bundle.
        """
        request = _pull_request(image, bundle, auth, policy, platform)
        with self._translated_errors():
            call = self._service.PullImage.future(request, timeout=self._seconds(timeout))
            try:
                return _pulled(call.result())
            except BaseException:
                # whoever interrupts us does not want the pull: without this it would go on in the service until
                # the channel is closed, as it does after an interrupt within `future` itself
                call.cancel()  # type: ignore[no-untyped-call]  # grpc-stubs leave it untyped
                raise

    def pull_with_progress(
        self,
        image: str,
        bundle: str,
        *,
        auth: str = "",
        policy: PullPolicy = PullPolicy.UNSPECIFIED,
        platform: str = "",
        timeout: float | None = None,
    ) -> Generator[PullEvent, None, None]:
        """The same, yielding what happens meanwhile; the last event is the PulledImage.

        The pull begins with the first event that is asked for; closing the generator, or leaving a loop over it,
        cancels it.

        Raises:
            GuestpullError: the pull failed; there is no bundle.
        """
        request = _pull_request(image, bundle, auth, policy, platform)
        with self._translated_errors():
            call = self._service.PullImageWithProgress(request, timeout=self._seconds(timeout))
            try:
                for event in call:
                    translated = _event(event)
                    if translated is not None:
                        yield translated
            finally:
                call.cancel()  # type: ignore[no-untyped-call]  # grpc-stubs leave it untyped

    # -- lists ----------------------------------------------------------------------------------------------

    def images(self, reference: str = "") -> tuple[Image, ...]:
        """The images of the store; all of them, or those that have a name."""
        request = pb.ListImagesRequest(reference=_text("reference", reference))
        answer = self._call(self._service.ListImages, request)
        return tuple(
            Image(
                id=image.id,
                digest=image.digest,
                reference=image.reference,
                references=tuple(image.references),
                layers=tuple(image.layers),
                size_bytes=image.size_bytes,
                platform=image.platform,
                bundles=tuple(image.bundles),
                read_only_store=image.read_only_store,
            )
            for image in answer.images
        )

    def layers(self, image: str = "") -> tuple[Layer, ...]:
        """The layers of the store; all of them, or those of an image.

        Raises:
            NotFound: there is no such image.
        """
        answer = self._call(self._service.ListLayers, pb.ListLayersRequest(image=_text("image", image)))
        return tuple(
            Layer(
                compressed_digest=layer.compressed_digest,
                uncompressed_digest=layer.uncompressed_digest,
                decoder=layer.decoder,
                encrypted=layer.encrypted,
                store_path=layer.store_path,
                size_bytes=layer.size_bytes,
                images=tuple(layer.images),
                bundles=layer.bundles,
                present=layer.present,
                read_only=layer.read_only,
            )
            for layer in answer.layers
        )

    def bundles(self) -> tuple[Bundle, ...]:
        """The bundles that were made and not released."""
        answer = self._call(self._service.ListBundles, pb.ListBundlesRequest())
        return tuple(
            Bundle(bundle.bundle_path, bundle.image_id, bundle.reference, bundle.mounted)
            for bundle in answer.bundles
        )

    # -- letting go -----------------------------------------------------------------------------------------

    def remove_image(self, image: str, *, force: bool = False) -> Removal:
        """Forget an image, by its id or by one of its names, and delete the layers that nobody else uses.

        Raises:
            NotFound: there is no such image.
            FailedPrecondition: bundles use it, and `force` was not given.
        """
        request = pb.RemoveImageRequest(image=_text("image", image), force=force)
        answer = self._call(self._service.RemoveImage, request)
        return Removal(
            tuple(answer.image_ids),
            tuple(answer.references),
            tuple(answer.deleted_layers),
            answer.freed_bytes,
        )

    def release_bundle(self, bundle: str) -> Release:
        """Unmount a bundle, and delete what was written in it.

        Raises:
            NotFound: it is no bundle of the service.
            FailedPrecondition: something uses its root filesystem.
        """
        request = pb.ReleaseBundleRequest(bundle_path=_text("bundle", _absolute(bundle)))
        answer = self._call(self._service.ReleaseBundle, request)
        return Release(tuple(answer.deleted_layers), answer.freed_bytes)

    def collect_garbage(self, *, dry_run: bool = False) -> Collection:
        """Delete the layers that no image, bundle or pull uses; with `dry_run`, only report them."""
        answer = self._call(self._service.CollectGarbage, pb.CollectGarbageRequest(dry_run=dry_run))
        return Collection(tuple(answer.deleted_layers), answer.freed_bytes)

    # -- health ---------------------------------------------------------------------------------------------

    def is_healthy(self, service: str = "") -> bool:
        """Whether the service says that it serves.

        Raises:
            Unavailable: it does not answer.
        """
        stub = health_pb2_grpc.HealthStub(self._channel)
        answer = self._call(stub.Check, health_pb2.HealthCheckRequest(service=service))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    # -- calls ----------------------------------------------------------------------------------------------

    def _call(self, method: Callable[..., _Answer], request: object, timeout: float | None = None) -> _Answer:
        with self._translated_errors():
            return method(request, timeout=self._seconds(timeout))

    def _seconds(self, timeout: float | None) -> float | None:
        seconds = self._timeout if timeout is None else timeout
        # what is longer than any wait can be is a deadline in the past to gRPC
        return None if seconds is not None and seconds > threading.TIMEOUT_MAX else seconds

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            # what a call raises is the call itself, which the stubs do not say
            raise self._translated(cast("grpc.Call", error)) from None

    def _translated(self, call: grpc.Call) -> errors.GuestpullError:
        info = _error_info(call)
        code = call.code()
        error_class = errors.BY_CODE.get(code.name, errors.GuestpullError)
        message = call.details() or code.name
        if info is not None:
            facts = dict(info.metadata)
            return error_class(message, info.reason, facts, facts.pop("request_id", ""))
        if code is grpc.StatusCode.UNAVAILABLE and "Permission denied" in message:
            return errors.PermissionDenied(
                self._who_may_connect(), "CONNECTION_NOT_PERMITTED", {"address": self.address}
            )
        if code is grpc.StatusCode.UNAVAILABLE:
            return error_class(self._absence(message), "SERVICE_UNAVAILABLE", {"address": self.address})
        if code is grpc.StatusCode.UNIMPLEMENTED:
            message = (
                f"what answers at {self.address} is no guestpulld, or one of another version ({message})."
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"guestpulld at {self.address} did not answer in time. Allow more time (--timeout)."
        return error_class(message, code.name)

    def _absence(self, message: str) -> str:
        """What to do about a service that does not answer."""
        # what gRPC says names the address twice more; the last clause is the operating system's, or of TLS
        why = message.removesuffix(": OK").rpartition(": ")[2]
        if not self.address.startswith("unix:") and ("handshake" in message or why == "Socket closed"):
            return (
                f"what answers at {self.address} and this client do not agree on TLS ({why}). Beyond its machine, "
                "guestpulld wants a client certificate: name --tls-authorities, --tls-certificate and --tls-key."
            )
        return (
            f"no guestpulld answers at {self.address} ({why}). Start it with "
            f"`guestpulld serve --listen {self.address}`, or name its address (--address, ${ADDRESS_VARIABLE})."
        )

    def _who_may_connect(self) -> str:
        """What to do about a socket that the operating system keeps this user from."""
        refusal = f"You may not connect to {self.address}"
        try:
            socket = os.stat(self.address.removeprefix("unix:").removeprefix("//"))
        except OSError:
            return f"{refusal}: its directory is closed to you. Call as root."
        owner = _name(lambda: pwd.getpwuid(socket.st_uid).pw_name, socket.st_uid)
        if not socket.st_mode & stat.S_IWGRP:
            return (
                f"{refusal}: only user {owner} may. Call as {owner}, or have an administrator set socket_group "
                "in guestpulld's configuration."
            )
        group = _name(lambda: grp.getgrgid(socket.st_gid).gr_name, socket.st_gid)
        return (
            f"{refusal}: only user {owner} and members of group {group} may. Call as {owner}, or have an "
            f"administrator add you to that group (usermod --append --groups {group}), and log in again."
        )


def _name(look_up: Callable[[], str], number: int) -> str:
    try:
        return look_up()
    except KeyError:
        return str(number)


def _error_info(call: grpc.Call) -> error_details_pb2.ErrorInfo | None:
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == _DOMAIN:
                    return info
    return None


def _tls_credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    contents: list[bytes] = []
    for path in (tls.authorities, tls.key, tls.certificate):
        try:
            with open(path, "rb") as file:
                contents.append(file.read())
        except OSError as error:
            raise errors.InvalidArgument(
                f"{path} cannot be read: {error.strerror}. TLS needs authorities, a certificate and its key.",
                "INVALID_TLS_FILE",
                {"path": path},
            ) from None
    return grpc.ssl_channel_credentials(*contents)


def _text(field: str, text: str) -> str:
    """A text as it can be sent: an argument that is not in the locale's encoding is taken by its bytes.

    Raises:
        InvalidArgument: these are no UTF-8.
    """
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        # what was given may be a password: it is not repeated
        raise errors.InvalidArgument(
            f"{field}: it is no UTF-8. Write it in UTF-8, as the service does.",
            "INVALID_REQUEST",
            {"field": field},
        ) from None


def _absolute(path: str) -> str:
    """A relative path as the caller means it; nothing stays nothing, for the service to refuse."""
    return path if not path or path.startswith("/") else os.path.abspath(path)


def _pull_request(
    image: str, bundle: str, auth: str, policy: PullPolicy, platform: str
) -> pb.PullImageRequest:
    return pb.PullImageRequest(
        image_url=_text("image", image),
        bundle_path=_text("bundle", _absolute(bundle)),
        auth_info=_text("auth", auth),
        pull_policy=pb.PullPolicy.Value(f"PULL_POLICY_{policy.name}"),
        platform=_text("platform", platform),
    )


def _pulled(answer: pb.PullImageResponse) -> PulledImage:
    return PulledImage(
        image_id=answer.image_id,
        manifest_digest=answer.manifest_digest,
        reference=answer.reference,
        rootfs_path=answer.rootfs_path,
        downloaded_bytes=answer.downloaded_bytes,
        layers=tuple(
            PulledLayer(
                layer.compressed_digest, layer.uncompressed_digest, layer.reused, layer.downloaded_bytes
            )
            for layer in answer.layers
        ),
    )


def _event(event: pb.PullImageEvent) -> PullEvent | None:
    """An event; None for one that a newer service sends and we do not know."""
    match event.WhichOneof("event"):
        case "resolved":
            found = event.resolved
            layers = tuple(ResolvedLayer(layer.compressed_digest, layer.size_bytes) for layer in found.layers)
            return Resolved(found.reference, found.image_id, found.manifest_digest, layers)
        case "layer_progress":
            progress = event.layer_progress
            return LayerProgress(progress.compressed_digest, progress.done_bytes, progress.total_bytes)
        case "layer_done":
            done = event.layer_done
            return LayerDone(done.compressed_digest, done.reused, done.downloaded_bytes)
        case "mounted":
            return Mounted(event.mounted.rootfs_path)
        case "result":
            return _pulled(event.result)
        case _:
            return None
