"""Builds small real images in memory, for a simulator or a registry.

    base = layer(directory("etc"), file("etc/hostname", b"guest\n"), symlink("bin", "usr/bin"))
    top = layer(whiteout("etc/hostname"), *files("srv", count=100), compression="zstd")
    shop = image(base, top, process={"Cmd": ["/bin/sh"]})
    both = index(shop, image(base, platform="linux/arm64/v8"))

    push("http://127.0.0.1:5000", "shop", "1.0", both)   # to any registry that speaks HTTP
    shop.digest, shop.image_id, base.digest, base.diff_id    # the expected result of a pull

Everything is deterministic: the same lines give the same digests. A test overrides what is to be wrong with an
image (a media type, a size, a diff_id) where it builds the image.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import random
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from urllib.parse import quote, urlsplit

import zstandard

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Compression: TypeAlias = Literal["gzip", "zstd", "none"]
TarFormat: TypeAlias = Literal[0, 1, 2]  # tarfile.USTAR_FORMAT, GNU_FORMAT, PAX_FORMAT

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"


def sha256(content: bytes) -> str:
    """The SHA-256 digest of bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


# -- tar entries -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One entry of a layer's tar."""

    header: tarfile.TarInfo
    content: bytes = b""


@dataclass(frozen=True)
class RawTar:
    """Raw bytes between entries of the tar, for headers that tarfile would not write."""

    content: bytes


def entry(
    path: str,
    kind: bytes,
    *,
    content: bytes = b"",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: float = 0,
    link: str = "",
    device: tuple[int, int] = (0, 0),
    pax: Mapping[str, str] | None = None,
) -> Entry:
    """An entry of any kind. `mtime` is in seconds; `pax` are extended header records."""
    header = tarfile.TarInfo(path)
    header.type = kind
    header.size = len(content)
    header.mode = mode
    header.uid, header.gid = uid, gid
    header.mtime = mtime
    header.linkname = link
    header.devmajor, header.devminor = device
    header.pax_headers = dict(pax or {})
    return Entry(header, content)


def file(
    path: str,
    content: bytes = b"",
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: float = 0,
    pax: Mapping[str, str] | None = None,
) -> Entry:
    """A regular file."""
    return entry(path, tarfile.REGTYPE, content=content, mode=mode, uid=uid, gid=gid, mtime=mtime, pax=pax)


def sparse_file(path: str, segments: Mapping[int, bytes], size: int) -> Entry:
    """A sparse file in GNU tar's pax format 1.0; `contents` maps offsets to bytes."""
    lines = [len(segments), *(number for at, content in segments.items() for number in (at, len(content)))]
    listed = "".join(f"{line}\n" for line in lines).encode()
    records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
    stored = listed + bytes(-len(listed) % tarfile.BLOCKSIZE) + b"".join(segments.values())
    return file(path, stored, pax=records)


def directory(
    path: str,
    *,
    mode: int = 0o755,
    uid: int = 0,
    gid: int = 0,
    mtime: float = 0,
    pax: Mapping[str, str] | None = None,
) -> Entry:
    """A directory."""
    return entry(path, tarfile.DIRTYPE, mode=mode, uid=uid, gid=gid, mtime=mtime, pax=pax)


def symlink(path: str, target: str, *, uid: int = 0, gid: int = 0, mtime: float = 0) -> Entry:
    """A symbolic link."""
    return entry(path, tarfile.SYMTYPE, link=target, mode=0o777, uid=uid, gid=gid, mtime=mtime)


def hardlink(path: str, target: str) -> Entry:
    """A hard link to an earlier entry."""
    return entry(path, tarfile.LNKTYPE, link=target)


def device(path: str, kind: Literal["char", "block"], major: int, minor: int, *, mode: int = 0o600) -> Entry:
    """A device node."""
    return entry(
        path, tarfile.CHRTYPE if kind == "char" else tarfile.BLKTYPE, device=(major, minor), mode=mode
    )


def fifo(path: str, *, mode: int = 0o644) -> Entry:
    """A named pipe."""
    return entry(path, tarfile.FIFOTYPE, mode=mode)


def whiteout(path: str) -> Entry:
    """A whiteout, which deletes `path` of the layers below (OCI layer.md, "Whiteouts")."""
    parent, _, name = path.rpartition("/")
    return file(f"{parent}/.wh.{name}" if parent else f".wh.{name}")


def opaque(path: str) -> Entry:
    """An opaque whiteout, which hides the entries that the layers below have in the directory `path`."""
    return file(f"{path}/.wh..wh..opq")


def files(parent: str, *, count: int, size: int = 1000, seed: int = 0) -> list[Entry]:
    """A directory of `count` files of `size` incompressible bytes each."""
    source = random.Random(f"{parent}/{seed}")  # reproducible
    made = [directory(parent)]
    made += [file(f"{parent}/{number:06}", source.randbytes(size)) for number in range(count)]
    return made


