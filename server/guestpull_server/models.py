"""The nouns that every room knows: digests, descriptors, image configs, pulled images.

Names are those of the OCI image specification and of image-rs. All of it is immutable; nothing here does I/O.
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
"""What a bundle's runtime configuration is called (OCI runtime-spec, bundle.md)."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}")


class Digest(str):
    """A content digest, `algorithm:hex`, of an algorithm that we can verify.

    Follows the OCI image specification, "Digests". A `Digest` is a `str`: it is a key of `image_db` and
    `layer_db` as it stands.

    Raises:
        InvalidDigest: the text is no such digest.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Check the text, and wrap it."""
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
        """The name of a layer's directory in `layers/`: `sha256_<hex>`, as image-rs wrote it."""
        return self.replace(":", "_")

    def hasher(self) -> _Hash:
        """A new hash object of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    @classmethod
    def of(cls, content: bytes) -> Digest:
        """The sha256 digest of some bytes."""
        return cls(f"sha256:{hashlib.sha256(content).hexdigest()}")

    def matches(self, content: bytes) -> bool:
        """Whether these bytes have this digest."""
        return hashlib.new(self.algorithm, content).hexdigest() == self.hex


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A pointer to content: its media type, digest and length in bytes (OCI descriptor.md)."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class LayerDescriptor:
    """One layer of a resolved image: the blob in the registry, and the tar within it."""

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
    """A resolved reference: all that is needed to fetch the layers and to create the bundle.

    Attributes:
        config: the image config, byte for byte.
        layers: bottom-most first.
        index: the outermost image index that led here, byte for byte; empty if none was read.
        manifest: the manifest, byte for byte; empty if the image comes from the store.
        origin: where it was found.
        is_confirmed: whether its source says that the image has this reference. It does not if the store has found
            the image by the digest in the reference: nobody has asked the repository.
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
    """The `config` object of an image config (OCI config.md): how its container is to be started.

    Docker writes `null` where the specification has an absent or empty value; both are None here.
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
    """The parts of an OCI image config that we act on. The store keeps the whole of it, as raw bytes.

    Any of them may be `null`, as for every tool that reads it in Go.
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
        """What the image was built for; an image that does not say so is for linux."""
        return Platform(self.os or "linux", self.architecture or "", self.variant or "")


def platform_of(config: bytes) -> Platform:
    """What the image of a config was built for; the config has been read before."""
    return msgspec.json.decode(config, type=ImageConfig).platform


class Decoder(Enum):
    """How a layer's blob was compressed, in image-rs's spelling."""

    UNCOMPRESSED = "Uncompressed"
    GZIP = "Gzip"
    ZSTD = "Zstd"


@dataclass(frozen=True, slots=True)
class UnpackedLayer:
    """What a layer worker found in the layer that it unpacked.

    Attributes:
        diff_id: digest of the tar, by the algorithm that was asked for.
        decoder: what the bytes were, whatever the media type said.
        size_bytes: the sum of its regular files' lengths.
        entries: how many entries the tar had.
        implied_directories: paths, relative and without a leading slash, of directories that had to be
            made though the tar has no entry for them. When mounted over lower layers, such a directory
            takes its attributes from the layer below (as umoci and containerd do).
        dropped_xattrs: how many extended attributes the file system could not hold.
    """

    diff_id: Digest
    decoder: Decoder
    size_bytes: int
    entries: int
    implied_directories: tuple[bytes, ...]
    dropped_xattrs: int


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer that the store has: an entry of `layer_db`, and what only we know of it.

    `size_bytes` is -1 and `implied_directories` empty for a layer that image-rs unpacked.
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
    """An image that the store has: an entry of `image_db`. `layers` is bottom-most first.

    `references` are all its names; the first is the `reference` of image_db. `manifest_digest` is that of the form
    that its layers have; `other_digests` are those of forms that it had before, and has names of.
    """

    image_id: Digest
    manifest_digest: Digest
    references: tuple[str, ...]
    config: bytes
    layers: tuple[StoredLayer, ...]
    read_only_store: str = ""
    other_digests: tuple[Digest, ...] = ()

    @property
    def manifest_digests(self) -> tuple[Digest, ...]:
        """The digests of all manifests that are known to be its, that of its layers first."""
        return (self.manifest_digest, *self.other_digests)


@dataclass(frozen=True, slots=True)
class PulledLayer:
    """What one layer cost a pull."""

    compressed_digest: Digest
    uncompressed_digest: Digest
    reused: bool
    downloaded_bytes: int


@dataclass(frozen=True, slots=True)
class PulledImage:
    """The result of a pull: PullImageResponse's fields. `layers` is bottom-most first."""

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
    """When the registry is asked; see the .proto."""

    UNSPECIFIED = 0
    ALWAYS = 1
    IF_NOT_PRESENT = 2
    NEVER = 3


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and a password for one registry. Never shown, logged or stored."""

    user: str
    password: str = field(repr=False)

    @classmethod
    def parse(cls, text: str, field_name: str) -> Credentials | None:
        """Read `user:password`; None where the text is empty.

        Args:
            text: what was given.
            field_name: where, for the error: it does not repeat the text, which may be a password.

        Raises:
            InvalidRequest: it has no user, or no colon.
        """
        if not text:
            return None
        user, colon, password = text.partition(":")
        if not colon or not user:
            raise InvalidRequest(field_name, "it has no user and password", 'Write it as "user:password".')
        return cls(user, password)


_USERINFO = re.compile(r"((?:[A-Za-z][A-Za-z0-9+.-]*://)?)(.*)@(?!sha[0-9]+[:-])", re.DOTALL)


def without_password(text: str) -> str:
    """A URL, or what somebody wrote for one or for an image, with *** in the place of a password or token.

    What is before an @ is a user and a password, if it has a colon, or the text a scheme; but before a digest it
    is an image's name.
    """
    found = _USERINFO.match(text)
    if found is None:
        return text
    scheme, userinfo = found.groups()
    user, colon, _ = userinfo.partition(":")
    if not colon and not scheme:
        return text
    return f"{scheme}{f'{user}:' if colon else ''}***@{text[found.end() :]}"
