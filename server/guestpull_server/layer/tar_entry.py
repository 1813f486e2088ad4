"""One entry of a tar."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, cast

from guestpull_server.layer.sparse import SparseMap

REGULAR: Final = b"0"
HARD_LINK: Final = b"1"
SYMLINK: Final = b"2"
CHARACTER_DEVICE: Final = b"3"
BLOCK_DEVICE: Final = b"4"
DIRECTORY: Final = b"5"
FIFO: Final = b"6"
HEADER_ONLY: Final = frozenset((HARD_LINK, SYMLINK, CHARACTER_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO))
"""Types without content, whatever size their headers give."""


class Entry(NamedTuple):
    """One entry of a tar, with its pax and GNU headers applied. Paths are bytes, as in the tar."""

    path: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    size: int  # bytes of content, holes included
    mtime_ns: int
    atime_ns: int
    link_target: bytes
    device: tuple[int, int]
    xattrs: tuple[tuple[bytes, bytes], ...]
    sparse: SparseMap | None


entry_of = cast("Callable[[tuple[object, ...]], Entry]", partial(tuple.__new__, Entry))
"""Makes an entry from its fields in less than half the time of its constructor."""
