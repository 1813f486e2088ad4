"""The core's errors -> google.rpc.Status with ErrorInfo and RequestInfo (google/rpc/error_details.proto).

The message is for people, and says the request's id; `reason` and `metadata` are for machines.
"""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from guestpull_server.errors import GuestpullError

DOMAIN: Final = "guestpull"


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
    details = (
        error_details_pb2.ErrorInfo(
            reason=reason, domain=DOMAIN, metadata=facts | {"request_id": request_id}
        ),
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