def tar_of(entries: Sequence[Entry | RawTar], *, tar_format: TarFormat = tarfile.PAX_FORMAT) -> bytes:
    """A tar with these entries, in order."""
    output = io.BytesIO()
    for one in entries:
        if isinstance(one, RawTar):
            output.write(one.content)
            continue
        output.write(one.header.tobuf(tar_format, "utf-8", "surrogateescape"))
        output.write(one.content)
        output.write(bytes(-len(one.content) % tarfile.BLOCKSIZE))
    output.write(bytes(2 * tarfile.BLOCKSIZE))
    output.write(bytes(-output.tell() % tarfile.RECORDSIZE))
    return output.getvalue()


# -- layers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer: its tar, its blob in a registry, and its descriptor in a manifest."""

    tar: bytes = field(repr=False)
    blob: bytes = field(repr=False)
    media_type: str

    @property
    def digest(self) -> str:
        """The compressed digest."""
        return sha256(self.blob)

    @property
    def diff_id(self) -> str:
        """The uncompressed digest."""
        return sha256(self.tar)

    @property
    def size(self) -> int:
        """Size of the blob in bytes."""
        return len(self.blob)

    @property
    def descriptor(self) -> dict[str, Json]:
        """Its descriptor in a manifest."""
        return descriptor(self.blob, self.media_type)


def compress(content: bytes, compression: Compression, *, members: int = 1) -> bytes:
    """Compress; `members` is the number of gzip members or zstd frames."""
    if compression == "none":
        return content
    step = max(1, -(-len(content) // members))
    parts = [content[start : start + step] for start in range(0, max(1, len(content)), step)]
    if compression == "zstd":
        return b"".join(zstandard.ZstdCompressor(level=1).compress(part) for part in parts)
    return b"".join(gzip.compress(part, compresslevel=1, mtime=0) for part in parts)


def layer(
    *entries: Entry | RawTar,
    compression: Compression = "gzip",
    members: int = 1,
    media_type: str | None = None,
    tar_format: TarFormat = tarfile.PAX_FORMAT,
) -> Layer:
    """A layer with these entries."""
    return layer_of_tar(
        tar_of(entries, tar_format=tar_format),
        compression=compression,
        members=members,
        media_type=media_type,
    )


def layer_of_tar(
    tar: bytes, *, compression: Compression = "gzip", members: int = 1, media_type: str | None = None
) -> Layer:
    """A layer from the bytes of a tar, or from any other bytes."""
    suffix = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}[compression]
    return Layer(tar, compress(tar, compression, members=members), media_type or OCI_LAYER + suffix)


# -- images --------------------------------------------------------------------------------------------------


def descriptor(content: bytes, media_type: str, **more: Json) -> dict[str, Json]:
    """A descriptor of content; `more` adds or overrides keys."""
    return {"mediaType": media_type, "digest": sha256(content), "size": len(content), **more}


@dataclass(frozen=True)
class Image:
    """A manifest and its blobs, as the bytes that a registry sends."""

    layers: tuple[Layer, ...]
    config: bytes = field(repr=False)
    manifest: bytes = field(repr=False)
    media_type: str
    platform: str

    @property
    def digest(self) -> str:
        """The digest of the manifest."""
        return sha256(self.manifest)

    @property
    def image_id(self) -> str:
        """The config's digest."""
        return sha256(self.config)

    @property
    def blobs(self) -> dict[str, bytes]:
        """All blobs, by digest."""
        return {self.image_id: self.config} | {one.digest: one.blob for one in self.layers}

    @property
    def manifests(self) -> list[tuple[str, bytes]]:
        """Media type and bytes of all manifests; the tag refers to the last one."""
        return [(self.media_type, self.manifest)]

    @property
    def diff_ids(self) -> list[str]:
        """The uncompressed digests, bottom-most first."""
        return [one.diff_id for one in self.layers]


@dataclass(frozen=True)
class Index:
    """An image index or manifest list, and the images in it."""

    images: tuple[Image | Index, ...]
    manifest: bytes = field(repr=False)
    media_type: str

    @property
    def digest(self) -> str:
        """The index's digest."""
        return sha256(self.manifest)

    @property
    def blobs(self) -> dict[str, bytes]:
        """The blobs of all images."""
        return {digest: blob for one in self.images for digest, blob in one.blobs.items()}

    @property
    def manifests(self) -> list[tuple[str, bytes]]:
        """Media type and bytes of all manifests; the tag refers to the last one."""
        return [found for one in self.images for found in one.manifests] + [(self.media_type, self.manifest)]


def image(
    *layers: Layer,
    docker: bool = False,
    platform: str = "linux/amd64",
    process: Mapping[str, Json] | None = None,
    config: Mapping[str, Json] | bytes | None = None,
    config_media_type: str | None = None,
    manifest: Mapping[str, Json] | None = None,
) -> Image:
    """An image of these layers, bottom-most first.

    Args:
        layers: bottom-most first.
        docker: use Docker schema 2 media types instead of OCI's. Layers keep an overridden type.
        platform: os/architecture[/variant], for the config and for an index with this image.
        process: the config's `config` object: User, Env, Entrypoint, Cmd and so on.
        config: keys to add to or override in the config; bytes replace it completely.
        config_media_type: media type of the config's descriptor.
        manifest: keys to add to or override in the manifest.
    """
    if docker:
        layers = tuple(_as_docker(one) for one in layers)
    config_bytes = config if isinstance(config, bytes) else _config(layers, platform, process, config)
    config_type = config_media_type or (DOCKER_CONFIG if docker else OCI_CONFIG)
    media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
    content: dict[str, Json] = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": descriptor(config_bytes, config_type),
        "layers": [one.descriptor for one in layers],
        **(manifest or {}),
    }
    return Image(layers, config_bytes, _encode(content), media_type, platform)


