"""Reads the entries of a tar: ustar, pax, GNU and v7 headers, each bounded.

In one pass, `TarReader` walks over the buffers that `inflate.py` returns, yields an `Entry` for each member, and
lets the caller take its content as slices of these buffers; the rest is skipped. Only headers that straddle two
buffers are copied.

It reads what these programs write, and refuses other forms by name:
  - Go's archive/tar, by which Docker, BuildKit, kaniko, umoci and containerd write layers: ustar, pax, GNU; before
    Go 1.11 also type NUL, which is a directory if the name ends in a slash;
  - GNU tar, whose archives `docker import` and buildah keep as layers: GNU (long names, sparse files), pax, v7;
  - bsdtar (libarchive): pax, ustar, v7; busybox and Python's tarfile; star, with times in the ustar prefix;
  - git archive: global pax headers.
As in archive/tar, header-only types have no content, a global pax header does not apply to entries, a second pax
header replaces the first, GNU's long names win over pax's, the last block may lack its padding, and two zero
blocks are the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final

from isal.isal_zlib import adler32

from guestpull_server.layer import sparse
from guestpull_server.layer.refusals import LayerLimitExceeded, TarError, shown
from guestpull_server.layer.sparse import SparseMap
from guestpull_server.layer.tar_bytes import BLOCK, NextChunk, Splitter, TarBytes
from guestpull_server.layer.tar_entry import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    DIRECTORY,
    HEADER_ONLY,
    REGULAR,
    Entry,
    entry_of,
)
from guestpull_server.layer.tar_extensions import Extensions
from guestpull_server.layer.tar_fields import NANOSECONDS, decimal, nanoseconds, number

# name, mode+uid+gid, size, mtime, checksum, type, link target, magic, prefix, its end
_HEADER: Final = Struct("100s24s12s12s8sc100s8s80x155s12s")
_ATTRIBUTES: Final = Struct("8s8s8s")
_DEVICE: Final = Struct("329x8s8s167x")
_ZEROS: Final = bytes(BLOCK)
_ADLER_MODULUS: Final = 65521
_SPACE: Final = 0x20  # counts in place of each byte of the checksum field
_CACHED: Final = 4096
_OLD_REGULAR: Final = b"\0"
_GNU_SPARSE: Final = b"S"
_NO_DEVICE: Final = (0, 0)


class TarReader(TarBytes):
    """Reads the entries of one tar, in order.

    Args:
        next_chunk: returns the bytes of the tar.
        max_header_bytes: the limit of one extension header and of one map of a sparse file.
        splitter: receives all bytes, if there is one.
    """

    def __init__(
        self, next_chunk: NextChunk, max_header_bytes: int, splitter: Splitter | None = None
    ) -> None:
        super().__init__(next_chunk, splitter)
        self._max_header_bytes = max_header_bytes
        # looking up fields that repeat from header to header saves 2.4 of 4.4 us a header
        self._attributes: dict[bytes, tuple[int, int, int]] = {}
        self._times: dict[bytes, int] = {}
        self._sums: dict[bytes, int] = {}

    def __iter__(self) -> Iterator[Entry]:
        """Yield the entries up to the end of the archive, then read the stream to its end.

        Raises:
            TarError: the tar is malformed or cut short.
            LayerLimitExceeded: an extension header is too large.
        """
        extensions: Extensions | None = None
        while True:
            chunk = self._chunk
            position = self._position + self._unread + self._padding
            end = position + BLOCK
            if end <= len(chunk):
                block = chunk[position:end]
                self._position = end
                self._unread = self._padding = 0
            else:
                self._skip_rest()
                straddling = self._take(BLOCK, at_boundary=True)
                if straddling is None:
                    return
                block = memoryview(straddling)
            fields = _HEADER.unpack(block)
            if not fields[0][0] and block == _ZEROS:
                self._end_of_archive()
                return
            # The low half of Adler-32 is the sum of the bytes modulo 65521. With the field's own part of the sum
            # looked up, the check of a header takes 0.3 us; sum() alone takes 3 us.
            total = self._sums.get(fields[4])
            if total is None:
                total = self._read_checksum(fields[4])
            if (adler32(block, 0) & 0xFFFF) != total:
                raise TarError("a header's checksum is wrong")
            kind: bytes = fields[5]
            if kind in b"xgLK":
                extensions = self._extend(extensions, kind, number(fields[2]))
                continue
            if extensions is not None:
                yield self._extended_entry(block, fields, extensions)
                extensions = None
            elif kind == _GNU_SPARSE:
                yield self._gnu_sparse_entry(block, fields)
            else:
                yield self._entry(block, fields, kind)

    # -- headers --------------------------------------------------------------------------------------------

    def _entry(self, block: memoryview, fields: tuple[bytes, ...], kind: bytes) -> Entry:
        """An entry without extension headers, as nearly all are."""
        name, attributes, size, mtime, _, _, link, magic, prefix, trailer = fields
        path = name.partition(b"\0")[0]
        if prefix[0] and magic[:6] == b"ustar\0":
            if trailer[8:] == b"tar\0":  # star has times at the end of the prefix
                prefix = prefix[:131]
            path = prefix.partition(b"\0")[0] + b"/" + path
        device = _NO_DEVICE
        length = number(size)
        if kind != REGULAR:
            kind = self._kind(kind, path)
            if kind in HEADER_ONLY:
                length = 0
                if kind in (CHARACTER_DEVICE, BLOCK_DEVICE):
                    major, minor = _DEVICE.unpack(block)
                    device = (number(major), number(minor))
        self._expect(length)
        owner = self._attributes.get(attributes)
        if owner is None:
            owner = self._read_attributes(attributes)
        time = self._times.get(mtime)
        if time is None:
            time = self._read_time(mtime)
        mode, uid, gid = owner
        target = link.partition(b"\0")[0] if link[0] else b""
        return entry_of((path, kind, mode, uid, gid, length, time, time, target, device, (), None))

    def _extended_entry(self, block: memoryview, fields: tuple[bytes, ...], extensions: Extensions) -> Entry:
        """An entry with extension headers."""
        records = extensions.records
        if fields[5] == _GNU_SPARSE:
            plain = self._gnu_sparse_entry(block, fields)
        else:
            plain = self._entry(block, fields, fields[5])
        path, kind, mode, uid, gid, size, mtime, _, link, device, _, sparse_map = plain
        path = extensions.long_name or records.get(b"path") or path
        link = extensions.long_link or records.get(b"linkpath") or link
        if fields[5] == _OLD_REGULAR:
            kind = self._kind(_OLD_REGULAR, path)  # the last letter of the whole name decides
            if kind != plain.type:
                self._expect(size := 0 if kind == DIRECTORY else number(fields[2]))
        if kind == REGULAR and sparse_map is None:
            if value := records.get(b"size"):
                self._expect(size := decimal(value, "size"))
            if extensions.is_sparse:
                sparse_map = self._pax_sparse_map(records)
                path = records.get(b"GNU.sparse.name") or path
                size = sparse_map.real_size
        if b"\0" in path or b"\0" in link:
            raise TarError("a path contains a NUL byte")
        if value := records.get(b"uid"):
            uid = decimal(value, "uid")
        if value := records.get(b"gid"):
            gid = decimal(value, "gid")
        if value := records.get(b"mtime"):
            mtime = nanoseconds(value, "mtime")
        atime = nanoseconds(value, "atime") if (value := records.get(b"atime")) else mtime
        xattrs = extensions.xattrs
        return entry_of((path, kind, mode, uid, gid, size, mtime, atime, link, device, xattrs, sparse_map))

    def _gnu_sparse_entry(self, block: memoryview, fields: tuple[bytes, ...]) -> Entry:
        header = bytes(block)
        sparse_map = sparse.from_gnu_header(header, self._block, self._max_header_bytes)
        plain = self._entry(block, fields, REGULAR)
        if plain.size != sparse_map.stored_size:
            raise TarError("a sparse file's map does not fit its content")
        return plain._replace(size=sparse_map.real_size, sparse=sparse_map)

    def _pax_sparse_map(self, records: dict[bytes, bytes]) -> SparseMap:
        stored = self._unread
        sparse_map, map_size = sparse.from_content(records, self._block, self._max_header_bytes)
        self._unread = stored - map_size  # the map fills whole blocks: the padding stays as it is
        if sparse_map.stored_size != self._unread:
            raise TarError("a sparse file's map does not fit its content")
        return sparse_map

    def _kind(self, kind: bytes, path: bytes) -> bytes:
        """The type of an entry, with type NUL replaced by the one that it means.

        Raises:
            TarError: the type is not one that layers have.
        """
        if kind == _OLD_REGULAR:
            return DIRECTORY if path.endswith(b"/") else REGULAR
        if kind == REGULAR or kind in HEADER_ONLY:
            return kind
        raise TarError(f"entry {shown(path)} is of type {kind.decode('latin-1')!r}, which is not supported")

    def _extend(self, extensions: Extensions | None, kind: bytes, length: int) -> Extensions | None:
        """Read an extension header."""
        if length < 0:
            raise TarError("an extension header has a negative size")
        if length > self._max_header_bytes:
            raise LayerLimitExceeded("an extension header", "max_header_bytes", self._max_header_bytes)
        content = (self._take(length + -length % BLOCK) or b"")[:length]
        if kind == b"g":
            return None
        extensions = extensions or Extensions()
        if kind == b"x":
            extensions.read_pax(content)
        elif kind == b"L":
            extensions.long_name = content.partition(b"\0")[0]
        else:
            extensions.long_link = content.partition(b"\0")[0]
        return extensions

    def _read_attributes(self, field: bytes) -> tuple[int, int, int]:
        mode, uid, gid = _ATTRIBUTES.unpack(field)
        if len(self._attributes) >= _CACHED:
            self._attributes.clear()
        attributes = self._attributes[field] = (number(mode) & 0o7777, number(uid), number(gid))
        return attributes

    def _read_time(self, field: bytes) -> int:
        if len(self._times) >= _CACHED:
            self._times.clear()
        time = self._times[field] = number(field) * NANOSECONDS
        return time

    def _read_checksum(self, field: bytes) -> int:
        """The sum modulo 65521 that the bytes of a header must have, by its checksum field."""
        if len(self._sums) >= _CACHED:
            self._sums.clear()
        total = self._sums[field] = (number(field) - len(field) * _SPACE + sum(field)) % _ADLER_MODULUS
        return total

    def _end_of_archive(self) -> None:
        second = self._take(BLOCK, at_boundary=True)
        if second is not None and second != _ZEROS:
            raise TarError("a single zero block stands between entries")
        while self._next():
            self._position = len(self._chunk)

    def _block(self) -> bytes:
        return self._take(BLOCK) or b""
