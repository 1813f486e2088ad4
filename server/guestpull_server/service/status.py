"""Converts errors of the core to google.rpc.Status with ErrorInfo and RequestInfo (error_details.proto).

The message is for people and includes the request's id; `reason` and `metadata` are for programs.

gRPC sends the message twice, in HTTP headers. If the headers exceed the client's limit (8 KiB by default), the
client drops all of them, including the code. So long texts, which callers and registries can cause, are
shortened.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, takewhile
from typing import Final

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from guestpull_server.errors import GuestpullError

DOMAIN: Final = "guestpull"

_MAX_MESSAGE_BYTES: Final = 1024  # percent-encoded, as in the header grpc-message
_MAX_VALUE_BYTES: Final = 256
_ELLIPSIS: Final = "…"


def status_of(error: Exception, request_id: str) -> grpc.Status:
    """Return the status that a client gets for an error.

    An exception that is not a GuestpullError is a bug: the client gets INTERNAL and the request's id, which
    identifies the traceback in the log.
    """
    if isinstance(error, GuestpullError):
        code = code_pb2.Code.Value(error.status.value)
        reason, message, values = error.reason, error.explain(), error.facts()
    else:
        code, reason, values = code_pb2.INTERNAL, "INTERNAL", {}
        message = "Unexpected error in guestpulld. Report it with the traceback from the daemon's log."
    metadata = {name: _shortened(value, _MAX_VALUE_BYTES) for name, value in values.items()} | {
        "request_id": request_id
    }
    message = _shortened(message, _MAX_MESSAGE_BYTES)
    details = (
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata),
        error_details_pb2.RequestInfo(request_id=request_id),
    )
    return rpc_status.to_status(
        status_pb2.Status(
            code=code,
            message=f"{message} [request {request_id}]",
            details=[_packed(detail) for detail in details],
        )
    )


def _packed(detail: error_details_pb2.ErrorInfo | error_details_pb2.RequestInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _shortened(text: str, limit: int) -> str:
    """Remove the middle of a text that is longer than `limit` bytes when percent-encoded."""
    # a file name may contain bytes that are not UTF-8; a message may not
    text = text.encode(errors="backslashreplace").decode()
    if sum(map(_encoded_bytes, text)) <= limit:
        return text
    left = limit - _encoded_bytes(_ELLIPSIS)
    tail = _fitting(reversed(text), left // 3)  # the end says what to do
    head = _fitting(text, left - left // 3)
    return f"{text[:head]}{_ELLIPSIS}{text[len(text) - tail :]}"


def _fitting(characters: Iterable[str], limit: int) -> int:
    """Return how many of the characters fit into `limit` bytes."""
    sizes = accumulate(map(_encoded_bytes, characters))
    return sum(1 for _ in takewhile(lambda size: size <= limit, sizes))


def _encoded_bytes(character: str) -> int:
    plain = " " <= character <= "~" and character != "%"
    return 1 if plain else 3 * len(character.encode())
