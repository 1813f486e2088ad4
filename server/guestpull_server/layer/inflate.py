"""Decompresses a layer, gzip, zstd or plain as its first bytes say, into buffers of tar bytes.

Three threads pass buffers on, each blocking when the next one is behind. They spend their time outside of the
interpreter's lock, so that they use as many cores:

    spans of the ring -> inflate (readinto a buffer) -> hash (diff_id) -> tar reader, which returns the buffer

The buffers are allocated once and reused, so that the kernel need not provide fresh pages for each megabyte, and a
decompression bomb costs no memory: a decompressor fills one buffer at a time. A layer that is not compressed needs
neither thread: the tar reader reads it from the ring.
"""

from __future__ import annotations

import threading
from gzip import BadGzipFile  # isal imports it when it raises it, which a confined worker cannot
from hashlib import new as new_hash
from queue import SimpleQueue
from typing import BinaryIO, Final, Protocol, cast

import zstandard
from isal import igzip_lib
from isal.isal_zlib import _GzipReader

from guestpull_server.config import Limits
from guestpull_server.layer.refusals import LayerLimitExceeded, TarError
from guestpull_server.layer.tar_bytes import NextChunk
from guestpull_server.models import Decoder, KiB, MiB

# 256 KiB cost 3 % more CPU time (1.4 GB on 2 cores), because threads switch twice as often; 1 MiB saves nothing
_BUFFER_BYTES: Final = 512 * KiB
_BUFFERS: Final = 6
_COMPRESSED_BUFFER_BYTES: Final = 256 * KiB
_RATIO_IS_CHECKED_ABOVE: Final = 64 * MiB  # small layers may be all zeros
_HEAD_BYTES: Final = 512  # of the stream, to detect the format; a tar's first header
_TAR_OVERHEAD: Final = 4 * KiB  # allowed per entry for header, pax records and padding

# the stubs declare the class as an instance of Exception
_IsalError = cast("type[Exception]", igzip_lib.IsalError)

_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE: Final = b"\x2a\x4d\x18"  # behind a first byte of 0x50 to 0x5f
_TAR_MAGIC: Final = b"ustar"
_TAR_MAGIC_AT: Final = 257
_ZSTD_WINDOW_TOO_LARGE: Final = "Frame requires too much memory"
_REFUSED: Final = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x04\x22\x4d\x18": "lz4", b"PK\x03\x04": "zip"}


class _Reader(Protocol):
    def readinto(self, buffer: memoryview, /) -> int: ...


