"""What each RPC gets: an id, a cancellation that follows the caller, log lines, and errors as statuses."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import grpc

from guestpull_server.cancellation import Cancellation
from guestpull_server.errors import GuestpullError, Status
from guestpull_server.service.log import Fact, facts
from guestpull_server.service.status import status_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """An RPC that is being answered. Its cancellation ends with the caller, or at the caller's deadline."""

    id: str
    cancellation: Cancellation
    outcome: dict[str, Fact] = field(default_factory=dict)
    """What came of it, for the log."""


@contextmanager
def answering(context: grpc.ServicerContext, rpc: str, **asked: Fact) -> Iterator[Request]:
    """Answer an RPC within the block: what is raised there becomes the status that the client gets.

    Args:
        context: gRPC's, of the RPC.
        rpc: its name.
        asked: what it is about, for the log. Never credentials.
    """
    remaining = context.time_remaining()
    deadline = None if remaining is None else time.monotonic() + remaining
    name = secrets.token_hex(4)
    request = Request(name, Cancellation(rpc, deadline, request=name))
    if not context.add_callback(request.cancellation.cancel):
        request.cancellation.cancel()
    started = time.monotonic()
    try:
        yield request
    except GuestpullError as error:
        level = logging.INFO if error.status is Status.CANCELLED else logging.WARNING
        seconds = round(time.monotonic() - started, 4)
        told = facts(request=request.id, **asked, reason=error.reason, error=error.explain(), seconds=seconds)
        _log.log(level, "%s failed", rpc, extra=told)
        _abort(context, error, request.id)
    except Exception as error:
        if not context.is_active():  # gRPC's own way out of a call whose client has gone
            raise
        _log.exception("%s met an unknown error", rpc, extra=facts(request=request.id, **asked))
        _abort(context, error, request.id)
    else:
        seconds = round(time.monotonic() - started, 4)
        told = facts(request=request.id, **asked, **request.outcome, seconds=seconds)
        _log.info("%s", rpc, extra=told)


def _abort(context: grpc.ServicerContext, error: Exception, request_id: str) -> NoReturn:
    context.abort_with_status(status_of(error, request_id))
    raise AssertionError("abort_with_status always raises")
