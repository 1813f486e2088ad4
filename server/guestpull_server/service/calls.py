"""What each RPC gets: an id, a cancellation that follows its caller, a thread, log lines, and errors as statuses.

gRPC runs in an event loop, where a call that waits for its client costs no thread. The core is synchronous and
works in threads. Calls that may wait for long (pulls), calls that delete, and lists have threads of their own, so
that none of them keeps the others waiting.
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

_TO_REFUSE = 8  # threads beside those of max_queued_pulls: a pull too many needs one to be refused in
_Answer = TypeVar("_Answer")


class Work(Enum):
    """What a call does, which decides the threads that it may occupy."""

    PULL = "pull"
    DELETE = "delete"
    LIST = "list"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """An RPC that is being answered. Its cancellation ends with the caller, or at the caller's deadline."""

    id: str
    rpc: str
    work: Work
    asked: Mapping[str, FieldValue]
    """What it is about, for the log. Never credentials."""
    cancellation: Cancellation
    begun: float
    answer: asyncio.Future[Any]
    """The answer, or the status to abort with."""
    outcome: dict[str, FieldValue] = field(default_factory=dict)
    """What came of it, for the log."""


class Calls:
    """The calls under way. Its methods are for the event loop's thread."""

    def __init__(self, limits: Limits) -> None:
        self._threads = {
            Work.PULL: AnsweringThreads(limits.max_queued_pulls + _TO_REFUSE, "pull"),
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
        do: Callable[[Call], _Answer],
        asked: Mapping[str, FieldValue],
        events: PullEvents | None = None,
    ) -> _Answer:
        """Have a thread answer an RPC; an error becomes the status that the client gets.

        Args:
            context: gRPC's, of the RPC.
            rpc: its name.
            work: whose threads do it.
            do: gives the answer; runs in a thread, and goes on until it observes the call's cancellation.
            asked: what it is about, for the log. Never credentials.
            events: what is to be streamed meanwhile.
        """
        call = self._call(context, rpc, work, asked)
        try:
            self._threads[work].submit(self._run, call, do)
            if events is not None:
                async for event in events.until(call.answer):
                    await context.write(event)
            answer = await call.answer
        except BaseException:
            # gRPC cancels the task of a call whose client has gone
            call.cancellation.cancel()
            raise
        if isinstance(answer, grpc.Status):
            await context.abort(answer.code, answer.details or "", tuple(answer.trailing_metadata or ()))
        done: _Answer = answer
        return done

    @property
    def pulls(self) -> int:
        """How many pulls are under way or wait for their turn."""
        return sum(call.work is Work.PULL for call in self._under_way)

    def cancel(self) -> None:
        """Cancel all calls that are under way."""
        for call in self._under_way:
            call.cancellation.cancel()

    async def idle(self, seconds: float) -> tuple[Call, ...]:
        """Wait until no thread works for a call any more; returns the calls that have one after so long."""
        await asyncio.wait({asyncio.ensure_future(self._idle.wait())}, timeout=seconds)
        return tuple(self._under_way)

    def _call(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        rpc: str,
        work: Work,
        asked: Mapping[str, FieldValue],
    ) -> Call:
        remaining = context.time_remaining()
        begun = time.monotonic()
        deadline = None if remaining is None else begun + remaining
        name = secrets.token_hex(4)
        cancellation = Cancellation(rpc, deadline, request=name)
        call = Call(name, rpc, work, asked, cancellation, begun, self._loop.create_future())
        self._under_way.add(call)
        self._idle.clear()
        return call

    def _run(self, call: Call, do: Callable[[Call], _Answer]) -> None:
        answer: _Answer | grpc.Status
        try:
            call.cancellation.check()  # the caller may have left before a thread was free
            answer = do(call)
        except GuestpullError as error:
            level = logging.INFO if error.status is Status.CANCELLED else logging.WARNING
            told = _told(call, reason=error.reason, error=error.explain())
            _log.log(level, "%s failed", call.rpc, extra=told)
            answer = status_of(error, call.id)
        except Exception as error:  # noqa: BLE001 - logged, and the client gets INTERNAL
            _log.exception("%s met an unknown error", call.rpc, extra=_told(call))
            answer = status_of(error, call.id)
        else:
            _log.info("%s", call.rpc, extra=_told(call, **call.outcome))
        self._loop.call_soon_threadsafe(self._ended, call, answer)

    def _ended(self, call: Call, answer: object) -> None:
        self._under_way.discard(call)
        if not self._under_way:
            self._idle.set()
        if not call.answer.done():
            call.answer.set_result(answer)


def _told(call: Call, **more: FieldValue) -> Mapping[str, Mapping[str, FieldValue]]:
    return log_fields(request=call.id, **call.asked, **more, seconds=round(time.monotonic() - call.begun, 4))
