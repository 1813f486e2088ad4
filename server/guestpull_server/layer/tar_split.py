"""The tar-split of a layer: its tar without the contents of its files, small, kept beside the layer's directory.

Together with the directory it makes the tar again, so that the directory can be verified by the image's
diff_id (`proof.py`). The technique is that of vbatts/tar-split, by which Docker and containers/storage push
layers that they keep unpacked; the file format is our own.

    magic, then pieces: type (1 byte), length (4 bytes, little-endian), content
      H   headers, padding, trailing bytes: the tar without the contents that the extraction took; all these pieces
          are one zstd stream
      S   CRC-32s of these contents, in order, 4 bytes each, little-endian. They only tell which file was altered;
          SHA-256 tells that one was
      L   the content of a file that a later entry replaced, in a zstd stream of its own
      M   the continuation of the last L
      E   the end

Anybody may have altered the file since it was written, so the reader checks everything.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, cast

import zstandard
from isal.isal_zlib import crc32

from guestpull_server.models import KiB, MiB

_MAGIC: Final = b"guestpull layer record 1\n"
_HEAD: Final = struct.Struct("<cI")
_HEADERS: Final = b"H"
_SUMS: Final = b"S"
_REPLACED: Final = b"L"
_MORE: Final = b"M"
_END: Final = b"E"

_LEVEL: Final = 1  # level 3 makes files a fifth smaller, in three times the time
_PIECE_BYTES: Final = 64 * KiB  # larger pieces cost fresh pages each time
_SUMS_A_PIECE: Final = 64 * KiB
_MAX_WINDOW_BYTES: Final = 8 * MiB
_MAX_PIECES: Final = 1_000_000  # the reader remembers each


class TarSplitWriter:
    """Writes a tar-split while a layer is unpacked; a `tar_bytes.Splitter`. `finish` completes it.

    Args:
        file: the descriptor to write to; it is not closed.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
        self._literal = bytearray()
        self._crc = 0
        self._sums = array("I")
        self._write_all(_MAGIC)

    def literal(self, piece: memoryview) -> None:
        """Write bytes that are not content."""
        self._literal += piece
        if len(self._literal) >= _PIECE_BYTES:
            self._put(_HEADERS, self._compressor.compress(self._literal))
            self._literal.clear()

    def content(self, piece: memoryview, last: bool) -> None:
        """Add up bytes of a content; `last` if it ends with them."""
        self._crc = crc32(piece, self._crc)
        if last:
            self._sums.append(self._crc)
            self._crc = 0
            if len(self._sums) >= _SUMS_A_PIECE:
                self._put_sums()

    def replaced(self, file: int) -> None:
        """Write the content of an open file that is about to be removed."""
        compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
        kind = _REPLACED
        while piece := os.read(file, _PIECE_BYTES):
            if compressed := compressor.compress(piece):
                self._put(kind, compressed)
                kind = _MORE
        self._put(kind, compressor.flush())

    def finish(self) -> None:
        """Write the rest and the end."""
        self._put(_HEADERS, self._compressor.compress(self._literal) + self._compressor.flush())
        self._put_sums()
        self._put(_END, b"")

    def _put_sums(self) -> None:
        self._put(_SUMS, struct.pack(f"<{len(self._sums)}I", *self._sums))
        self._sums = array("I")

    def _put(self, kind: bytes, content: bytes) -> None:
        if content or kind == _END:
            self._write_all(_HEAD.pack(kind, len(content)) + content)

    def _write_all(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._file, rest) :]


class TarSplitError(Exception):
    """The tar-split cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    length: int


class TarSplitReader:
    """Reads a tar-split, which is untrusted.

    Args:
        file: the descriptor to read from; it is not closed.

    Attributes:
        sums: the CRC-32s of the contents, in order.

    Raises:
        TarSplitError: the file is not a complete tar-split.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._headers: list[_Piece] = []
        self._replaced: list[list[_Piece]] = []
        self.sums = array("I")
        self._scan()

    @property
    def replaced_count(self) -> int:
        """How many contents of replaced files there are."""
        return len(self._replaced)

    def headers(self, max_bytes: int) -> Iterator[memoryview]:
        """Read the tar without contents. Each piece is valid until the next one.

        Raises:
            TarSplitError: it cannot be decompressed, or is longer than `max_bytes`.
        """
        return self._inflated(self._headers, max_bytes)

    def replaced(self, number: int, max_bytes: int) -> Iterator[memoryview]:
        """Read the content of a replaced file; files are numbered in the order in which they were replaced.

        Raises:
            TarSplitError: it is missing, cannot be decompressed, or is longer than `max_bytes`.
        """
        if number >= len(self._replaced):
            raise TarSplitError("the content of a replaced file is missing")
        return self._inflated(self._replaced[number], max_bytes)

    def _scan(self) -> None:
        if os.pread(self._file, len(_MAGIC), 0) != _MAGIC:
            raise TarSplitError("it is in an unknown format")
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
                    raise TarSplitError("there are bytes behind its end")
                return
            self._add(kind, piece)
        raise TarSplitError("it has too many pieces")

    def _add(self, kind: bytes, piece: _Piece) -> None:
        if kind == _HEADERS:
            self._headers.append(piece)
        elif kind == _REPLACED:
            self._replaced.append([piece])
        elif kind == _MORE and self._replaced:
            self._replaced[-1].append(piece)
        elif kind == _SUMS and piece.length % 4 == 0 and piece.length <= 4 * _SUMS_A_PIECE:
            content = os.pread(self._file, piece.length, piece.start)
            if len(content) < piece.length:
                raise TarSplitError("it is cut short")
            self.sums.extend(struct.unpack(f"<{piece.length // 4}I", content))
        else:
            raise TarSplitError("it has a piece of an unexpected type")

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
    """Pieces of a file as one file object."""

    def __init__(self, file: int, pieces: list[_Piece]) -> None:
        self._file = file
        self._pieces = iter(pieces)
        self._position = self._end = 0

    def read(self, length: int) -> bytes:
        """Read at most so many bytes; none at the end."""
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
