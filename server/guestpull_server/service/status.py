"""The core's errors -> google.rpc.Status with ErrorInfo and RequestInfo (google/rpc/error_details.proto).

The message is for people, and says the request's id; `reason` and `metadata` are for machines.

All of it travels in HTTP headers, twice, and a client drops it, the code included, where they are longer than some
kilobytes (8 by gRPC's default). So what is long, because a caller or a registry wrote it, is cut.
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

_MESSAGE_BYTES: Final = 1024  # as the header grpc-message has it
_FACT_BYTES: Final = 256
_ELLIPSIS: Final = "…"


def status_of(error: Exception, request_id: str) -> grpc.Status:
    """The status that a client gets for an error.

    An error that is none of ours is a bug: the client gets INTERNAL and the id by which the log tells more.
    """
    if isinstance(error, GuestpullError):
        code = code_pb2.Code.Value(error.status.value)
        reason, message, facts = error.reason, error.explain(), error.facts()
    else:
        code, reason, facts = code_pb2.INTERNAL, "INTERNAL", {}
        message = "guestpulld met an error that it does not know. Its log says more; please report it."
    metadata = {name: _cut(fact, _FACT_BYTES) for name, fact in facts.items()} | {"request_id": request_id}
    message = _cut(message, _MESSAGE_BYTES)
    details = (
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata),
        error_details_pb2.RequestInfo(request_id=request_id),
    )
    return rpc_status.to_status(
        status_pb2.Status(
            code=code, message=f"{message} [request {request_id}]", details=[_packed(one) for one in details]
        )
    )


def _packed(detail: error_details_pb2.ErrorInfo | error_details_pb2.RequestInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _cut(text: str, limit: int) -> str:
    """A text that takes no more bytes than that, percent-encoded; of a longer one, its beginning and its end."""
    # a file's name need not be UTF-8, but this must be
    text = text.encode(errors="backslashreplace").decode()
    if sum(map(_encoded_bytes, text)) <= limit:
        return text
    left = limit - _encoded_bytes(_ELLIPSIS)
    tail = _fitting(reversed(text), left // 3)  # which says what to do
    head = _fitting(text, left - left // 3)
    return f"{text[:head]}{_ELLIPSIS}{text[len(text) - tail :]}"


def _fitting(characters: Iterable[str], limit: int) -> int:
    """How many of some characters have room."""
    sizes = accumulate(map(_encoded_bytes, characters))
    return sum(1 for _ in takewhile(lambda size: size <= limit, sizes))


def _encoded_bytes(character: str) -> int:
    plain = " " <= character <= "~" and character != "%"
    return 1 if plain else 3 * len(character.encode())
