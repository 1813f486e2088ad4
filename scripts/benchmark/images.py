"""The image that all pull: made once of what this machine has, and kept.

Realistic in what costs time: many small files and a few large ones, with the contents of real ones. The pool
that contents are cut from is Python sources and shared libraries of this machine; a file is a slice of it, at a
place that only its number decides. So the same machine makes the same image again.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import sys
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import zstandard

from benchmark.machine import Registry

MB: Final = 1_000_000
_POOL_BYTES: Final = 64 * MB
_MEDIAN_BYTES: Final = 3000
_SIGMA: Final = 1.75
_LARGEST: Final = 24 * MB
FORMATS: Final = ("gzip", "zstd", "plain")


@dataclass(frozen=True)
class Shape:
    """How big an image is. `layers` are entries of each layer."""

    name: str
    layers: tuple[int, ...]


FULL: Final = Shape("full", (44_000, 32_000))
QUICK: Final = Shape("quick", (7_000, 5_000))


def ensure(registry: Registry, shape: Shape, cache: Path) -> dict[str, str]:
    """Have the image in the registry in all formats; returns references by format."""
    references = {kind: f"{registry.host}/bench-{shape.name}:{kind}" for kind in FORMATS}
    if not all(registry.has(f"bench-{shape.name}", kind) for kind in FORMATS):
        print(f"making the image ({sum(shape.layers):,} entries); this is done once", flush=True)
        directory = cache / f"image-{shape.name}"
        directory.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as pool:
            jobs = [(directory, number, entries) for number, entries in enumerate(shape.layers)]
            layers = list(pool.map(_make_layer, jobs))
        for kind in FORMATS:
            _push(registry, f"bench-{shape.name}", kind, [layer[kind] for layer in layers])
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
    return references


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


@dataclass(frozen=True)
class _Blob:
    path: Path
    digest: str
    diff_id: str
    size: int


def _make_layer(job: tuple[Path, int, int]) -> dict[str, _Blob]:
    directory, number, entries = job
    paths = {kind: directory / f"layer-{number}.{kind}" for kind in FORMATS}
    compressors: dict[str, _Compressor] = {
        "gzip": zlib.compressobj(6, zlib.DEFLATED, 31),
        "zstd": zstandard.ZstdCompressor(level=3).compressobj(),
    }
    hashes = {kind: hashlib.sha256() for kind in FORMATS}
    files = {kind: path.open("wb") for kind, path in paths.items()}

    def write(kind: str, content: bytes) -> None:
        hashes[kind].update(content)
        files[kind].write(content)

    for chunk in tar_stream(number, entries):
        write("plain", chunk)
        for kind, compressor in compressors.items():
            write(kind, compressor.compress(chunk))
    for kind, compressor in compressors.items():
        write(kind, compressor.flush())
    for file in files.values():
        file.close()
    diff_id = f"sha256:{hashes['plain'].hexdigest()}"
    return {
        kind: _Blob(paths[kind], f"sha256:{hashes[kind].hexdigest()}", diff_id, paths[kind].stat().st_size)
        for kind in FORMATS
    }


def pool() -> bytes:
    """Real contents to cut files from: sources and libraries, a megabyte of each in turn."""
    library = Path(sys.prefix, "lib")
    base = Path(sys.base_prefix, "lib")
    texts = sorted({*library.rglob("*.py"), *base.rglob("*.py")})
    binaries = sorted({*library.rglob("*.so*"), *base.rglob("*.so*"), *base.rglob("*.pyc")})
    halves = [_concatenated(paths, _POOL_BYTES // 2) for paths in (texts, binaries)]
    mixed = io.BytesIO()
    for start in range(0, _POOL_BYTES // 2, MB):
        for half in halves:
            mixed.write(half[start : start + MB])
    return mixed.getvalue()


def _concatenated(paths: list[Path], length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        before = len(content)
        for path in paths:
            if path.is_file():
                content += path.read_bytes()
            if len(content) >= length:
                break
        if len(content) == before:
            raise RuntimeError("this machine has no files to make an image of")
    return bytes(content[:length])


def tar_stream(number: int, entries: int) -> Iterator[bytes]:
    """A layer's tar: directories, files, symbolic and hard links, in the proportions of a Debian with Python."""
    source = random.Random(f"layer {number}")
    contents = pool()
    top = f"usr/lib/part{number}"
    for parent in ("usr", "usr/lib", top):
        yield _header(f"{parent}/", tarfile.DIRTYPE)
    directory = top
    last_file, last_mode = "", 0
    for entry in range(entries - 1):
        kind = source.random()
        if entry % 12 == 0:
            directory = f"{top}/package-{entry // 240:04}/module-{entry // 12:05}"
            if entry % 240 == 0:
                yield _header(f"{top}/package-{entry // 240:04}/", tarfile.DIRTYPE)
            yield _header(f"{directory}/", tarfile.DIRTYPE)
        elif kind < 0.06:
            yield _header(f"{directory}/link-{entry:06}", tarfile.SYMTYPE, link=f"../module/file-{entry:06}")
        elif kind < 0.07 and last_file:
            # a link shares its file's mode; podman gives the file the link's
            yield _header(f"{directory}/hard-{entry:06}", tarfile.LNKTYPE, mode=last_mode, link=last_file)
        else:
            size = min(int(math.exp(source.gauss(math.log(_MEDIAN_BYTES), _SIGMA))), _LARGEST)
            last_file = f"{directory}/file-{entry:06}"
            last_mode = 0o755 if kind > 0.9 else 0o644
            yield _header(last_file, tarfile.REGTYPE, size=size, mode=last_mode)
            yield from _slices(contents, source, size)
            yield bytes(-size % 512)
    yield bytes(1024)


