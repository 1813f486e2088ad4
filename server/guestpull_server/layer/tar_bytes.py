"""Where a tar reader stands in its stream: buffers that come one by one, of which most bytes are only looked at.

What is not taken as content is literal: a splitter is told both, so that a record of the layer can be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

from guestpull_server.layer.refusals import TarError

BLOCK: Final = 512

NextChunk = Callable[[], "memoryview | None"]
"""Gives the next bytes of the tar, or None at the end. What it gave before is overwritten then."""


class Splitter(Protocol):
    """Is told all bytes of the tar, in order; they are overwritten afterwards."""

    def literal(self, piece: memoryview, /) -> None:
        """Bytes that nobody takes: headers, padding, content that is skipped, what follows the end."""

    def content(self, piece: memoryview, last: bool, /) -> None:
        """Bytes that were taken as content; `last` if they are the entry's last ones."""


class TarBytes:
    """The stream of one tar, and what is left of the current entry in it.

    Args:
        next_chunk: where the bytes come from.
        splitter: is told everything, if there is one.
    """

    def __init__(self, next_chunk: NextChunk, splitter: Splitter | None) -> None:
        self._next_chunk = next_chunk
        self._recorder = splitter
        self._literal_from = 0  # where in the chunk the literal bytes begin that it has not been told yet
        self._chunk = memoryview(b"")
        self._position = 0
        self._passed = 0  # bytes of the chunks before this one
        self._ended = False
        self._unread = 0  # content bytes of the current entry that nobody took yet
        self._padding = 0  # and the zeros that fill its last block

    def content(self) -> Iterator[memoryview]:
        """The current entry's stored bytes, piece by piece; each is valid until the next is asked for.

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
        """All of the current entry's bytes, where they lie in one buffer; None where they do not.

        The fast way for the small files that most files are.
        """
        position, chunk, splitter = self._position, self._chunk, self._recorder
        end = position + self._unread
        if end > len(chunk):
            return None
        self._unread = 0
        self._position = end
        piece = chunk[position:end]
        # `_take_content`, written out: a quarter of what a record costs
        if splitter is not None and piece:
            splitter.literal(chunk[self._literal_from : position])
            splitter.content(piece, True)
            self._literal_from = end
        return piece

    def omit_content(self) -> int:
        """Go on as if the current entry's bytes had been taken: they are not in this stream.

        Returns:
            how many bytes of the stream stand before their place; -1 if the entry has none.
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
        """Exactly so many bytes; None at the end of the stream where an entry may end (`at_boundary`)."""
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
        if self._recorder is not None and end > self._position:
            self._tell_literal(self._recorder, self._position)
            self._recorder.content(piece, self._unread == 0)
            self._literal_from = end
        self._position = end
        return piece

    def _skip_rest(self) -> None:
        """Skip what is left of the current entry. Its padding may be missing where the tar ends."""
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
        """Go on to the next chunk; False at the end of the stream. What is left of this one is passed over."""
        if self._ended:
            return False
        if self._recorder is not None:
            self._tell_literal(self._recorder, len(self._chunk))
            self._literal_from = 0
        self._passed += len(self._chunk)
        chunk = self._next_chunk()
        self._ended = chunk is None
        self._chunk, self._position = chunk or memoryview(b""), 0
        return not self._ended

    def _tell_literal(self, splitter: Splitter, end: int) -> None:
        if end > self._literal_from:
            splitter.literal(self._chunk[self._literal_from : end])
            self._literal_from = end
