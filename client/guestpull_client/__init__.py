"""The client of guestpull's service: a typed class, the command line `guestpull`, and the kata-agent stand-in.

  client.py     Client: the service's calls as methods. Start here
  models.py     the results of these calls, as frozen data classes
  errors.py     the exceptions that they raise, one class per gRPC status
  addresses.py  the service's address
  cli.py        the commands of `guestpull`
  output.py     prints results as tables or JSON
  progress.py   shows a bar per layer during a pull
  text.py       formats digests, sizes and untrusted text for a terminal
  agent/        `guestpull-agent`: runs a container whose image is pulled in the guest, as Kata's agent does

In: references, paths and options. Out: data classes and exceptions; protobuf messages stay in client.py.
The client imports nothing from the server. Both know only the .proto.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestpull_client.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    GuestpullError,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from guestpull_client.models import (
    Bundle,
    Collection,
    Image,
    Layer,
    LayerDone,
    LayerProgress,
    Mounted,
    PulledImage,
    PulledLayer,
    PullEvent,
    PullPolicy,
    Release,
    Removal,
    Resolved,
    ResolvedLayer,
)

if TYPE_CHECKING:
    from guestpull_client.client import Client, TlsFiles

__all__ = [
    "AlreadyExists",
    "Bundle",
    "Cancelled",
    "Client",
    "Collection",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "GuestpullError",
    "Image",
    "Internal",
    "InvalidArgument",
    "Layer",
    "LayerDone",
    "LayerProgress",
    "Mounted",
    "NotFound",
    "PermissionDenied",
    "PullEvent",
    "PullPolicy",
    "PulledImage",
    "PulledLayer",
    "Release",
    "Removal",
    "Resolved",
    "ResolvedLayer",
    "ResourceExhausted",
    "TlsFiles",
    "Unauthenticated",
    "Unavailable",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # loading gRPC takes 0.2 s: do it only for Client, not for an exception or --help
        if name in ("Client", "TlsFiles"):
            from guestpull_client import client

            return getattr(client, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
