"""The typed client: calls as methods, messages as data classes, errors as exceptions.

    with Client() as client:
        pulled = client.pull("busybox", "/run/bundles/one")
        for event in client.pull_with_progress("debian:12", "/run/bundles/two"):
            ...
        client.release_bundle("/run/bundles/one")

A client is thread-safe and keeps one connection, which its first call opens. Create it after forking: gRPC does
not support fork.
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
_Response = TypeVar("_Response")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for a service on another machine: its certificate authorities, our certificate and its key."""

    authorities: str
    certificate: str
    key: str


class Client:
    """A connection to a guestpulld. A context manager.

    Args:
        address: `unix:///path` or `host:port`; defaults to $GUESTPULL_ADDRESS, then to the daemon's default.
        timeout: default time limit of a call in seconds; None, or more than 292 years, for no limit.
        tls: files for a service on another machine.

    Raises:
        InvalidArgument: the address is invalid, or a TLS file cannot be read.
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
        """Close the connection and cancel the calls in progress."""
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
        """Pull an image and create a bundle from it that a runtime can start.

        Args:
            image: a reference.
            bundle: the bundle's directory in the service's mount namespace; a relative path is made absolute here.
            auth: `user:password` for the registry.
            policy: when to contact the registry.
            platform: `os/architecture[/variant]`; empty for the host's.
            timeout: seconds.

        Raises:
            GuestpullError: the pull failed and left no bundle.
        """
        request = _pull_request(image, bundle, auth, policy, platform)
        with self._translated_errors():
            call = self._service.PullImage.future(request, timeout=self._seconds(timeout))
            try:
                return _pulled(call.result())
            except BaseException:
                # without this, the service would continue the interrupted pull until the channel is closed,
                # as it does after an interrupt within `future` itself
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
        """Like `pull`, and yield progress events; the last event is the PulledImage.

        The pull starts when the first event is requested. Closing the generator, or leaving a loop over it,
        cancels the pull.

        Raises:
            GuestpullError: the pull failed and left no bundle.
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
        """List the images of the store: all, or those with the given reference."""
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
        """List the layers of the store: all, or those of one image.

        Raises:
            NotFound: the image does not exist.
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
        """List the bundles that were created and not released."""
        answer = self._call(self._service.ListBundles, pb.ListBundlesRequest())
        return tuple(
            Bundle(bundle.bundle_path, bundle.image_id, bundle.reference, bundle.mounted)
            for bundle in answer.bundles
        )

    # -- removing -------------------------------------------------------------------------------------------

    def remove_image(self, image: str, *, force: bool = False) -> Removal:
        """Remove an image, named by id or reference, and delete the layers that nothing else uses.

        Raises:
            NotFound: the image does not exist.
            FailedPrecondition: bundles use the image, and `force` is false.
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
        """Unmount a bundle and delete what was written to it.

        Raises:
            NotFound: the path is not a bundle of the service.
            FailedPrecondition: a process uses the bundle's root filesystem.
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
        """Whether the service reports that it is serving.

        Raises:
            Unavailable: the service does not answer.
        """
        stub = health_pb2_grpc.HealthStub(self._channel)
        answer = self._call(stub.Check, health_pb2.HealthCheckRequest(service=service))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    # -- calls ----------------------------------------------------------------------------------------------

    def _call(
        self, method: Callable[..., _Response], request: object, timeout: float | None = None
    ) -> _Response:
        with self._translated_errors():
            return method(request, timeout=self._seconds(timeout))

    def _seconds(self, timeout: float | None) -> float | None:
        seconds = self._timeout if timeout is None else timeout
        # gRPC takes a longer timeout for a deadline in the past
        return None if seconds is not None and seconds > threading.TIMEOUT_MAX else seconds

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            # gRPC raises the call itself, which the stubs do not declare
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
            return error_class(
                self._explain_no_answer(message), "SERVICE_UNAVAILABLE", {"address": self.address}
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            message = (
                f"the server at {self.address} is not guestpulld, or is another version of it ({message})."
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"guestpulld at {self.address} did not answer in time. Allow more time (--timeout)."
        return error_class(message, code.name)

    def _explain_no_answer(self, message: str) -> str:
        # gRPC's message repeats the address; only its last clause, the operating system's or TLS's, says why
        why = message.removesuffix(": OK").rpartition(": ")[2]
        if not self.address.startswith("unix:") and ("handshake" in message or why == "Socket closed"):
            return (
                f"TLS with {self.address} failed ({why}). Over TCP, guestpulld requires a client certificate: "
                "pass --tls-authorities, --tls-certificate and --tls-key."
            )
        return (
            f"no guestpulld answers at {self.address} ({why}). Start it with "
            f"`guestpulld serve --listen {self.address}`, or name its address (--address, ${ADDRESS_VARIABLE})."
        )

    def _who_may_connect(self) -> str:
        """Explain a socket that this user may not connect to."""
        refusal = f"You may not connect to {self.address}"
        try:
            socket = os.stat(self.address.removeprefix("unix:").removeprefix("//"))
        except OSError:
            return f"{refusal}: you may not search its directory. Call as root."
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
                f"Cannot read {path}: {error.strerror}. TLS needs authorities, a certificate and its key.",
                "INVALID_TLS_FILE",
                {"path": path},
            ) from None
    return grpc.ssl_channel_credentials(*contents)


def _text(field: str, text: str) -> str:
    """Encode a text for protobuf; bytes that are not in the locale's encoding are taken as UTF-8.

    Raises:
        InvalidArgument: the bytes are not UTF-8.
    """
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        # do not repeat the value: it may be a password
        raise errors.InvalidArgument(
            f"Invalid {field}: not UTF-8. Encode it as UTF-8.",
            "INVALID_REQUEST",
            {"field": field},
        ) from None


def _absolute(path: str) -> str:
    """Make a path absolute; an empty path stays empty, and the service refuses it."""
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
    """Translate an event; None for an unknown event of a newer service."""
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
