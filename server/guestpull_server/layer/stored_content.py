"""The content of files as a tar stores it: all bytes of a plain file, the segments of a sparse one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from typing import Final

from guestpull_server.layer.changes import ChangeKind, Changes
from guestpull_server.layer.expected import File
from guestpull_server.layer.sparse import SparseMap
from guestpull_server.models import KiB

PIECE_BYTES: Final = 256 * KiB  # stays in the second-level cache between reading and hashing
_ZEROS: Final = bytes(PIECE_BYTES)


def content_of(descriptor: int, file: File, changes: Changes) -> Iterator[memoryview]:
    """Read the stored bytes of an open file, as many as there are. Each piece is valid until the next one.

    Adds a change if the holes of a sparse file are not empty.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(file.extra, SparseMap):
        return _segments(descriptor, file, file.extra, changes)
    return _range(descriptor, 0, file.size)


def stored_part(pieces: Iterable[memoryview], file: File) -> Iterator[memoryview]:
    """Cut the stored bytes out of all bytes of a file."""
    if not isinstance(file.extra, SparseMap):
        yield from pieces
        return
    segments = iter(file.extra.segments)
    start, length = next(segments, (file.size, 0))
    position = 0
    for piece in pieces:
        end = position + len(piece)
        while start < end:
            stop = min(start + length, end)
            yield piece[max(start, position) - position : stop - position]
            if stop < start + length:
                break
            start, length = next(segments, (file.size, 0))
        position = end


def is_hole(descriptor: int, start: int, end: int) -> bool:
    """Whether a range of an open file is all zeros."""
    while start < end:
        try:
            start = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return True
            raise
        piece = os.pread(descriptor, max(0, min(PIECE_BYTES, end - start)), start)
        if piece != _ZEROS[: len(piece)]:
            return False
        start += len(piece) or end
    return True


def _segments(descriptor: int, file: File, sparse_map: SparseMap, changes: Changes) -> Iterator[memoryview]:
    position = 0
    is_empty = True
    for start, length in sparse_map.segments:
        is_empty = is_empty and is_hole(descriptor, position, start)
        yield from _range(descriptor, start, length)
        position = start + length
    if not (is_empty and is_hole(descriptor, position, file.size)):
        changes.add(file.path, ChangeKind.CONTENT, "its holes are not empty")


def _range(descriptor: int, start: int, length: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(PIECE_BYTES, length)))
    end = start + length
    while start < end:
        count = os.preadv(descriptor, [buffer[: end - start]], start)
        if count == 0:
            return
        yield buffer[:count]
        start += count
