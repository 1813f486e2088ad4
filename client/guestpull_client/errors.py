"""What can go wrong with a call, as exceptions: one a status of the service's table.

The service explains each error itself; `str(error)` is that explanation. `reason` and `facts` are for programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class GuestpullError(Exception):
    """Base of all errors that a call raises.

    Attributes:
        message: what happened and what to do, for people.
        reason: stable, for programs: `IMAGE_NOT_FOUND`; the service's README lists them.
        facts: what it was about.
        request_id: by which the service's log tells more.
        code: the gRPC status code's name.
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
    """The registry, or the store, has no such image, tag, blob or bundle."""

    code = "NOT_FOUND"


class Unauthenticated(GuestpullError):
    """The registry wants credentials, or refuses those that were sent."""

    code = "UNAUTHENTICATED"


class PermissionDenied(GuestpullError):
    """The registry, the configuration or the service does not allow it."""

    code = "PERMISSION_DENIED"


class AlreadyExists(GuestpullError):
    """The bundle is in use."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(GuestpullError):
    """It cannot be done as things are: no Linux image, no such platform, an image in use."""

    code = "FAILED_PRECONDITION"


class DataLoss(GuestpullError):
    """What the registry sent is not what its digests say."""

    code = "DATA_LOSS"


class ResourceExhausted(GuestpullError):
    """The disk is full, a limit is exceeded, or too much is asked at once."""

    code = "RESOURCE_EXHAUSTED"


class Unavailable(GuestpullError):
    """The registry, or the service, does not answer."""

    code = "UNAVAILABLE"


class Cancelled(GuestpullError):
    """The call was cancelled."""

    code = "CANCELLED"


class DeadlineExceeded(GuestpullError):
    """The call did not finish in its time."""

    code = "DEADLINE_EXCEEDED"


class Internal(GuestpullError):
    """The service failed in a way that it did not expect."""

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
