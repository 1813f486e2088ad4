"""The maps of sparse files: which parts of a file a tar holds, and where they belong.

GNU tar writes sparse files in four forms: a type of entry of its own (`S`), and pax records in versions
0.0, 0.1 and 1.0 (GNU tar manual, "Storing Sparse Files"). All of them come down to a list of segments and
the file's real size; what is in no segment is a hole. A map may not be larger than an extension header, in
which two of the forms keep it anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from guestpull_server.layer.refusals import LayerLimitExceeded, TarError
from guestpull_server.layer.tar_fields import decimal, number

_BLOCK: Final = 512
_SEGMENT_BYTES: Final = 24  # of the map in an old GNU header
_LONGEST_NUMBER: Final = 20


class SparseMap(NamedTuple):
    """Where the stored bytes of a sparse file belong; offsets and lengths are bytes."""

    segments: tuple[tuple[int, int], ...]
    real_size: int

    @property
    def stored_size(self) -> int:
        """How many bytes the segments have together."""
        return sum(length for _, length in self.segments)


def checked(numbers: list[int], real_size: int) -> SparseMap:
    """Make a map of a flat list of offsets and lengths.

    Raises:
        TarError: the segments overlap, are out of order, or reach beyond the file.
    """
    if len(numbers) % 2:
        raise TarError("a sparse file's map has an odd number of values")
    segments = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    position = 0
    for offset, length in segments:
        if length < 0 or offset < position:
            raise TarError("a sparse file's map is out of order")
        position = offset + length
    if not position <= real_size < 1 << 63:
        raise TarError("a sparse file's map reaches beyond its end")
    return SparseMap(segments, real_size)


def from_gnu_header(header: bytes, read_block: Callable[[], bytes], max_bytes: int) -> SparseMap:
    """The map of an old GNU entry (type `S`): in its header, and in the blocks behind it.

    Raises:
        TarError: the map is malformed.
        LayerLimitExceeded: it is larger than `max_bytes`.
    """
    numbers: list[int] = []

    def take(block: bytes, start: int, count: int) -> None:
        for at in range(start, start + _SEGMENT_BYTES * count, _SEGMENT_BYTES):
            if block[at] == 0 and block[at + 12] == 0:
                return
            numbers.extend((number(block[at : at + 12]), number(block[at + 12 : at + 24])))

    take(header, 386, 4)
    real_size = number(header[483:495])
    more = header[482]
    blocks = 0
    while more:
        blocks = _counted(blocks, max_bytes)
        block = read_block()
        take(block, 0, 21)
        more = block[504]
    return checked(numbers, real_size)


def from_pax_records(records: dict[bytes, bytes], flat: list[bytes]) -> SparseMap | None:
    """The map of a pax entry of version 0.0 or 0.1; None if the records describe none.

    Args:
        records: the entry's pax records.
        flat: values of GNU.sparse.offset and GNU.sparse.numbytes in their order (version 0.0).
    """
    if b"GNU.sparse.map" in records:
        numbers = [
            decimal(value, "GNU.sparse.map") for value in records[b"GNU.sparse.map"].split(b",") if value
        ]
    elif flat:
        numbers = [decimal(value, "GNU.sparse") for value in flat]
    else:
        return None
    size = records.get(b"GNU.sparse.size", records.get(b"GNU.sparse.realsize"))
    if size is None:
        raise TarError("a sparse file does not give its size")
    return checked(numbers, decimal(size, "GNU.sparse.size"))


def from_content(
    records: dict[bytes, bytes], read_block: Callable[[], bytes], max_bytes: int
) -> tuple[SparseMap, int]:
    """The map of a pax entry of version 1.0, which opens its content; returns it with its length in bytes.

    It is a decimal number a line: how many segments, then offset and length of each, padded to a block.

    Raises:
        TarError: the map is malformed.
        LayerLimitExceeded: it is larger than `max_bytes`.
    """
    size = records.get(b"GNU.sparse.realsize")
    if size is None:
        raise TarError("a sparse file does not give its size")
    blocks = 0
    wanted = 1  # numbers; how many they are, the first one tells
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
            raise TarError("a sparse file's map holds no numbers")
    return checked(numbers[1:], decimal(size, "GNU.sparse.realsize")), _BLOCK * blocks


def _counted(blocks: int, max_bytes: int) -> int:
    if (blocks + 1) * _BLOCK > max_bytes:
        raise LayerLimitExceeded("the map of a sparse file", "max_header_bytes", max_bytes)
    return blocks + 1
