"""A guestpulld with scripted responses, as a real gRPC server on a unix socket.

    with ScriptedService(socket) as service:
        service.answers["ListBundles"] = pb.ListBundlesResponse(bundles=[pb.Bundle(bundle_path="/b")])
        service.answers["PullImage"] = refusal("NOT_FOUND", "IMAGE_NOT_FOUND", "there is no such image")
        ...call it at service.address...
        assert service.requests[-1] == pb.ListBundlesRequest()

For tests of the client alone: they check the messages that it sends and how it reads responses. It uses nothing
of the server.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeAlias, cast

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from guestpull_protos import image_service_pb2 as pb
from guestpull_protos import image_service_pb2_grpc as pb_grpc
from support.waiting import PATIENCE

Script: TypeAlias = (
    "Message | Sequence[Message] | status_pb2.Status | Callable[[grpc.ServicerContext], Message]"
)


def refusal(
    code: str, reason: str, message: str, facts: Mapping[str, str] | None = None, *, domain: str = "guestpull"
) -> status_pb2.Status:
    """An error as the service sends it."""
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=facts or {}))
    return status_pb2.Status(code=code_pb2.Code.Value(code), message=message, details=[packed])


class ScriptedService(pb_grpc.ImageServiceServicer):
    """Responses by method name; other methods respond with an empty message."""

    def __init__(self, socket: str) -> None:
        self.address = f"unix://{socket}"
        self.answers: dict[str, Script] = {}
        self.requests: list[Message] = []
        self.caller_left = threading.Event()
        self.health = health.HealthServicer()
        self._server = grpc.server(ThreadPoolExecutor(4))
        pb_grpc.add_ImageServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self._server.add_insecure_port(f"unix:{socket}")
        self.health.set("", health_pb2.HealthCheckResponse.SERVING)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()

    def wait_until_caller_leaves(self, context: grpc.ServicerContext) -> pb.PullImageResponse:
        """A pull that ends only when it is cancelled."""
        self._watch(context)
        self.caller_left.wait(PATIENCE)
        return pb.PullImageResponse()

    def PullImage(  # noqa: N802
        self, request: pb.PullImageRequest, context: grpc.ServicerContext
    ) -> pb.PullImageResponse:
        return cast("pb.PullImageResponse", self._answer("PullImage", request, context))

    def PullImageWithProgress(  # noqa: N802
        self, request: pb.PullImageRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.PullImageEvent]:
        self.requests.append(request)
        self._watch(context)
        script = self.answers.get("PullImageWithProgress", [])
        if isinstance(script, status_pb2.Status):
            context.abort_with_status(rpc_status.to_status(script))
        yield from cast("Sequence[pb.PullImageEvent]", script)

    def ListImages(  # noqa: N802
        self, request: pb.ListImagesRequest, context: grpc.ServicerContext
    ) -> pb.ListImagesResponse:
        return cast("pb.ListImagesResponse", self._answer("ListImages", request, context))

    def ListLayers(  # noqa: N802
        self, request: pb.ListLayersRequest, context: grpc.ServicerContext
    ) -> pb.ListLayersResponse:
        return cast("pb.ListLayersResponse", self._answer("ListLayers", request, context))

    def ListBundles(  # noqa: N802
        self, request: pb.ListBundlesRequest, context: grpc.ServicerContext
    ) -> pb.ListBundlesResponse:
        return cast("pb.ListBundlesResponse", self._answer("ListBundles", request, context))

    def RemoveImage(  # noqa: N802
        self, request: pb.RemoveImageRequest, context: grpc.ServicerContext
    ) -> pb.RemoveImageResponse:
        return cast("pb.RemoveImageResponse", self._answer("RemoveImage", request, context))

    def ReleaseBundle(  # noqa: N802
        self, request: pb.ReleaseBundleRequest, context: grpc.ServicerContext
    ) -> pb.ReleaseBundleResponse:
        return cast("pb.ReleaseBundleResponse", self._answer("ReleaseBundle", request, context))

    def CollectGarbage(  # noqa: N802
        self, request: pb.CollectGarbageRequest, context: grpc.ServicerContext
    ) -> pb.CollectGarbageResponse:
        return cast("pb.CollectGarbageResponse", self._answer("CollectGarbage", request, context))

    def _watch(self, context: grpc.ServicerContext) -> None:
        if not context.add_callback(self.caller_left.set):
            self.caller_left.set()

    def _answer(self, rpc: str, request: Message, context: grpc.ServicerContext) -> Message:
        self.requests.append(request)
        script = self.answers.get(rpc)
        if isinstance(script, status_pb2.Status):
            context.abort_with_status(rpc_status.to_status(script))
        if isinstance(script, Message):
            return script
        if callable(script):
            return script(context)
        method = pb.DESCRIPTOR.services_by_name["ImageService"].methods_by_name[rpc]
        return cast("Message", getattr(pb, method.output_type.name)())
