"""Reads tars with the layer room, without a worker: from memory, in pieces of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guestpull_server.config import Limits
from guestpull_server.layer.inflate import Inflater
from guestpull_server.layer.tar_entry import Entry
from guestpull_server.layer.tar_reader import TarReader


@dataclass(frozen=True)
class Member:
    """An entry, and the bytes of its content that the tar stores."""

    entry: Entry
    stored: bytes


def members(tar: bytes, *, piece: int = 1 << 20, max_header_bytes: int = 1 << 20) -> list[Member]:
    """Read all members of a tar that arrives in pieces of `piece` bytes."""
    return list(each_member(TarReader(pieces(tar, piece), max_header_bytes)))


def each_member(reader: TarReader) -> Iterator[Member]:
    """Read all members and their contents, in one piece where possible."""
    for entry in reader:
        whole = reader.whole_content()
        if whole is not None:
            yield Member(entry, bytes(whole))
        else:
            yield Member(entry, b"".join(bytes(one) for one in reader.content()))


class pieces:  # noqa: N801 - used like a function
    """A `NextChunk` that reuses one buffer, as the inflater does."""

    def __init__(self, tar: bytes, piece: int) -> None:
        self._tar = tar
        self._position = 0
        self._buffer = bytearray(piece)
        self._ended = False

    def __call__(self) -> memoryview | None:
        assert not self._ended, "the reader read after the end"
        self._buffer[:] = b"\xee" * len(self._buffer)  # the reader may not use the previous chunk any more
        length = min(len(self._buffer), len(self._tar) - self._position)
        self._buffer[:length] = self._tar[self._position : self._position + length]
        self._position += length
        self._ended = length == 0
        return None if self._ended else memoryview(self._buffer)[:length]


def logical(member: Member) -> bytes:
    """A member's content with holes filled with zeros."""
    sparse_map = member.entry.sparse
    if sparse_map is None:
        return member.stored
    content = bytearray(sparse_map.real_size)
    position = 0
    for offset, length in sparse_map.segments:
        content[offset : offset + length] = member.stored[position : position + length]
        position += length
    return bytes(content)


def inflating(
    compressed: bytes | Sequence[bytes], limits: Limits | None = None, *, hash_plain: bool = True
) -> Inflater:
    """An inflater whose input arrives in parts."""
    parts = filter(None, [compressed] if isinstance(compressed, bytes) else compressed)

    def next_span() -> memoryview | None:
        part = next(parts, None)
        return None if part is None else memoryview(part)

    return Inflater(next_span, "sha256", limits or Limits(), hash_plain=hash_plain)


def inflate(
    compressed: bytes | Sequence[bytes], limits: Limits | None = None, *, hash_plain: bool = True
) -> tuple[bytes, Inflater]:
    """Inflate bytes completely."""
    inflater = inflating(compressed, limits, hash_plain=hash_plain)
    inflated = bytearray()
    while (chunk := inflater.next_chunk()) is not None:
        inflated += chunk
    return bytes(inflated), inflater
