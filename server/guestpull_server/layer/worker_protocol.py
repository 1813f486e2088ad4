"""The messages between the daemon, the fork server and the layer workers.

JSON by msgspec, over unix sockets that also pass file descriptors:

    daemon -> fork server   a datagram: UnpackRequest or VerifyRequest, with the socket for the report. With
                            UnpackRequest also the ring that carries the layer, and the file for the tar-split if
                            one is wanted
    worker -> daemon        over the report socket: a byte with a pidfd, by which the worker can be killed (or a
                            byte alone, from the fork server, if no worker could be started); then one line with
                            a report; then the bytes that `Unpacked` announces
"""

from __future__ import annotations

from typing import Final

import msgspec

from guestpull_server.config import Limits
from guestpull_server.layer.changes import Change

MAX_REQUEST_BYTES: Final = 64 * 1024
MAX_REPORT_BYTES: Final = 64 * 1024
MAX_VERDICT_BYTES: Final = 64 * 1024 * 1024  # a thousand changes with paths of PATH_MAX


class UnpackRequest(msgspec.Struct, frozen=True, tag=True):
    """Unpack the layer in the ring into `directory`.

    `hash_algorithm` is that of the diff_id. An uncompressed layer is hashed only if `hash_plain` is set.
    """

    directory: str
    hash_algorithm: str
    hash_plain: bool
    limits: Limits


class VerifyRequest(msgspec.Struct, frozen=True, tag=True):
    """Verify that `directory` is the layer with this diff_id; see `proof.verify_layer`."""

    directory: str
    tar_split_path: str
    diff_id: str
    implied: str
    limits: Limits


Request = UnpackRequest | VerifyRequest


class Unpacked(msgspec.Struct, frozen=True, tag=True):
    """The layer is unpacked. `implied_bytes` follow: the paths of implied directories, each ended by a NUL.

    `hexdigest` is empty if the tar was not hashed.
    """

    hexdigest: str
    decoder: str
    size_bytes: int
    entries: int
    dropped_xattrs: int
    implied_bytes: int


class Corrupt(msgspec.Struct, frozen=True, tag=True):
    """The layer cannot be unpacked on any machine."""

    problem: str


class TooMuch(msgspec.Struct, frozen=True, tag=True):
    """The layer exceeds a limit."""

    what: str
    limit: str
    allowed: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A system call failed; `full` if the file system has no space left."""

    doing: str
    problem: str
    full: bool


class Defect(msgspec.Struct, frozen=True, tag=True):
    """The worker failed with an unexpected error, which is a bug. `error` is its type and where it was raised."""

    error: str


class Verified(msgspec.Struct, frozen=True, tag=True):
    """The result of a verification: no changes if the directory is the layer."""

    changes: list[Change]


Report = Unpacked | Corrupt | TooMuch | Refused | Defect
Verdict = Verified | Refused
