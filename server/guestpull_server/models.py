"""The nouns that every room knows: digests, descriptors, platforms, image configs, pulled images.

Names are those of the OCI image specification and of image-rs. All of it is immutable; nothing here does
I/O. `Cancellation` is the one thing with a state: how a caller that leaves is told to those who work for it.
"""

from __future__ import annotations

import hashlib
import platform as host_platform
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Self

import msgspec

from guestpull_server.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidDigest,
    InvalidPlatform,
    InvalidRequest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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


_MACHINES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
    "i386": ("386", ""),
    "ppc64le": ("ppc64le", ""),
    "s390x": ("s390x", ""),
    "riscv64": ("riscv64", ""),
    "loongarch64": ("loong64", ""),
}
_DEFAULT_VARIANTS = {"arm64": "v8", "arm": "v7", "amd64": "v1"}
_ALSO_RUNS = {"arm64": "arm", "amd64": "386"}
_LAST_CHOICE = 1_000_000
_VARIANT = re.compile(r"v([0-9]{1,4})")
_PLATFORM = re.compile(r"([a-z0-9_.-]+)/([a-z0-9_.-]+)(?:/([a-z0-9_.-]+))?")


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system and a CPU, in Go's words (GOOS, GOARCH, variant), as image indexes use them."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read `os/architecture[/variant]`.

        Raises:
            InvalidPlatform: it is not of that form.
        """
        match = _PLATFORM.fullmatch(text)
        if match is None:
            raise InvalidPlatform(text)
        return cls(match[1], match[2], match[3] or "")

    @classmethod
    def host(cls) -> Platform:
        """The platform that this process runs on."""
        machine = host_platform.machine()
        architecture, variant = _MACHINES.get(machine, (machine, ""))
        return cls("linux", architecture, variant)

    def runs(self, built_for: Platform) -> bool:
        """Whether an image is for this platform, by what its config says: the one rule, wherever it comes from.

        Variants are not compared: configs leave them out, or have them wrong, more often than not. Those of old
        images leave the architecture out as well.
        """
        also = _ALSO_RUNS.get(self.architecture)
        return built_for.os == self.os and built_for.architecture in ("", self.architecture, also)

    def distance(self, offered: Platform) -> int | None:
        """How far an offered platform is from this one: 0 is the same; None cannot run, as far as it says.

        The exact variant is nearest, then the next older one; the 32-bit sibling is the last choice. Follows
        containerd's `platforms.Only`.
        """
        if offered.os != self.os:
            return None
        if offered.architecture == self.architecture:
            return self._steps_down_to(offered)
        if offered.architecture != _ALSO_RUNS.get(self.architecture):
            return None
        newest = Platform(self.os, offered.architecture, "v8" if offered.architecture == "arm" else "")
        steps = newest._steps_down_to(offered)
        return None if steps is None else _LAST_CHOICE + steps

    def _steps_down_to(self, offered: Platform) -> int | None:
        """How much older the variant of the same architecture is; None if it is newer, or no number."""
        default = _DEFAULT_VARIANTS.get(self.architecture, "")
        ours, theirs = self.variant or default, offered.variant or default
        if ours == theirs:
            return 0
        here, there = _VARIANT.fullmatch(ours), _VARIANT.fullmatch(theirs)
        if here is None or there is None or int(there[1]) > int(here[1]):
            return None
        return int(here[1]) - int(there[1])

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A pointer to content: what it is, its digest, its length in bytes (OCI descriptor.md)."""

    media_type: str
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class LayerDescriptor:
    """One layer of a resolved image: the blob in the registry, and the tar within it."""

    blob: Descriptor
    diff_id: Digest


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """A reference after resolution: all that is needed to fetch the layers and to make the bundle.

    `config` is the image config as it was sent, to the byte; `layers` is bottom-most first; `index` is the
    outermost image index that the reference led through, to the byte; empty if none was read.
    """

    reference: str
    manifest_digest: Digest
    image_id: Digest
    config: bytes
    layers: tuple[LayerDescriptor, ...]
    index: bytes = b""


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


class Cancellation:
    """Tells those who work for a caller that it left, or that its time is up.

    Thread-safe. Callbacks run once, in the thread that cancels; one that is added too late runs at once.

    Args:
        what: what is being done, as an error would name it: "pull of docker.io/library/busybox:latest".
        deadline: `time.monotonic()` at which to give up, or None.
        request: the id of the caller's request, for the log; empty where there is none.
    """

    def __init__(self, what: str, deadline: float | None = None, *, request: str = "") -> None:
        self.request = request
        self._what = what
        self._deadline = deadline
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._callbacks: dict[object, Callable[[], None]] = {}

    def cancel(self) -> None:
        """Tell everybody. Repeating it is harmless."""
        with self._lock:
            self._cancelled.set()
            callbacks = list(self._callbacks.values())
            self._callbacks.clear()
        for callback in callbacks:
            callback()

    @property
    def cancelled(self) -> bool:
        """Whether the caller left, or its deadline passed."""
        return self._cancelled.is_set() or self.remaining() == 0

    def remaining(self) -> float | None:
        """Seconds until the deadline, at least 0; None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def check(self) -> None:
        """Do nothing as long as the caller waits.

        Raises:
            Cancelled: the caller left.
            DeadlineExceeded: its time is up.
        """
        if self._cancelled.is_set():
            raise Cancelled(self._what)
        if self.remaining() == 0:
            raise DeadlineExceeded(self._what)

    def sleep(self, seconds: float) -> None:
        """Wait, but no longer than the caller does.

        Raises:
            Cancelled: the caller left meanwhile.
            DeadlineExceeded: its time ran out meanwhile.
        """
        remaining = self.remaining()
        self._cancelled.wait(seconds if remaining is None else min(seconds, remaining))
        self.check()

    @contextmanager
    def nested(self, what: str = "", seconds: float | None = None) -> Iterator[Cancellation]:
        """A cancellation for a part of the work: it ends with this one, but not the other way round.

        Args:
            what: what is being done there; the same as here where it is empty.
            seconds: how long that part may take at most.
        """
        own = None if seconds is None else time.monotonic() + seconds
        deadlines = [deadline for deadline in (self._deadline, own) if deadline is not None]
        inner = Cancellation(what or self._what, min(deadlines, default=None), request=self.request)
        withdraw = self.on_cancel(inner.cancel)
        try:
            yield inner
        finally:
            withdraw()

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called when the caller leaves; returns what withdraws it again."""
        key = object()
        with self._lock:
            if not self._cancelled.is_set():
                self._callbacks[key] = callback
                return lambda: self._withdraw(key)
        callback()
        return lambda: None

    def _withdraw(self, key: object) -> None:
        with self._lock:
            self._callbacks.pop(key, None)
