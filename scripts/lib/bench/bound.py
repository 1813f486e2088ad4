"""Measures the parts of a cold pull alone, with the libraries that guestpulld uses.

    inflate      decompress the blobs into a buffer that is reused
    hash         compute the SHA-256 of the compressed bytes, and of the tars
    create       create the same files in a plain loop over a prepared list

The sum of their CPU seconds divided by the cores is the bound: no pull that uses these libraries, verifies both
digests and creates these files can be faster on these cores. The bound excludes the registry, the kernel's sockets
and pipes, HTTP, tar headers and coordination: that is what guestpulld needs beyond the bound.

    python -P -m bench.bound   < request, one JSON object   > result, one JSON object
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, Final, cast

import msgspec
import zstandard
from isal.isal_zlib import _GzipReader

from bench.images import Image
from bench.layers import Codec
from bench.place import Place, Refusal
from bench.registry import Registry

_BUFFER: Final = 512 * 1024  # bytes
_WHITEOUT: Final = b"whiteout"  # beside tarfile's types
_OPAQUE: Final = b"opaque"


class Parts(msgspec.Struct, frozen=True):
    """CPU seconds of each part."""

    inflate: float
    hash_compressed: float
    hash_tar: float
    create: float

    @property
    def total(self) -> float:
        """CPU seconds of all parts."""
        return self.inflate + self.hash_compressed + self.hash_tar + self.create


class _Request(msgspec.Struct, frozen=True):
    codec: Codec
    blobs: list[str]
    tars: list[str]
    directory: str


def measure(place: Place, registry: Registry, image: Image, plain: Image) -> Parts:
    """Measure each part once, in a separate process.

    Args:
        place: provides a file system for the files.
        registry: holds the blobs as files.
        image: the image to measure.
        plain: the same image, uncompressed.
    """
    with place.tmpfs() as directory:
        request = _Request(
            codec=image.layers[0].codec,
            blobs=[str(registry.blob_path(layer.digest)) for layer in image.layers],
            tars=[str(registry.blob_path(layer.digest)) for layer in plain.layers],
            directory=str(directory),
        )
        done = subprocess.run(
            [sys.executable, "-P", "-m", "bench.bound"],
            input=msgspec.json.encode(request),
            stdout=subprocess.PIPE,
            check=False,
        )
    if done.returncode != 0:
        raise Refusal("the bound could not be measured")
    return msgspec.json.decode(done.stdout, type=Parts)


# -- in the process that measures ---------------------------------------------------------------------------


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    """One entry with the precomputed arguments of its system calls.

    `parent` is the directory to create it in, `target` the target of a link; `start` and `end` delimit the
    content in the tar.
    """

    parent: bytes
    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    start: int
    end: int
    target: bytes


def _main() -> None:
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=_Request)
    inflate = 0.0
    if request.codec != "plain":
        inflate = sum(_seconds_to_inflate(request.codec, blob) for blob in request.blobs)
    hash_tar = sum(map(_seconds_to_hash, request.tars))
    hash_compressed = hash_tar if request.codec == "plain" else sum(map(_seconds_to_hash, request.blobs))
    create = 0.0
    os.umask(0)
    for number, tar in enumerate(request.tars):
        root = f"{request.directory}/{number}".encode()
        os.mkdir(root)
        entries = list(_entries_of(tar, root))
        with _mapped(tar) as content:
            create += _seconds_to_create(entries, content)
    sys.stdout.buffer.write(msgspec.json.encode(Parts(inflate, hash_compressed, hash_tar, create)))


def _seconds_to_inflate(codec: Codec, path: str) -> float:
    buffer = memoryview(bytearray(_BUFFER))
    with open(path, "rb", buffering=0) as file:
        begun = time.process_time()
        reader: _GzipReader | zstandard.ZstdDecompressionReader
        if codec == "gzip":
            reader = _GzipReader(cast("BinaryIO", file), _BUFFER)
        else:
            reader = zstandard.ZstdDecompressor().stream_reader(cast("BinaryIO", file), read_size=_BUFFER)
        while reader.readinto(buffer):
            pass
        return time.process_time() - begun


def _seconds_to_hash(path: str) -> float:
    with _mapped(path) as content:
        begun = time.process_time()
        digest = hashlib.sha256()
        for start in range(0, len(content), _BUFFER):
            digest.update(content[start : start + _BUFFER])
        digest.digest()
        return time.process_time() - begun


def _seconds_to_create(entries: Sequence[_Entry], content: memoryview) -> float:
    """Create the entries with all their attributes, with as few system calls as possible."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    current = b""
    directories: list[_Entry] = []
    begun = time.process_time()
    for entry in entries:
        if entry.parent != current:
            current = entry.parent
            os.chdir(current)
        if entry.kind == tarfile.REGTYPE:
            file = os.open(entry.name, flags, entry.mode)
            if entry.end > entry.start:
                os.write(file, content[entry.start : entry.end])
            if entry.uid or entry.gid:
                os.chown(file, entry.uid, entry.gid)
                os.chmod(file, entry.mode)
            os.utime(file, ns=(entry.mtime_ns, entry.mtime_ns))
            os.close(file)
        elif entry.kind == tarfile.DIRTYPE:
            os.mkdir(entry.name, entry.mode)
            directories.append(entry)
        elif entry.kind == tarfile.SYMTYPE:
            os.symlink(entry.target, entry.name)
            os.utime(entry.name, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)
        elif entry.kind == tarfile.LNKTYPE:
            os.link(entry.target, entry.name, follow_symlinks=False)
        elif entry.kind == _WHITEOUT:
            os.mknod(entry.name, stat.S_IFCHR)
        else:
            os.setxattr(b".", b"trusted.overlay.opaque", b"y")
    for entry in directories:
        os.utime(entry.parent + b"/" + entry.name, ns=(entry.mtime_ns, entry.mtime_ns))
    return time.process_time() - begun


def _entries_of(tar: str, root: bytes) -> Iterator[_Entry]:
    with tarfile.open(tar, "r:") as members:
        for member in members:
            directory, _, name = f"/{member.name}".encode().rpartition(b"/")
            kind = member.type
            if name == b".wh..wh..opq":
                kind = _OPAQUE
            elif name.startswith(b".wh."):
                kind, name = _WHITEOUT, name[4:]
            target = member.linkname.encode()
            yield _Entry(
                parent=root + directory,
                name=name,
                kind=kind,
                mode=member.mode,
                uid=member.uid,
                gid=member.gid,
                mtime_ns=int(member.mtime) * 10**9,
                start=member.offset_data,
                end=member.offset_data + (member.size if kind == tarfile.REGTYPE else 0),
                target=root + b"/" + target if kind == tarfile.LNKTYPE else target,
            )


@contextmanager
def _mapped(path: str) -> Iterator[memoryview]:
    """Map a file's content and touch its pages, so that page faults are not measured."""
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
    with mapped, memoryview(mapped) as content:
        yield content


if __name__ == "__main__":
    _main()
