"""Reads the files of a tar archive without unpacking it.

    with Archive.open("shop.tar.gz", name, limits, scratch, cancellation) as files:
        with files.find("manifest.json") as part:
            first = part.read_at(0, 4096)

Members are read in place, by their offset; nothing is written under a name from the archive. A compressed archive
is first inflated to an unnamed file, which is deleted when the archive is closed.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Final, Protocol

import zstandard
from isal.igzip_lib import IsalError
from isal.isal_zlib import _GzipReader

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import (
    InvalidManifest,
    InvalidRequest,
    LimitExceeded,
    UnsupportedImage,
    storage_errors,
)
from guestpull_server.models import MiB
from guestpull_server.registry.local.tree import Part, open_regular

GZIP_MAGIC: Final = b"\x1f\x8b"
ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_XZ_MAGIC: Final = b"\xfd7zXZ\x00"
_BZIP2_MAGIC: Final = b"BZh"
_COMPRESSED: Final = (GZIP_MAGIC, ZSTD_MAGIC, _XZ_MAGIC, _BZIP2_MAGIC)
_MAX_XZ_BYTES: Final = 128 * MiB  # of memory; files of `xz -9` need 65 MiB
_MAX_MEMBERS: Final = 100_000  # an image of 500 layers has some 1,500
_MAX_LINKS: Final = 8
_PIECE_BYTES: Final = 1 * MiB


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of an archive. `link` is the target of a link, and empty for other members."""

    offset: int = 0
    size: int = 0
    is_file: bool = False
    link: str = ""


class Archive:
    """The Files of a tar archive."""

    def __init__(self, descriptor: int, members: dict[str, _Member]) -> None:
        self._descriptor = descriptor
        self._members = members

    @classmethod
    @contextmanager
    def open(
        cls, path: str, name: str, limits: Limits, scratch: str, cancellation: Cancellation
    ) -> Iterator[Archive]:
        """Open an archive: plain, or compressed with gzip, zstd, xz or bzip2.

        Args:
            path: the file.
            name: the image, as errors name it.
            limits: `max_layer_bytes` and `max_compression_ratio` bound the inflated size.
            scratch: a directory on the file system to inflate to.
            cancellation: of the request.

        Raises:
            InvalidRequest: the file does not exist, is not a regular file, or cannot be read.
            InvalidManifest: the file is not an archive, or is damaged.
            UnsupportedImage: this Python has no decompressor for it.
            LimitExceeded: the inflated size exceeds a limit.
            StorageFull: the inflated archive does not fit on the file system.
        """
        with ExitStack() as opened:
            try:
                file: BinaryIO = opened.enter_context(open(open_regular(path), "rb"))
                magic = os.pread(file.fileno(), 8, 0)
            except (OSError, ValueError) as error:  # ValueError: NUL in the path
                problem = f"{path}: {error.strerror if isinstance(error, OSError) else error}"
                raise InvalidRequest(
                    name, problem, "Use a file written by docker save, podman or skopeo."
                ) from None
            if magic.startswith(_COMPRESSED):
                with storage_errors(f"inflating {name}", scratch):
                    inflated = opened.enter_context(tempfile.TemporaryFile(dir=scratch))
                    for piece in _inflated(file, magic, name, limits, cancellation):
                        inflated.write(piece)
                    inflated.flush()
                file = inflated
            yield cls(file.fileno(), _members(file, name, limits, cancellation))

    def find(self, path: str) -> Part | None:
        """See Files. Links are followed within the archive."""
        path = _normalised(path)
        for _ in range(_MAX_LINKS):
            member = self._members.get(path)
            if member is None:
                return None
            if member.is_file:
                return Part(self._descriptor, member.offset, member.size)
            path = member.link
        return None


def _inflated(
    file: BinaryIO, magic: bytes, name: str, limits: Limits, cancellation: Cancellation
) -> Iterator[bytes]:
    allowed, ratio = limits.max_layer_bytes, limits.max_compression_ratio
    allowed_by_ratio = os.fstat(file.fileno()).st_size * ratio
    try:
        read, broken = _decompressor(file, magic, limits)
    except ImportError as error:
        raise UnsupportedImage(name, f"its compression is not supported by this Python ({error})") from None
    size = 0
    while True:
        cancellation.check()
        try:
            piece = read(_PIECE_BYTES)
        except broken as error:
            raise InvalidManifest(name, "the archive", f"decompression failed ({error})") from None
        if not piece:
            return
        size += len(piece)
        if size > allowed:
            raise LimitExceeded(f"{name}: the inflated size of the archive", "max_layer_bytes", allowed)
        if size > allowed_by_ratio:
            raise LimitExceeded(
                f"{name}: the compression ratio of the archive", "max_compression_ratio", ratio
            )
        yield piece