def index(
    *images: Image | Index,
    docker: bool = False,
    entries: Sequence[Json] | None = None,
    manifest: Mapping[str, Json] | None = None,
) -> Index:
    """An index of these images, with the platform of each.

    Args:
        images: the images to list.
        docker: build a Docker manifest list.
        entries: descriptors to use instead of the images' own; see `index_entry`.
        manifest: keys to add to or override in the index.
    """
    media_type = DOCKER_LIST if docker else OCI_INDEX
    content: dict[str, Json] = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "manifests": [index_entry(one) for one in images] if entries is None else entries,
        **(manifest or {}),
    }
    return Index(images, _encode(content), media_type)


def index_entry(listed: Image | Index, **more: Json) -> dict[str, Json]:
    """The descriptor of an image in an index; `more` adds or overrides keys."""
    platform: dict[str, Json] = {}
    if isinstance(listed, Image):
        keys = ("os", "architecture", "variant")
        platform = {"platform": dict(zip(keys, listed.platform.split("/"), strict=False))}
    return descriptor(listed.manifest, listed.media_type, **(platform | more))


def _as_docker(one: Layer) -> Layer:
    docker_types = {OCI_LAYER: DOCKER_LAYER, f"{OCI_LAYER}+gzip": f"{DOCKER_LAYER}.gzip"}
    return Layer(one.tar, one.blob, docker_types.get(one.media_type, one.media_type))


def _config(
    layers: Sequence[Layer],
    platform: str,
    process: Mapping[str, Json] | None,
    overrides: Mapping[str, Json] | None,
) -> bytes:
    operating_system, architecture, *variant = platform.split("/")
    content: dict[str, Json] = {
        "architecture": architecture,
        "os": operating_system,
        "config": process or {},
        "rootfs": {"type": "layers", "diff_ids": [one.diff_id for one in layers]},
        "history": [{"created_by": f"layer {number}"} for number, _ in enumerate(layers)],
    }
    if variant:
        content["variant"] = variant[0]
    return _encode(content | dict(overrides or {}))


def _encode(content: Mapping[str, Json]) -> bytes:
    return json.dumps(content, indent=2).encode()


# -- to a registry -------------------------------------------------------------------------------------------


def push(base_url: str, repository: str, tag: str, pushed: Image | Index) -> str:
    """Push an image or an index to a registry over plain HTTP; return its reference.

    Blobs that the registry has are not sent again (distribution specification, "Pushing").
    """
    url = urlsplit(base_url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=60)
    try:
        for digest, blob in pushed.blobs.items():
            _push_blob(connection, repository, digest, blob)
        *inner, (media_type, outermost) = pushed.manifests
        for inner_type, content in inner:
            _put_manifest(connection, repository, sha256(content), inner_type, content)
        _put_manifest(connection, repository, tag, media_type, outermost)
    finally:
        connection.close()
    return f"{url.netloc}/{repository}:{tag}"


def _push_blob(connection: http.client.HTTPConnection, repository: str, digest: str, blob: bytes) -> None:
    if _exchange(connection, "HEAD", f"/v2/{repository}/blobs/{digest}")[0] == http.HTTPStatus.OK:
        return
    status, location = _exchange(connection, "POST", f"/v2/{repository}/blobs/uploads/")
    if status != http.HTTPStatus.ACCEPTED:
        raise OSError(f"the registry does not take uploads: {status}")
    upload = urlsplit(location)
    query = f"{upload.query}&digest={quote(digest)}" if upload.query else f"digest={quote(digest)}"
    headers = {"Content-Type": "application/octet-stream"}
    status, _ = _exchange(connection, "PUT", f"{upload.path}?{query}", blob, headers)
    if status != http.HTTPStatus.CREATED:
        raise OSError(f"the registry does not take blob {digest}: {status}")


def _put_manifest(
    connection: http.client.HTTPConnection, repository: str, name: str, media_type: str, content: bytes
) -> None:
    path = f"/v2/{repository}/manifests/{name}"
    status, _ = _exchange(connection, "PUT", path, content, {"Content-Type": media_type})
    if status != http.HTTPStatus.CREATED:
        raise OSError(f"the registry does not take manifest {name}: {status}")


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    connection.request(method, path, body=body or None, headers=dict(headers or {}))
    response = connection.getresponse()
    response.read()
    return response.status, response.headers.get("Location", "")
