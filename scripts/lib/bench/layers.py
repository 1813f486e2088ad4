"""Compresses tar streams to blobs: each layer is written once and compressed with several codecs.

    with LayerWriter(directory, ("gzip", "zstd", "plain")) as writer:
        with tarfile.open(fileobj=writer, mode="w|") as tar:
            ...
    writer.blobs["gzip"].digest, writer.diff_id

gzip uses zlib's level 6, like `gzip -6`, Docker and Debian's tools; zstd uses level 3.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Protocol, Self, TypeAlias

import zstandard

Codec: TypeAlias = Literal["gzip", "zstd", "plain"]
CODECS: Final[tuple[Codec, ...]] = ("gzip", "zstd", "plain")
MEDIA_TYPES: Final[dict[Codec, str]] = {
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
    "plain": "application/vnd.oci.image.layer.v1.tar",
}
_GZIP_LEVEL: Final = 6
_GZIP_WINDOW: Final = 31  # zlib's wbits for a window of 32 KiB and gzip's header
_ZSTD_LEVEL: Final = 3


class _Compressor(Protocol):
    def compress(self, piece: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Plain:
    def compress(self, piece: bytes, /) -> bytes:
        return piece

    def flush(self) -> bytes:
        return b""


@dataclass(frozen=True, slots=True)
class Blob:
    """One layer with one codec, in a file. `size` is in bytes."""

    path: Path
    digest: str
    size: int


class _BlobWriter:
    def __init__(self, path: Path, codec: Codec) -> None:
        self._path = path
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._size = 0
        self._compressor: _Compressor
        match codec:
            case "gzip":
                self._compressor = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
            case "zstd":
                self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
            case "plain":
                self._compressor = _Plain()

    def write(self, piece: bytes) -> None:
        self._put(self._compressor.compress(piece))

    def close(self) -> Blob:
        self._put(self._compressor.flush())
        self._file.close()
        return Blob(self._path, f"sha256:{self._hash.hexdigest()}", self._size)

    def _put(self, piece: bytes) -> None:
        self._hash.update(piece)
        self._size += self._file.write(piece)


class LayerWriter:
    """A file object for `tarfile` to write to. `blobs` and `diff_id` are set when its block is left.

    After that it can be pickled, to be returned by the process that wrote it. `tar_size` is in bytes.
    """

    def __init__(self, directory: Path, name: str, codecs: Sequence[Codec] = CODECS) -> None:
        self.blobs: dict[Codec, Blob] = {}
        self.diff_id = ""
        self.tar_size = 0
        self._hash = hashlib.sha256()
        self._writers = {codec: _BlobWriter(directory / f"{name}.{codec}", codec) for codec in codecs}

    def write(self, piece: bytes) -> int:
        """Write the next bytes of the tar."""
        self._hash.update(piece)
        self.tar_size += len(piece)
        for writer in self._writers.values():
            writer.write(piece)
        return len(piece)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.diff_id = f"sha256:{self._hash.hexdigest()}"
        self.blobs = {codec: writer.close() for codec, writer in self._writers.items()}
        del self._hash
        self._writers.clear()
