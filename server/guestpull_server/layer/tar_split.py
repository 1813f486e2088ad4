"""The record of a layer: all of its tar but the contents of its files, small, beside the layer's directory.

With a record and the directory the tar can be put together again, so that the directory can be checked against
the image's own diff_id (`proof.py`). It is the technique of vbatts/tar-split, which Docker and containers/storage
use to push layers that they keep unpacked.

    magic, then pieces: type (1 byte), length (4 bytes, little-endian), content
      H   headers, padding, order, trailing bytes: the tar without the contents that the extraction took,
          one zstd stream over all these pieces
      S   CRC-32s of the contents taken, in their order, 4 bytes each: they only tell which file was changed;
          that one was, SHA-256 tells
      L   the content of a file that an entry behind it replaced, in a zstd stream of its own
      M   more of that
      E   the end

Who writes the file and who may have altered it since are two: everything here is checked when it is read.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import BinaryIO, Final, cast

import zstandard
from isal.isal_zlib import crc32

from guestpull_server.models import KiB, MiB

_MAGIC: Final = b"guestpull layer record 1\n"
_HEAD: Final = Struct("<cI")
_HEADERS: Final = b"H"
_SUMS: Final = b"S"
_LOST: Final = b"L"
_MORE: Final = b"M"
_END: Final = b"E"

_LEVEL: Final = 1  # 3 makes records a fifth smaller, in thrice the time
_PIECE_BYTES: Final = 64 * KiB  # larger ones cost fresh pages each time
_SUMS_A_PIECE: Final = 64 * KiB
_MAX_WINDOW_BYTES: Final = 8 * MiB
_MAX_PIECES: Final = 1_000_000  # each is remembered while a record is read


class TarSplitWriter:
    """Writes a record while a layer is unpacked. `finish` makes it whole.

    It is a `tar_reader.Splitter`: the reader tells it all bytes of the tar.

    Args:
        file: the descriptor that it goes to; closed by nobody here.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
        self._literal = bytearray()
        self._crc = 0
        self._sums = array("I")
        self._write_all(_MAGIC)

    def literal(self, piece: memoryview) -> None:
        """Take bytes that are no content."""
        self._literal += piece
        if len(self._literal) >= _PIECE_BYTES:
            self._put(_HEADERS, self._compressor.compress(self._literal))
            self._literal.clear()

    def content(self, piece: memoryview, last: bool) -> None:
        """Take note of bytes that went to a file; `last` are its last ones."""
        self._crc = crc32(piece, self._crc)
        if last:
            self._sums.append(self._crc)
            self._crc = 0
            if len(self._sums) >= _SUMS_A_PIECE:
                self._put_sums()

    def replaced(self, file: int) -> None:
        """Keep the content of an open file that goes away."""
        compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
        kind = _LOST
        while piece := os.read(file, _PIECE_BYTES):
            if compressed := compressor.compress(piece):
                self._put(kind, compressed)
                kind = _MORE
        self._put(kind, compressor.flush())

    def finish(self) -> None:
        """Write what is left, and the end."""
        self._put(_HEADERS, self._compressor.compress(self._literal) + self._compressor.flush())
        self._put_sums()
        self._put(_END, b"")

    def _put_sums(self) -> None:
        self._put(_SUMS, _little_endian(self._sums).tobytes())
        self._sums = array("I")

    def _put(self, kind: bytes, content: bytes) -> None:
        if content or kind == _END:
            self._write_all(_HEAD.pack(kind, len(content)) + content)

    def _write_all(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._file, rest) :]


class TarSplitError(Exception):
    """A record that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    length: int


class TarSplitReader:
    """Reads a record, with no trust in it.

    Args:
        file: descriptor of the record; closed by nobody here.

    Raises:
        TarSplitError: it is no record, or not a whole one.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._headers: list[_Piece] = []
        self._lost: list[list[_Piece]] = []
        self.sums = array("I")
        """The CRC-32s of the contents, in their order."""
        self._scan()

    @property
    def lost_count(self) -> int:
        """How many replaced contents there are."""
        return len(self._lost)

    def headers(self, max_bytes: int) -> Iterator[memoryview]:
        """The tar without its contents; each piece is overwritten by the next.

        Raises:
            TarSplitError: it cannot be decompressed, or is longer than `max_bytes`.
        """
        return self._inflated(self._headers, max_bytes)

    def lost(self, number: int, max_bytes: int) -> Iterator[memoryview]:
        """A replaced content, counted in the order in which they were replaced.

        Raises:
            TarSplitError: it is not there, cannot be decompressed, or is longer than `max_bytes`.
        """
        if number >= len(self._lost):
            raise TarSplitError("it lacks the content of a replaced file")
        return self._inflated(self._lost[number], max_bytes)

    def _scan(self) -> None:
        if os.pread(self._file, len(_MAGIC), 0) != _MAGIC:
            raise TarSplitError("it is no record of a layer")
        position = len(_MAGIC)
        for _ in range(_MAX_PIECES):
            head = os.pread(self._file, _HEAD.size, position)
            if len(head) < _HEAD.size:
                raise TarSplitError("it is cut short")
            kind, length = _HEAD.unpack(head)
            piece = _Piece(position + _HEAD.size, length)
            position = piece.start + length
            if kind == _END:
                if length or os.fstat(self._file).st_size != position:
                    raise TarSplitError("something follows its end")
                return
            self._take(kind, piece)
        raise TarSplitError("it has too many pieces")

    def _take(self, kind: bytes, piece: _Piece) -> None:
        if kind == _HEADERS:
            self._headers.append(piece)
        elif kind == _LOST:
            self._lost.append([piece])
        elif kind == _MORE and self._lost:
            self._lost[-1].append(piece)
        elif kind == _SUMS and piece.length % 4 == 0 and piece.length <= 4 * _SUMS_A_PIECE:
            content = os.pread(self._file, piece.length, piece.start)
            if len(content) < piece.length:
                raise TarSplitError("it is cut short")
            self.sums.extend(_little_endian(array("I", content)))
        else:
            raise TarSplitError("it has a piece that cannot be there")

    def _inflated(self, pieces: list[_Piece], max_bytes: int) -> Iterator[memoryview]:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        stream = decompressor.stream_reader(
            cast("BinaryIO", _Concatenated(self._file, pieces)), read_size=_PIECE_BYTES
        )
        buffer = memoryview(bytearray(_PIECE_BYTES))
        total = 0
        while True:
            try:
                length = stream.readinto(buffer)
            except zstandard.ZstdError as error:
                raise TarSplitError(f"it cannot be decompressed ({error})") from None
            if length == 0:
                return
            total += length
            if total > max_bytes:
                raise TarSplitError("it is larger than a layer may be")
            yield buffer[:length]


class _Concatenated:
    """Some pieces of a file as one file object."""

    def __init__(self, file: int, pieces: list[_Piece]) -> None:
        self._file = file
        self._pieces = iter(pieces)
        self._position = self._end = 0

    def read(self, length: int) -> bytes:
        """At most so many bytes; none at the end."""
        while self._position == self._end:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._position, self._end = piece.start, piece.start + piece.length
        content = os.pread(self._file, min(length, self._end - self._position), self._position)
        if not content:
            raise TarSplitError("it is cut short")
        self._position += len(content)
        return content


def _little_endian(sums: array[int]) -> array[int]:
    if sys.byteorder == "big":
        sums.byteswap()
    return sums
