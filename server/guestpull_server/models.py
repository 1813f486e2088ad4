"""The data types that all rooms use: digests, descriptors, image configs, pulled images.

Names follow the OCI image specification and image-rs. All types are immutable; nothing here does I/O.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Self

import msgspec

from guestpull_server.errors import InvalidDigest, InvalidRequest
from guestpull_server.platforms import Platform

if TYPE_CHECKING:
    from collections.abc import Mapping
    from hashlib import _Hash

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB

RUNTIME_CONFIG = "config.json"
"""The name of a bundle's runtime configuration (OCI runtime-spec, bundle.md)."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}")


class Digest(str):
    """A content digest, `algorithm:hex`, with an algorithm that we can verify.

    Follows the OCI image specification, "Digests". A `Digest` is a `str`, so that it can be a key of `image_db`
    and `layer_db`.

    Raises:
        InvalidDigest: the text is not such a digest.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Validate the text."""
        if _DIGEST.fullmatch(text) is None:
            raise InvalidDigest(text)
        return super().__new__(cls, text)

    @property
    def algorithm(self) -> str:
        """`sha256`, `sha384` or `sha512`."""
        return self.partition(":")[0]

    @property
    def hex(self) -> str:
        """The digest without its algorithm."""
        return self.partition(":")[2]

    @property
    def directory_name(self) -> str:
        """The name of a layer's directory in `layers/`: `sha256_<hex>`, as in image-rs."""
        return self.replace(":", "_")

    def hasher(self) -> _Hash:
        """A new hash object of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    @classmethod
    def of(cls, content: bytes) -> Digest:
        """The sha256 digest of bytes."""
        return cls(f"sha256:{hashlib.sha256(content).hexdigest()}")

    def matches(self, content: bytes) -> bool:
        """Whether the content has this digest."""
        return hashlib.new(self.algorithm, content).hexdigest() == self.hex


@dataclass(frozen=True, slots=True)
class Descriptor:
    """The media type, digest and size in bytes of a blob (OCI descriptor.md)."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class LayerDescriptor:
    """One layer of a resolved image: its blob in the registry, and the digest of the tar in the blob."""

    blob: Descriptor
    diff_id: Digest


class Origin(Enum):
    """Where a resolved image was found."""

    SOURCE = "source"
    """At its registry, or in a local file: its layers may be missing in the store."""
    STORE = "store"
    """In the store, with all of its layers. Media types and sizes of its blobs are not known."""


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """A resolved reference: everything needed to fetch the layers and create the bundle.

    Attributes:
        config: the bytes of the image config.
        layers: bottom-most first.
        index: the bytes of the outermost image index; empty if none was read.
        manifest: the bytes of the manifest; empty if the image comes from the store.
        origin: where the image was found.
        is_confirmed: whether the source confirmed that the reference names this image. False if the store found
            the image by the digest in the reference, without contacting the repository.
    """

    reference: str
    manifest_digest: Digest
    image_id: Digest
    config: bytes
    layers: tuple[LayerDescriptor, ...]
    index: bytes = b""
    manifest: bytes = b""
    origin: Origin = Origin.SOURCE
    is_confirmed: bool = True


class ImageProcess(msgspec.Struct, frozen=True, rename="pascal"):
    """The `config` object of an image config (OCI config.md): how to start a container.

    Docker writes `null` for absent or empty values; here they are None.
    """

    user: str | None = None
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    working_dir: str | None = None
    volumes: dict[str, msgspec.Raw] | None = None
    exposed_ports: dict[str, msgspec.Raw] | None = None
    labels: dict[str, str | None] | None = None
    stop_signal: str | None = None


class RootFs(msgspec.Struct, frozen=True):
    """The `rootfs` object of an image config: the diff_ids, bottom-most first."""

    diff_ids: list[str] | None = None


class ImageConfig(msgspec.Struct, frozen=True):
    """The parts of an OCI image config that we use. The store keeps the complete config as bytes.

    Any field may be `null`, as in tools written in Go.
    """

    architecture: str | None = None
    os: str | None = None
    variant: str | None = None
    os_version: str | None = msgspec.field(default=None, name="os.version")
    os_features: list[str] | None = msgspec.field(default=None, name="os.features")
    author: str | None = None
    created: str | None = None
    config: ImageProcess | None = None
    rootfs: RootFs | None = None

    @property
    def process(self) -> ImageProcess:
        """`config`, or an empty one."""
        return self.config or ImageProcess()

    @property
    def platform(self) -> Platform:
        """The platform that the image was built for; the os defaults to linux."""
        return Platform(self.os or "linux", self.architecture or "", self.variant or "")