def _decompressor(
    file: BinaryIO, magic: bytes, limits: Limits
) -> tuple[Callable[[int], bytes], tuple[type[Exception], ...]]:
    """Return a function that reads inflated bytes, and the exceptions that it raises for damaged input."""
    if magic.startswith(GZIP_MAGIC):
        broken: tuple[type[Exception], ...] = (OSError, EOFError, IsalError)  # type: ignore[assignment]
        return _GzipReader(file, _PIECE_BYTES).read, broken
    if magic.startswith(_XZ_MAGIC):
        import lzma  # missing in some builds of Python

        make = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, _MAX_XZ_BYTES)
        return _Streams(file, make).read, (lzma.LZMAError, EOFError)
    if magic.startswith(_BZIP2_MAGIC):
        import bz2  # missing in some builds of Python

        return _Streams(file, bz2.BZ2Decompressor).read, (OSError, ValueError, EOFError)
    decompressor = zstandard.ZstdDecompressor(max_window_size=limits.max_zstd_window_bytes)
    return decompressor.stream_reader(file, read_across_frames=True).read, (zstandard.ZstdError, OSError)


class _Decompressor(Protocol):
    """The common interface of the decompressors of lzma and bz2."""

    @property
    def eof(self) -> bool:
        """Whether the end of the stream was reached."""

    @property
    def needs_input(self) -> bool:
        """Whether more input is needed to produce output."""

    @property
    def unused_data(self) -> bytes:
        """The input after the end of the stream."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Decompress input; returns at most `max_length` bytes."""


class _Streams:
    """Reads concatenated compressed streams, with optional zero padding, as xz and bzip2 write them.

    Args:
        file: the compressed file.
        make: creates the decompressor of one stream.
    """

    def __init__(self, file: BinaryIO, make: Callable[[], _Decompressor]) -> None:
        self._file = file
        self._make = make
        self._stream = make()

    def read(self, limit: int) -> bytes:
        """Return the next bytes, at most `limit`; empty at the end.

        Raises:
            EOFError: the file is truncated.
        """
        while True:
            fed = b""
            if self._stream.eof:
                fed = self._next_stream(self._stream.unused_data)
                if not fed:
                    return b""
                self._stream = self._make()
            elif self._stream.needs_input:
                fed = self._file.read(_PIECE_BYTES)
                if not fed:
                    raise EOFError("it is truncated")
            piece = self._stream.decompress(fed, limit)
            if piece:
                return piece

    def _next_stream(self, rest: bytes) -> bytes:
        rest = rest.lstrip(b"\0")
        while not rest:
            more = self._file.read(_PIECE_BYTES)
            if not more:
                return b""
            rest = more.lstrip(b"\0")
        return rest


class _BoundedReader:
    """Bounds the size of the headers that tarfile reads."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._limit = limit

    def read(self, length: int) -> bytes:
        if not 0 <= length <= self._limit:
            raise tarfile.ReadError("a header is longer than limits.max_header_bytes")
        return self._file.read(length)

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()


def _members(file: BinaryIO, name: str, limits: Limits, cancellation: Cancellation) -> dict[str, _Member]:
    """Return the members by path. If names repeat, the last member counts, as in tar."""
    members: dict[str, _Member] = {}
    size = os.fstat(file.fileno()).st_size
    at = -1
    count = 0
    try:
        file.seek(0)
        with closing(tarfile.TarFile(fileobj=_BoundedReader(file, limits.max_header_bytes))) as tar:  # type: ignore[arg-type]
            while (header := tar.next()) is not None:
                cancellation.check()
                # a negative size would make tarfile loop forever (CVE-2025-8194)
                if header.offset <= at or not 0 <= header.size <= size - header.offset_data or header.sparse:
                    raise tarfile.ReadError(f"invalid header at {header.offset}")
                at = header.offset
                count += 1
                if count > _MAX_MEMBERS:
                    raise tarfile.ReadError(f"more than {_MAX_MEMBERS} members")
                members[_normalised(header.name)] = _member(header)
    except (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError, OSError) as error:
        raise InvalidManifest(name, "the archive", f"not a tar archive ({error})") from None
    return members


def _member(header: tarfile.TarInfo) -> _Member:
    if header.issym():
        return _Member(link=_normalised(posixpath.join(posixpath.dirname(header.name), header.linkname)))
    if header.islnk():
        return _Member(link=_normalised(header.linkname))
    return _Member(header.offset_data, header.size, is_file=True) if header.isreg() else _Member()


def _normalised(path: str) -> str:
    return posixpath.normpath(path).lstrip("/")
