"""The standard health service (grpc.health.v1).

gRPC's own servicer holds a lock while it writes to a watching client: a client that does not read would block
all other watchers and the shutdown of the daemon.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its package has no types
    """Reports whether services are serving.

    Args:
        serving: whether each service is serving, by name.
    """

    def __init__(self, serving: Mapping[str, bool]) -> None:
        self._serving = dict(serving)
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Report NOT_SERVING for all services from now on, and end the streams of watchers."""
        self._serving = dict.fromkeys(self._serving, False)
        self._ending.set()

    async def Check(  # noqa: N802 - the names are the .proto's
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """Return whether a service is serving."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return self._answer(request.service)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Send whether a service is serving, now and when it changes."""
        await context.write(self._answer(request.service))
        await self._ending.wait()
        if request.service in self._serving:
            await context.write(self._answer(request.service))

    def _answer(self, service: str) -> health_pb2.HealthCheckResponse:
        serving = self._serving.get(service)
        if serving is None:
            return health_pb2.HealthCheckResponse(status=_Status.SERVICE_UNKNOWN)
        return health_pb2.HealthCheckResponse(status=_Status.SERVING if serving else _Status.NOT_SERVING)