def platform_of(config: bytes) -> Platform:
    """The platform of an image config that is known to be well-formed."""
    return msgspec.json.decode(config, type=ImageConfig).platform


class Decoder(Enum):
    """The compression of a layer's blob, in image-rs's spelling."""

    UNCOMPRESSED = "Uncompressed"
    GZIP = "Gzip"
    ZSTD = "Zstd"


@dataclass(frozen=True, slots=True)
class UnpackedLayer:
    """The result of unpacking a layer in a worker.

    Attributes:
        diff_id: digest of the tar, with the requested algorithm.
        decoder: the compression that was found in the bytes, regardless of the media type.
        size_bytes: sum of the lengths of the regular files.
        entries: number of entries of the tar.
        implied_directories: relative paths of directories without an entry in the tar. When mounted over lower
            layers, such a directory takes its attributes from the layer below, as in umoci and containerd.
        dropped_xattrs: number of extended attributes that the file system does not support.
    """

    diff_id: Digest
    decoder: Decoder
    size_bytes: int
    entries: int
    implied_directories: tuple[bytes, ...]
    dropped_xattrs: int


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer in the store: an entry of `layer_db`, and what our own metadata adds.

    For a layer that image-rs unpacked, `size_bytes` is -1 and `implied_directories` is empty.
    """

    compressed_digest: Digest
    uncompressed_digest: Digest
    decoder: Decoder
    store_path: str
    encrypted: bool = False
    size_bytes: int = -1
    implied_directories: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in the store: an entry of `image_db`. `layers` is bottom-most first.

    `references` are all its names; the first is the `reference` of image_db. `manifest_digest` is the digest of
    the manifest that lists `layers`; `other_digests` are those of other manifests of the image that its names
    refer to.
    """

    image_id: Digest
    manifest_digest: Digest
    references: tuple[str, ...]
    config: bytes
    layers: tuple[StoredLayer, ...]
    read_only_store: str = ""
    other_digests: tuple[Digest, ...] = ()
    signed: bool = False

    @property
    def manifest_digests(self) -> tuple[Digest, ...]:
        """The digests of all known manifests of the image, first the one that lists `layers`."""
        return (self.manifest_digest, *self.other_digests)


@dataclass(frozen=True, slots=True)
class PulledLayer:
    """One layer of a pull: whether it was reused, and what was downloaded."""

    compressed_digest: Digest
    uncompressed_digest: Digest
    reused: bool
    downloaded_bytes: int


@dataclass(frozen=True, slots=True)
class PulledImage:
    """The result of a pull, with the fields of PullImageResponse. `layers` is bottom-most first."""

    image_id: Digest
    manifest_digest: Digest
    reference: str
    rootfs_path: str
    layers: tuple[PulledLayer, ...]

    @property
    def downloaded_bytes(self) -> int:
        """Compressed bytes that this pull downloaded."""
        return sum(layer.downloaded_bytes for layer in self.layers)


class PullPolicy(Enum):
    """When to contact the registry; see the .proto."""

    UNSPECIFIED = 0
    ALWAYS = 1
    IF_NOT_PRESENT = 2
    NEVER = 3


@dataclass(frozen=True, slots=True)
class Credentials:
    """User and password for one registry. Never shown, logged or stored."""

    user: str
    password: str = field(repr=False)

    @classmethod
    def parse(cls, text: str, field_name: str) -> Credentials | None:
        """Parse `user:password`; None if the text is empty.

        Args:
            text: the text to parse.
            field_name: name of the field for the error, which does not repeat the text: it may be a password.

        Raises:
            InvalidRequest: the text has no user, or no colon.
        """
        if not text:
            return None
        user, colon, password = text.partition(":")
        if not colon or not user:
            raise InvalidRequest(field_name, "it has no user and password", 'Write it as "user:password".')
        return cls(user, password)


_USERINFO = re.compile(r"((?:[A-Za-z][A-Za-z0-9+.-]*://)?)(.*)@(?!sha[0-9]+[:-])", re.DOTALL)


def without_password(text: str) -> str:
    """Replace the password or token in a URL, or in a malformed URL or image name, by ***.

    Text before an @ is taken for a user and a password if it has a colon or the whole text has a scheme. Text
    before the @ of a digest is an image's name.
    """
    found = _USERINFO.match(text)
    if found is None:
        return text
    scheme, userinfo = found.groups()
    user, colon, _ = userinfo.partition(":")
    if not colon and not scheme:
        return text
    return f"{scheme}{f'{user}:' if colon else ''}***@{text[found.end() :]}"