class CompressedBytes:
    """The compressed bytes as a file object that counts them.

    Args:
        next_span: returns the next bytes, valid until the next call; None at the end.

    Attributes:
        received_bytes: how many bytes came so far.
        head: the first bytes, by which the format is detected.
    """

    def __init__(self, next_span: NextChunk) -> None:
        self._next_span = next_span
        self._ended = False
        self.received_bytes = 0
        self._span = memoryview(b"")
        first = bytearray()
        while len(first) < _HEAD_BYTES and (span := self.next_span()) is not None:
            first += span
        self._span = memoryview(first)
        self.head = bytes(first[:_HEAD_BYTES])

    def next_span(self) -> memoryview | None:
        """Return the next bytes, valid until the next call; None at the end."""
        if self._span:
            span, self._span = self._span, memoryview(b"")
            return span
        if self._ended:
            return None
        following = self._next_span()
        if following is None:
            self._ended = True
        else:
            self.received_bytes += len(following)
        return following

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer with the bytes that are available at once; 0 at the end."""
        span = self.next_span() or memoryview(b"")
        length = min(len(buffer), len(span))
        buffer[:length] = span[:length]
        self._span = span[length:]
        return length

    def read(self, length: int) -> bytes:
        """Return at most so many bytes; none at the end."""
        span = self.next_span() or memoryview(b"")
        self._span = span[length:]
        return bytes(span[:length])


def decoder_of(head: bytes) -> Decoder:
    """Detect how a layer is compressed by its first bytes, regardless of its media type.

    Raises:
        TarError: the compression is not supported.
    """
    if head.startswith(_GZIP_MAGIC):
        return Decoder.GZIP
    if head.startswith(_ZSTD_MAGIC) or (head[1:4] == _ZSTD_SKIPPABLE and head[0] & 0xF0 == 0x50):
        return Decoder.ZSTD
    is_tar = head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + len(_TAR_MAGIC)] == _TAR_MAGIC
    for magic, name in _REFUSED.items():
        if head.startswith(magic) and not is_tar:
            raise TarError(f"it is compressed with {name}; gzip, zstd and plain tar are supported")
    return Decoder.UNCOMPRESSED


def max_tar_bytes(limits: Limits) -> int:
    """The size of the largest tar that a layer within these limits can have."""
    return limits.max_layer_bytes + _TAR_OVERHEAD * limits.max_layer_entries


class Inflater:
    """Decompresses and hashes a layer.

    One thread calls `next_chunk`, the tar reader's. After it returned None, `hexdigest` is that of the whole tar.

    Args:
        next_span: returns the next compressed bytes, valid until the next call; None at the end.
        hash_algorithm: the algorithm of the diff_id.
        limits: what the layer may cost.
        hash_plain: whether to hash a layer that is not compressed.
    """

    def __init__(
        self, next_span: NextChunk, hash_algorithm: str, limits: Limits, *, hash_plain: bool = True
    ) -> None:
        self._source = CompressedBytes(next_span)
        self._limits = limits
        self._max_tar_bytes = max_tar_bytes(limits)
        self.decoder = decoder_of(self._source.head)
        self._hash = new_hash(hash_algorithm)
        self._is_plain = self.decoder is Decoder.UNCOMPRESSED
        self.is_hashed = hash_plain or not self._is_plain
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._inflated: SimpleQueue[tuple[memoryview, int] | Exception] = SimpleQueue()
        self._hashed: SimpleQueue[tuple[memoryview, int] | Exception] = SimpleQueue()
        self._lent: memoryview | None = None
        if not self._is_plain:
            for _ in range(_BUFFERS):
                self._free.put(memoryview(bytearray(_BUFFER_BYTES)))
            threading.Thread(target=self._inflate, name="inflate", daemon=True).start()
            threading.Thread(target=self._hash_inflated, name="hash", daemon=True).start()

    @property
    def hexdigest(self) -> str:
        """The digest of the tar so far; empty if it is not hashed."""
        return self._hash.hexdigest() if self.is_hashed else ""

    def next_chunk(self) -> memoryview | None:
        """Return the next tar bytes, valid until the next call; None at the end, which must be the last call.

        Raises:
            TarError: the stream cannot be decompressed.
            LayerLimitExceeded: the stream is too large when decompressed.
        """
        if self._is_plain:
            return self._next_plain()
        if self._lent is not None:
            self._free.put(self._lent)
            self._lent = None
        item = self._hashed.get()
        if isinstance(item, Exception):
            raise item
        self._lent, length = item
        if length == 0:
            return None
        return self._lent[:length]

    def _next_plain(self) -> memoryview | None:
        span = self._source.next_span()
        self._check_limits(self._source.received_bytes)
        if span is not None and self.is_hashed:
            self._hash.update(span)
        return span

    def _inflate(self) -> None:
        try:
            reader = self._reader()
            inflated = 0
            length = -1
            while length:
                buffer = self._free.get()
                length = _fill(reader, buffer)
                inflated += length
                self._check_limits(inflated)
                self._inflated.put((buffer, length))
        except (
            _IsalError,
            EOFError,
            BadGzipFile,
            OverflowError,
        ) as error:  # OverflowError: an endless header
            self._inflated.put(TarError(f"it cannot be decompressed ({error})"))
        except zstandard.ZstdError as error:
            self._inflated.put(self._zstd_failure(error))
        except Exception as error:  # noqa: BLE001 - the tar reader waits for a result, whatever it is
            self._inflated.put(error)

    def _hash_inflated(self) -> None:
        while True:
            item = self._inflated.get()
            if isinstance(item, Exception):
                self._hashed.put(item)
                return
            buffer, length = item
            self._hash.update(buffer[:length])
            self._hashed.put(item)
            if length == 0:
                return

    def _zstd_failure(self, error: zstandard.ZstdError) -> Exception:
        if _ZSTD_WINDOW_TOO_LARGE in str(error):
            allowed = self._limits.max_zstd_window_bytes
            return LayerLimitExceeded("its zstd window", "max_zstd_window_bytes", allowed)
        return TarError(f"it cannot be decompressed ({error})")

    def _reader(self) -> _Reader:
        if self.decoder is Decoder.GZIP:
            # ISA-L takes half the time of zlib; the public IGzipFile copies what this reader writes in place
            return _GzipReader(cast("BinaryIO", self._source), _COMPRESSED_BUFFER_BYTES)
        decompressor = zstandard.ZstdDecompressor(max_window_size=self._limits.max_zstd_window_bytes)
        return decompressor.stream_reader(
            cast("BinaryIO", self._source), read_size=_COMPRESSED_BUFFER_BYTES, read_across_frames=True
        )

    def _check_limits(self, inflated: int) -> None:
        if inflated <= _RATIO_IS_CHECKED_ABOVE and inflated <= self._max_tar_bytes:
            return
        ratio = self._limits.max_compression_ratio
        if inflated > _RATIO_IS_CHECKED_ABOVE and inflated > ratio * self._source.received_bytes:
            raise LayerLimitExceeded("the compression ratio", "max_compression_ratio", ratio)
        if inflated > self._max_tar_bytes:
            raise LayerLimitExceeded("the unpacked layer", "max_layer_bytes", self._limits.max_layer_bytes)


def _fill(reader: _Reader, buffer: memoryview) -> int:
    """Fill the buffer by as many reads as it takes; returns less than its length only at the end of the stream."""
    filled = 0
    while filled < len(buffer):
        length = reader.readinto(buffer[filled:])
        if length == 0:
            break
        filled += length
    return filled
