"""The work itself, each part alone on one core: what no arrangement of it can undercut.

A cold pull must inflate the layers, hash what came and what was in it, and create the files. Each part is
measured alone, in the same run, by the same libraries, over the same bytes; their sum over the cores is the
bound. What is not in it: the registry, the socket, the pipe, and reading the tar.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard
from isal import igzip_lib

from benchmark.machine import Registry, remove

_STEP = 512 * 1024


@dataclass(frozen=True)
class Bound:
    """CPU seconds of each part."""

    inflate: float
    hash_compressed: float
    hash_tar: float
    create: float

    @property
    def cpu_seconds(self) -> float:
        """All of it, on one core."""
        return self.inflate + self.hash_compressed + self.hash_tar + self.create


@contextlib.contextmanager
def _timed(spent: list[float]) -> Iterator[None]:
    started = time.process_time()
    yield
    spent.append(time.process_time() - started)


def measure(registry: Registry, reference: str, kind: str, directory: Path) -> Bound:
    """Measure the parts for one image."""
    inflate: list[float] = []
    hash_compressed: list[float] = []
    hash_tar: list[float] = []
    create: list[float] = []
    repository, _, tag = reference.removeprefix(f"{registry.host}/").partition(":")
    for digest in _layers(registry, repository, tag):
        blob = _get(registry, f"/v2/{repository}/blobs/{digest}")
        with _timed(hash_compressed):
            hashlib.sha256(blob)
        if kind == "plain":
            tar = blob
        else:
            with _timed(inflate):
                for _piece in _inflated(blob, kind):
                    pass
            tar = b"".join(_inflated(blob, kind))
        with _timed(hash_tar):
            hashlib.sha256(tar)
        tar_path = directory / "layer.tar"
        entries = list(_entries(tar))
        target = directory / "created"
        target.mkdir(exist_ok=True)
        here = os.open(".", os.O_RDONLY)
        os.umask(0)
        try:
            with _timed(create):
                _create(entries, memoryview(tar), str(target))
        finally:
            os.fchdir(here)
            os.close(here)
        tar_path.unlink(missing_ok=True)
        remove(target)
    return Bound(sum(inflate), sum(hash_compressed), sum(hash_tar), sum(create))


def _inflated(blob: bytes, kind: str) -> Iterator[bytes]:
    if kind == "zstd":
        yield from zstandard.ZstdDecompressor().read_to_iter(blob, read_size=_STEP, write_size=_STEP)
        return
    decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    piece = blob
    while not decompressor.eof:
        yield decompressor.decompress(piece, _STEP)
        piece = b""


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str
    kind: bytes
    mode: int
    target: str
    start: int
    size: int


def _entries(tar: bytes) -> Iterator[_Entry]:
    position = 0
    while position < len(tar):
        header = tar[position : position + 512]
        if header == bytes(512):
            return
        name = header[345:500].rstrip(b"\0") + b"/" + header[:100].rstrip(b"\0")
        size = int(header[124:135], 8)
        link = header[157:257].rstrip(b"\0").decode()
        mode = int(header[100:107], 8)
        yield _Entry(name.decode().strip("/"), header[156:157], mode, link, position + 512, size)
        position += 512 + -(-size // 512) * 512


def _create(entries: list[_Entry], tar: memoryview, target: str) -> None:
    """Create the files by the fewest calls that set all that their headers say."""
    times = (1_700_000_000 * 10**9,) * 2
    directory = ""
    os.chdir(target)
    for entry in entries:
        parent, _, name = entry.path.rpartition("/")
        if parent != directory:
            os.chdir(target)
            os.makedirs(parent or ".", exist_ok=True)
            os.chdir(parent or ".")
            directory = parent
        if entry.kind == b"0":
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, entry.mode)
            if entry.size:
                os.write(file, tar[entry.start : entry.start + entry.size])
            os.utime(file, ns=times)
            os.close(file)
        elif entry.kind == b"5":
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, entry.mode)
            os.utime(name, ns=times)
        elif entry.kind == b"2":
            os.symlink(entry.target, name)
            os.utime(name, ns=times, follow_symlinks=False)
        else:
            os.link(f"{target}/{entry.target}", name)


def _layers(registry: Registry, repository: str, tag: str) -> list[str]:
    manifest = json.loads(_get(registry, f"/v2/{repository}/manifests/{tag}"))
    return [layer["digest"] for layer in manifest["layers"]]


def _get(registry: Registry, path: str) -> bytes:
    connection = http.client.HTTPConnection(registry.host, timeout=300)
    try:
        connection.request("GET", path, headers={"Accept": "application/vnd.oci.image.manifest.v1+json"})
        response = connection.getresponse()
        assert response.status == 200, (path, response.status)
        return response.read()
    finally:
        connection.close()
