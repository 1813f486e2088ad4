"""The client of guestpull's service: a typed class, the command line `guestpull`, and the kata-agent stand-in.

  client.py     Client: the service's calls as methods. Start here
  models.py     what they return, frozen data classes
  errors.py     what they raise, one class a gRPC status
  addresses.py  where the service listens
  cli.py        the commands of `guestpull`
  output.py     what they print: tables, JSON
  progress.py   a bar per layer while a pull runs
  text.py       digests, sizes and foreign text, as a terminal shows them
  agent/        `guestpull-agent`: what Kata's agent does when a container's image is pulled in the guest

In: references, paths and options. Out: data classes and exceptions; protobuf's messages stay in client.py.
Nothing here imports anything of the server; the .proto is all that both know.
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
        # gRPC takes a fifth of a second to load: who wants an exception's name, or --help, does not pay for it
        if name in ("Client", "TlsFiles"):
            from guestpull_client import client

            return getattr(client, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
