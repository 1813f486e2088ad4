"""Maps of sparse files: which parts of a file a tar stores, and where they belong.

Two forms are written today (GNU tar manual, "Storing Sparse Files"):
  - entries of type `S`, by GNU tar with --sparse in its default format; layers of `docker import` have them;
  - pax records of version 1.0, by GNU tar with --sparse --format=posix, and by bsdtar (libarchive) by default.
Versions 0.0 and 0.1 were written by GNU tar 1.14 to 1.16 (2004 to 2006) and are refused. Go's archive/tar, by
which Docker, BuildKit, kaniko and umoci write layers, writes no sparse files.

Both forms come down to a list of segments and the file's real size; the rest of the file are holes. A map may
not be larger than an extension header.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from guestpull_server.layer.refusals import LayerLimitExceeded, TarError
from guestpull_server.layer.tar_fields import decimal, number

_BLOCK: Final = 512
_SEGMENT_BYTES: Final = 24  # of the map in a header of type S
_LONGEST_NUMBER: Final = 20


class SparseMap(NamedTuple):
    """Where the stored bytes of a sparse file belong: offset and length of each segment, in bytes."""

    segments: tuple[tuple[int, int], ...]
    real_size: int

    @property
    def stored_size(self) -> int:
        """How many bytes all segments have together."""
        return sum(length for _, length in self.segments)


def from_gnu_header(header: bytes, read_block: Callable[[], bytes], max_bytes: int) -> SparseMap:
    """Read the map of an entry of type `S`, from its header and the blocks behind it.

    Raises:
        TarError: the map is malformed.
        LayerLimitExceeded: the map is larger than `max_bytes`.
    """
    numbers: list[int] = []

    def take(block: bytes, start: int, count: int) -> None:
        for at in range(start, start + _SEGMENT_BYTES * count, _SEGMENT_BYTES):
            if block[at] == 0 and block[at + 12] == 0:
                return
            numbers.extend((number(block[at : at + 12]), number(block[at + 12 : at + 24])))

    take(header, 386, 4)
    real_size = number(header[483:495])
    is_continued = header[482]
    blocks = 0
    while is_continued:
        blocks = _counted(blocks, max_bytes)
        block = read_block()
        take(block, 0, 21)
        is_continued = block[504]
    return _checked(numbers, real_size)


def from_content(
    records: dict[bytes, bytes], read_block: Callable[[], bytes], max_bytes: int
) -> tuple[SparseMap, int]:
    """Read the map of version 1.0, which precedes the entry's content. Returns the map and its length in bytes.

    It has one decimal number a line, padded to a block: the number of segments, then offset and length of each.

    Raises:
        TarError: the map is malformed, or of another version.
        LayerLimitExceeded: the map is larger than `max_bytes`.
    """
    if (records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor")) != (b"1", b"0"):
        raise TarError(
            "it has a sparse file in a pax format other than GNU tar's 1.0, which is not supported"
        )
    size = records.get(b"GNU.sparse.realsize")
    if size is None:
        raise TarError("a sparse file does not give its size")
    blocks = 0
    wanted = 1  # numbers; the first one says how many segments follow
    numbers: list[int] = []
    unfinished = b""
    while len(numbers) < wanted:
        blocks = _counted(blocks, max_bytes)
        *lines, unfinished = (unfinished + read_block()).split(b"\n")
        for line in lines:
            if len(numbers) == wanted:
                break
            numbers.append(decimal(line, "GNU sparse map"))
            wanted = 1 + 2 * numbers[0]
        if wanted < 1 or (len(numbers) < wanted and len(unfinished) > _LONGEST_NUMBER):
            raise TarError("a sparse file's map is not made of numbers")
    return _checked(numbers[1:], decimal(size, "GNU.sparse.realsize")), _BLOCK * blocks


def _checked(numbers: list[int], real_size: int) -> SparseMap:
    segments = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    position = 0
    for offset, length in segments:
        if length < 0 or offset < position:
            raise TarError("a sparse file's map is out of order")
        position = offset + length
    if not position <= real_size < 1 << 63:
        raise TarError("a sparse file's map reaches beyond its end")
    return SparseMap(segments, real_size)


def _counted(blocks: int, max_bytes: int) -> int:
    if (blocks + 1) * _BLOCK > max_bytes:
        raise LayerLimitExceeded("the map of a sparse file", "max_header_bytes", max_bytes)
    return blocks + 1
