"""The standard health service (grpc.health.v1).

gRPC's own servicer holds a lock while it writes to a watching client: a client that does not read would keep all
other watchers, and the end of the daemon, waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its package has no types
    """Says whether services serve.

    Args:
        serving: by the services' names.
    """

    def __init__(self, serving: Mapping[str, bool]) -> None:
        self._serving = dict(serving)
        self._ending = asyncio.Event()

    def end(self) -> None:
        """From now on nothing serves; those who watch are told, and their streams end."""
        self._serving = dict.fromkeys(self._serving, False)
        self._ending.set()

    async def Check(  # noqa: N802 - the names are the .proto's
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """Whether a service serves."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return self._answer(request.service)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Whether a service serves now, and again when that changes."""
        await context.write(self._answer(request.service))
        await self._ending.wait()
        if request.service in self._serving:
            await context.write(self._answer(request.service))

    def _answer(self, service: str) -> health_pb2.HealthCheckResponse:
        serving = self._serving.get(service)
        if serving is None:
            return health_pb2.HealthCheckResponse(status=_Status.SERVICE_UNKNOWN)
        return health_pb2.HealthCheckResponse(status=_Status.SERVING if serving else _Status.NOT_SERVING)
