"""Runs RPCs in threads, each with an id, a cancellation and log lines; errors become statuses.

gRPC runs in an event loop, where a call that waits for its client does not occupy a thread. The core is
synchronous and runs in threads. Pulls, deletions and lists each have a thread pool of their own, so that none of
them delays the others.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import grpc

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import GuestpullError, Status
from guestpull_server.service.log import FieldValue, log_fields
from guestpull_server.service.progress import PullEvents
from guestpull_server.service.status import status_of
from guestpull_server.service.threads import AnsweringThreads

_log = logging.getLogger(__name__)

_REFUSAL_THREADS = 8  # beyond max_queued_pulls: refusing a pull when the queue is full needs a thread, too
_Answer = TypeVar("_Answer")


class Work(Enum):
    """The kind of work that a call does. It decides which thread pool runs the call."""

    PULL = "pull"
    DELETE = "delete"
    LIST = "list"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """An RPC in progress. It is cancelled when the caller leaves and at the caller's deadline."""

    id: str
    rpc: str
    work: Work
    fields: Mapping[str, FieldValue]
    """Log fields of the request. Never credentials."""
    cancellation: Cancellation
    started: float
    answer: asyncio.Future[Any]
    """The response, or the status to abort with."""
    result_fields: dict[str, FieldValue] = field(default_factory=dict)
    """Log fields of the result."""


class Calls:
    """The calls in progress. Use its methods in the event loop's thread only."""

    def __init__(self, limits: Limits) -> None:
        self._threads = {
            Work.PULL: AnsweringThreads(limits.max_queued_pulls + _REFUSAL_THREADS, "pull"),
            Work.DELETE: AnsweringThreads(limits.max_concurrent_deletions, "delete"),
            Work.LIST: AnsweringThreads(limits.max_concurrent_lists, "list"),
        }
        self._loop = asyncio.get_running_loop()
        self._under_way: set[Call] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def answer(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        rpc: str,
        work: Work,
        handler: Callable[[Call], _Answer],
        fields: Mapping[str, FieldValue],
        events: PullEvents | None = None,
    ) -> _Answer:
        """Run an RPC's handler in a thread and return its response. If it fails, abort the RPC with a status.

        Args:
            context: gRPC's context of the RPC.
            rpc: the name of the RPC.
            work: selects the thread pool.
            handler: returns the response. It runs in a thread until it returns or observes the call's
                cancellation.
            fields: log fields of the request. Never credentials.
            events: events to stream to the client until the handler returns.
        """
        call = self._start(context, rpc, work, fields)
        try:
            self._threads[work].submit(self._run, call, handler)
            if events is not None:
                async for event in events.until(call.answer):
                    await context.write(event)
            answer = await call.answer
        except BaseException:
            # gRPC cancels this task when the client disconnects
            call.cancellation.cancel()
            raise
        if isinstance(answer, grpc.Status):
            await context.abort(answer.code, answer.details or "", tuple(answer.trailing_metadata or ()))
        response: _Answer = answer
        return response

    @property
    def pulls(self) -> int:
        """The number of pulls that run or wait for a turn."""
        return sum(call.work is Work.PULL for call in self._under_way)

    def cancel(self) -> None:
        """Cancel all calls in progress."""
        for call in self._under_way:
            call.cancellation.cancel()

    async def idle(self, seconds: float) -> tuple[Call, ...]:
        """Wait until no calls are in progress, at most so many seconds. Return the calls that still are."""
        await asyncio.wait({asyncio.ensure_future(self._idle.wait())}, timeout=seconds)
        return tuple(self._under_way)

    def _start(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        rpc: str,
        work: Work,
        fields: Mapping[str, FieldValue],
    ) -> Call:
        remaining = context.time_remaining()
        started = time.monotonic()
        deadline = None if remaining is None else started + remaining
        request_id = secrets.token_hex(4)
        cancellation = Cancellation(rpc, deadline, request=request_id)
        call = Call(request_id, rpc, work, fields, cancellation, started, self._loop.create_future())
        self._under_way.add(call)
        self._idle.clear()
        return call

    def _run(self, call: Call, handler: Callable[[Call], _Answer]) -> None:
        answer: _Answer | grpc.Status
        try:
            call.cancellation.check()  # the caller may have left while the call waited for a thread
            answer = handler(call)
        except GuestpullError as error:
            level = logging.INFO if error.status is Status.CANCELLED else logging.WARNING
            extra = _log_fields(call, reason=error.reason, error=error.explain())
            _log.log(level, "%s failed", call.rpc, extra=extra)
            answer = status_of(error, call.id)
        except Exception as error:  # noqa: BLE001 - logged, and the client gets INTERNAL
            _log.exception("%s failed unexpectedly", call.rpc, extra=_log_fields(call))
            answer = status_of(error, call.id)
        else:
            _log.info("%s", call.rpc, extra=_log_fields(call, **call.result_fields))
        self._loop.call_soon_threadsafe(self._ended, call, answer)

    def _ended(self, call: Call, answer: object) -> None:
        self._under_way.discard(call)
        if not self._under_way:
            self._idle.set()
        if not call.answer.done():
            call.answer.set_result(answer)


def _log_fields(call: Call, **more: FieldValue) -> Mapping[str, Mapping[str, FieldValue]]:
    return log_fields(
        request=call.id, **call.fields, **more, seconds=round(time.monotonic() - call.started, 4)
    )
