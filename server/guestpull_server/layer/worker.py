"""The layer worker: a process that unpacks one layer into its root directory.

The fork server forks it with a request, a ring that carries the compressed layer, and a socket for its report. It
never sees the network, the store or another layer. It can be killed at any time: what it made is in a staging
directory, which the daemon deletes.
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
from guestpull_server.layer.refusals import LayerLimitExceeded, TarError, shown
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
"""errno values caused by the layer's content; all others are host errors."""


def run(
    request: UnpackRequest, ring: RingReader, report_socket: socket.socket, tar_split: int | None, parent: int
) -> None:
    """Confine this process, unpack, report. The process must end afterwards.

    Args:
        request: what to do.
        ring: carries the compressed layer.
        report_socket: receives the report.
        tar_split: descriptor of the file for the tar-split, or None.
        parent: the parent process; this process is killed when the parent ends.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    implied = b""
    report: Report
    try:
        confine(request.directory, parent)
    except OSError as error:
        doing = "confining a layer worker to its staging directory"
        report = Refused(doing, error.strerror or str(error), full=False)
    else:
        report, implied = unpack(request, ring.next_span, tar_split)
    report_socket.sendall(msgspec.json.encode(report) + b"\n")
    report_socket.sendall(implied)


def unpack(
    request: UnpackRequest, next_span: NextChunk, tar_split: int | None = None
) -> tuple[Report, bytes]:
    """Unpack a layer into the root directory, which is empty. All errors become reports.

    Args:
        request: what to do.
        next_span: returns the next compressed bytes, valid until the next call; None at the end.
        tar_split: descriptor of the file for the tar-split, or None.

    Returns the report and the implied directories, each ended by a NUL.
    """
    try:
        inflater = Inflater(next_span, request.hash_algorithm, request.limits, hash_plain=request.hash_plain)
        writer = None if tar_split is None else TarSplitWriter(tar_split)
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
        return Refused("unpacking a layer", "out of memory", full=False), b""
    except OSError as error:
        return _refusal(error), b""
    except Exception as error:  # noqa: BLE001 - the daemon must hear of any error
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
    # without the message, which may contain anything, and without source text, which would come from the layer
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return Defect(f"{type(error).__name__} at {PurePath(frame.f_code.co_filename).name}:{line}")


def _refusal(error: OSError) -> Report:
    path = shown(error.filename) if isinstance(error.filename, bytes) else repr(error.filename or "")
    problem = error.strerror or str(error)
    if error.errno in _OF_THE_LAYER:
        return Corrupt(f"entry {path}: {problem}")
    return Refused(f"unpacking {path}", problem, full=error.errno in _FULL)
