"""The exceptions of calls: one class per gRPC status that the service uses.

`str(error)` is the service's explanation, for people. `reason` and `facts` are for programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class GuestpullError(Exception):
    """Base class of all errors that a call raises.

    Attributes:
        message: what happened and what to do, for people.
        reason: a stable name for programs, such as `IMAGE_NOT_FOUND`; README.md lists them.
        facts: details for programs, such as the digest or path.
        request_id: the id of the call in the service's log.
        code: the name of the gRPC status code.
    """

    code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self, message: str, reason: str = "", facts: Mapping[str, str] | None = None, request_id: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.facts = dict(facts or {})
        self.request_id = request_id


class InvalidArgument(GuestpullError):
    """The call itself is wrong: a malformed reference, platform, or bundle path."""

    code = "INVALID_ARGUMENT"


class NotFound(GuestpullError):
    """The image, tag, blob or bundle does not exist in the registry or the store."""

    code = "NOT_FOUND"


class Unauthenticated(GuestpullError):
    """The registry requires credentials, or rejects those that were sent."""

    code = "UNAUTHENTICATED"


class PermissionDenied(GuestpullError):
    """The registry, the configuration or the service forbids the call."""

    code = "PERMISSION_DENIED"


class AlreadyExists(GuestpullError):
    """The bundle is in use."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(GuestpullError):
    """The call cannot be done in the current state: unsupported image or platform, image in use."""

    code = "FAILED_PRECONDITION"


class DataLoss(GuestpullError):
    """The registry sent data that does not match its digest."""

    code = "DATA_LOSS"


class ResourceExhausted(GuestpullError):
    """The disk is full, a limit is exceeded, or too many calls run at once."""

    code = "RESOURCE_EXHAUSTED"


class Unavailable(GuestpullError):
    """The registry or the service does not answer."""

    code = "UNAVAILABLE"


class Cancelled(GuestpullError):
    """The call was cancelled."""

    code = "CANCELLED"


class DeadlineExceeded(GuestpullError):
    """The call did not finish in time."""

    code = "DEADLINE_EXCEEDED"


class Internal(GuestpullError):
    """The service failed unexpectedly."""

    code = "INTERNAL"


BY_CODE: dict[str, type[GuestpullError]] = {
    one.code: one
    for one in (
        InvalidArgument,
        NotFound,
        Unauthenticated,
        PermissionDenied,
        AlreadyExists,
        FailedPrecondition,
        DataLoss,
        ResourceExhausted,
        Unavailable,
        Cancelled,
        DeadlineExceeded,
        Internal,
    )
}
