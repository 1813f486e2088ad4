"""The byte stream of a tar: a position in buffers that come one by one.

Bytes that are not taken as content are literal: headers, padding, skipped content. A splitter is told both, in
order, so that the tar can be kept without the contents of its files (`tar_split.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

from guestpull_server.layer.refusals import TarError

BLOCK: Final = 512

NextChunk = Callable[[], "memoryview | None"]
"""Returns the next bytes, or None at the end. The previous bytes are overwritten."""


class Splitter(Protocol):
    """Receives all bytes of the tar, in order. They are overwritten after the call."""

    def literal(self, piece: memoryview, /) -> None:
        """Receive bytes that are not content of a file."""

    def content(self, piece: memoryview, last: bool, /) -> None:
        """Receive bytes of a file's content; `last` if the content ends with them."""


class TarBytes:
    """The stream of one tar and the current entry's place in it.

    Args:
        next_chunk: returns the bytes of the tar.
        splitter: receives all bytes, if there is one.
    """

    def __init__(self, next_chunk: NextChunk, splitter: Splitter | None) -> None:
        self._next_chunk = next_chunk
        self._splitter = splitter
        self._literal_from = (
            0  # where in the chunk the literal bytes begin that the splitter has not received
        )
        self._chunk = memoryview(b"")
        self._position = 0
        self._passed = 0  # bytes of the chunks before this one
        self._ended = False
        self._unread = 0  # content of the current entry that was not taken yet
        self._padding = 0  # zeros that fill its last block

    def content(self) -> Iterator[memoryview]:
        """The current entry's stored bytes, piece by piece. Each piece is valid until the next one.

        Raises:
            TarError: the tar is cut short.
        """
        while self._unread:
            available = len(self._chunk) - self._position
            if available == 0:
                self._refill()
                continue
            length = min(available, self._unread)
            self._unread -= length
            yield self._take_content(self._position + length)

    def whole_content(self) -> memoryview | None:
        """All stored bytes of the current entry if they lie in one buffer, or None.

        This is the fast path for small files, which most files are.
        """
        position, chunk, splitter = self._position, self._chunk, self._splitter
        end = position + self._unread
        if end > len(chunk):
            return None
        self._unread = 0
        self._position = end
        piece = chunk[position:end]
        # `_take_content` inlined: a quarter of the cost of a tar-split
        if splitter is not None and piece:
            splitter.literal(chunk[self._literal_from : position])
            splitter.content(piece, True)
            self._literal_from = end
        return piece

    def omit_content(self) -> int:
        """Continue as if the current entry's bytes had been taken; for a tar without the contents of its files.

        Returns:
            how many bytes of this stream precede them, or -1 if the entry has no content.
        """
        if not self._unread:
            return -1
        self._unread = 0
        return self._passed + self._position

    # -- for the reader -------------------------------------------------------------------------------------

    def _expect(self, content_length: int) -> None:
        if content_length < 0:
            raise TarError("an entry has a negative size")
        self._unread = content_length
        self._padding = -content_length % BLOCK

    def _take(self, length: int, *, at_boundary: bool = False) -> bytes | None:
        """Take exactly so many bytes; None if the stream ends here and may (`at_boundary`)."""
        end = self._position + length
        if end <= len(self._chunk):
            whole = bytes(self._chunk[self._position : end])
            self._position = end
            return whole
        taken = bytearray()
        while len(taken) < length:
            if self._position == len(self._chunk) and not self._next():
                if at_boundary and not taken:
                    return None
                raise TarError("the tar is cut short")
            piece = self._chunk[self._position : self._position + length - len(taken)]
            self._position += len(piece)
            taken += piece
        return bytes(taken)

    def _take_content(self, end: int) -> memoryview:
        piece = self._chunk[self._position : end]
        if self._splitter is not None and end > self._position:
            self._pass_literal(self._splitter, self._position)
            self._splitter.content(piece, self._unread == 0)
            self._literal_from = end
        self._position = end
        return piece

    def _skip_rest(self) -> None:
        """Skip the rest of the current entry. At the end of the tar its padding may be missing."""
        end = self._position + self._unread + self._padding
        if end <= len(self._chunk):
            self._position = end
        else:
            self._skip(self._unread)
            left = self._padding
            while (available := len(self._chunk) - self._position) < left:
                left -= available
                if not self._next():
                    self._padding = self._unread = 0
                    return
            self._position += left
        self._unread = self._padding = 0

    def _skip(self, length: int) -> None:
        while (available := len(self._chunk) - self._position) < length:
            length -= available
            self._refill()
        self._position += length

    def _refill(self) -> None:
        if not self._next():
            raise TarError("the tar is cut short")

    def _next(self) -> bool:
        """Continue with the next chunk, skipping the rest of this one; False at the end of the stream."""
        if self._ended:
            return False
        if self._splitter is not None:
            self._pass_literal(self._splitter, len(self._chunk))
            self._literal_from = 0
        self._passed += len(self._chunk)
        chunk = self._next_chunk()
        self._ended = chunk is None
        self._chunk, self._position = chunk or memoryview(b""), 0
        return not self._ended

    def _pass_literal(self, splitter: Splitter, end: int) -> None:
        if end > self._literal_from:
            splitter.literal(self._chunk[self._literal_from : end])
            self._literal_from = end
