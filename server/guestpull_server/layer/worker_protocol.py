"""What the daemon, the fork server and a layer worker say to each other.

JSON by msgspec, over unix sockets that pass file descriptors along:

    daemon -> fork server   a datagram: UnpackRequest or VerifyRequest, with the report socket; to unpack, also
                            with the ring that will carry the layer, and the file for the record, if there is
                            to be one
    worker -> daemon        over the report socket: a byte with a pidfd, by which the worker can be killed
                            (from the fork server, and without one, where there could be no worker);
                            then one line, a report; then what `Unpacked` announces
"""

from __future__ import annotations

from typing import Final

import msgspec

from guestpull_server.config import Limits
from guestpull_server.layer.changes import Change

MAX_REQUEST_BYTES: Final = 64 * 1024
MAX_REPORT_BYTES: Final = 64 * 1024
MAX_VERDICT_BYTES: Final = 64 * 1024 * 1024  # a thousand changes, of paths of PATH_MAX


class UnpackRequest(msgspec.Struct, frozen=True, tag=True):
    """Unpack what the ring brings into `directory`; `hash_algorithm` is the one of the wanted diff_id.

    A layer that is not compressed is hashed only if `hash_plain` says so.
    """

    directory: str
    hash_algorithm: str
    hash_plain: bool
    limits: Limits


class VerifyRequest(msgspec.Struct, frozen=True, tag=True):
    """Find what of `directory` is not as the layer with this diff_id has it; `implied` is verify_layer's."""

    directory: str
    tar_split_path: str
    diff_id: str
    implied: str
    limits: Limits


Request = UnpackRequest | VerifyRequest


class Unpacked(msgspec.Struct, frozen=True, tag=True):
    """It is done. `implied_bytes` of paths follow, each ended by a NUL: the implied directories.

    `hexdigest` is empty where the tar was not hashed.
    """

    hexdigest: str
    decoder: str
    size_bytes: int
    entries: int
    dropped_xattrs: int
    implied_bytes: int


class Corrupt(msgspec.Struct, frozen=True, tag=True):
    """The layer cannot be unpacked, whoever tries."""

    problem: str


class TooMuch(msgspec.Struct, frozen=True, tag=True):
    """The layer exceeds a limit."""

    what: str
    limit: str
    allowed: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The operating system refused a step; `full` where the file system has no room."""

    doing: str
    problem: str
    full: bool


class Defect(msgspec.Struct, frozen=True, tag=True):
    """A worker met an error that nobody foresaw: a bug of ours. `error` is its type and where it was raised."""

    error: str


class Verified(msgspec.Struct, frozen=True, tag=True):
    """What was found; nothing, if the directory is the layer."""

    changes: list[Change]


Report = Unpacked | Corrupt | TooMuch | Refused | Defect
Verdict = Verified | Refused
