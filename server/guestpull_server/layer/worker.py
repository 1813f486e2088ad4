"""The layer worker: a child process that unpacks one layer into the directory that is its root.

It is forked by the fork server with a request, a ring that carries the compressed layer, and a socket for its
report. It never sees the network, the store or another layer. Killing it at any instant is safe: what it made
is in a staging directory, which the daemon deletes.
"""

from __future__ import annotations

import errno
import socket
import sys
import traceback
from pathlib import PurePath
from typing import Final

import msgspec

from guestpull_server.layer.confinement import confine
from guestpull_server.layer.extract import Extractor
from guestpull_server.layer.inflate import Inflater
from guestpull_server.layer.refusals import LayerLimitExceeded, TarError
from guestpull_server.layer.ring import RingReader
from guestpull_server.layer.tar_bytes import NextChunk
from guestpull_server.layer.tar_reader import TarReader
from guestpull_server.layer.tar_split import TarSplitWriter
from guestpull_server.layer.worker_protocol import (
    Corrupt,
    Defect,
    Refused,
    Report,
    TooMuch,
    Unpacked,
    UnpackRequest,
)

_SWITCH_SECONDS: Final = 0.0002  # inflate and hash wait less for the interpreter: 3 % of wall time on 2 cores
_FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT))
_OF_THE_LAYER: Final = frozenset(
    {
        errno.E2BIG,
        errno.EEXIST,
        errno.EFBIG,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.EMLINK,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.EOVERFLOW,
        errno.ERANGE,
    }
)
"""Refusals that the layer brings upon itself; all others are this machine's."""


def run(
    request: UnpackRequest, ring: RingReader, report_socket: socket.socket, record: int | None, parent: int
) -> None:
    """Be a layer worker: confine this process, unpack, report. Returns; the process is to end then.

    Args:
        request: what to do.
        ring: brings the compressed layer.
        report_socket: takes the report.
        record: file descriptor that the record goes to, or None.
        parent: the process that must outlive this one.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    implied = b""
    report: Report
    try:
        confine(request.directory, parent)
    except OSError as error:
        report = Refused(
            "confine a layer worker to its staging directory", error.strerror or str(error), full=False
        )
    else:
        report, implied = unpack(request, ring.next_span, record)
    report_socket.sendall(msgspec.json.encode(report) + b"\n")
    report_socket.sendall(implied)


def unpack(request: UnpackRequest, next_span: NextChunk, record: int | None = None) -> tuple[Report, bytes]:
    """Unpack the layer that `next_span` brings into the root directory, which is empty.

    Args:
        request: what to do.
        next_span: gives the next compressed bytes, valid until it is called again; None at the end.
        record: file descriptor that the record goes to, or None.

    Returns the report and the implied directories, each ended by a NUL. No error leaves here: all become
    reports.
    """
    try:
        inflater = Inflater(next_span, request.hash_algorithm, request.limits, hash_plain=request.hash_plain)
        writer = None if record is None else TarSplitWriter(record)
        reader = TarReader(inflater.next_chunk, request.limits.max_header_bytes, writer)
        extractor = Extractor(reader, request.limits, writer)
        extractor.apply_all()
        if writer is not None:
            writer.finish()
    except LayerLimitExceeded as error:
        return TooMuch(error.what, error.limit, error.allowed), b""
    except TarError as error:
        return Corrupt(str(error)), b""
    except MemoryError:
        return Refused("unpack a layer", "out of memory", full=False), b""
    except OSError as error:
        return _refusal(error), b""
    except Exception as error:  # noqa: BLE001 - whatever it is, the daemon must hear of it
        return _defect(error), b""
    implied = b"".join(path + b"\0" for path in extractor.implied_directories)
    return Unpacked(
        hexdigest=inflater.hexdigest,
        decoder=inflater.decoder.value,
        size_bytes=extractor.size_bytes - extractor.replaced_bytes,
        entries=extractor.entries,
        dropped_xattrs=extractor.dropped_xattrs,
        implied_bytes=len(implied),
    ), implied


def _defect(error: Exception) -> Defect:
    # without the message, which may hold anything, and without the source's text, which would be the layer's file
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return Defect(f"{type(error).__name__} at {PurePath(frame.f_code.co_filename).name}:{line}")


def _refusal(error: OSError) -> Report:
    path = error.filename
    name = path.decode(errors="backslashreplace") if isinstance(path, bytes) else str(path or "")
    problem = error.strerror or str(error)
    if error.errno in _OF_THE_LAYER:
        return Corrupt(f"entry {name[:300]!r}: {problem}")
    return Refused(f"unpack {name[:300]!r}", problem, full=error.errno in _FULL)