def _slices(contents: bytes, source: random.Random, size: int) -> Iterator[bytes]:
    while size:
        start = source.randrange(len(contents))
        piece = contents[start : start + min(size, MB)]
        size -= len(piece)
        yield piece


def _header(path: str, kind: bytes, *, size: int = 0, mode: int = 0o755, link: str = "") -> bytes:
    header = tarfile.TarInfo(path)
    header.type, header.size, header.mode, header.linkname, header.mtime = (
        kind,
        size,
        mode,
        link,
        1_700_000_000,
    )
    return header.tobuf(tarfile.PAX_FORMAT)


def _push(registry: Registry, repository: str, kind: str, blobs: list[_Blob]) -> None:
    suffix = {"gzip": "+gzip", "zstd": "+zstd", "plain": ""}[kind]
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/true"]},
            "rootfs": {"type": "layers", "diff_ids": [blob.diff_id for blob in blobs]},
        }
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": f"sha256:{hashlib.sha256(config).hexdigest()}",
            "size": len(config),
        },
        "layers": [
            {
                "mediaType": f"application/vnd.oci.image.layer.v1.tar{suffix}",
                "digest": blob.digest,
                "size": blob.size,
            }
            for blob in blobs
        ],
    }
    upload = Upload(registry, repository)
    upload.blob(f"sha256:{hashlib.sha256(config).hexdigest()}", io.BytesIO(config), len(config))
    for blob in blobs:
        with blob.path.open("rb") as file:
            upload.blob(blob.digest, file, blob.size)
    upload.manifest(kind, json.dumps(manifest).encode())


class Upload:
    """Pushes to the registry, streaming."""

    def __init__(self, registry: Registry, repository: str) -> None:
        self._host = registry.host
        self._repository = repository

    def blob(self, digest: str, content: io.IOBase, size: int) -> None:
        """Push a blob."""
        status, location = self._request("POST", f"/v2/{self._repository}/blobs/uploads/")
        assert status == 202, status
        path = location.partition(self._host)[2] or location
        joint = "&" if "?" in path else "?"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        status, _ = self._request("PUT", f"{path}{joint}digest={digest}", content, headers)
        assert status == 201, status

    def manifest(self, tag: str, content: bytes) -> None:
        """Push a manifest."""
        headers = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
        status, _ = self._request(
            "PUT", f"/v2/{self._repository}/manifests/{tag}", io.BytesIO(content), headers
        )
        assert status == 201, status

    def _request(
        self,
        method: str,
        path: str,
        body: io.IOBase | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, str]:
        import http.client

        connection = http.client.HTTPConnection(self._host, timeout=300, blocksize=MB)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            response = connection.getresponse()
            response.read()
            return response.status, response.headers.get("Location", "")
        finally:
            connection.close()
