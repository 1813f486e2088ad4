"""Every error that a user of guestpull can meet, each explaining itself to a person.

One base class. A class carries its facts as fields, its gRPC status and its stable `reason` as class
attributes, and renders one sentence of what happened and one of what to do about it. Nobody formats
messages elsewhere, and nobody catches an error to re-word it. The service maps `status` and `reason` to
the wire (`service/status.py`); the table in README.md lists them.

No field ever holds a password or a token.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator


class Status(Enum):
    """The gRPC status codes that we answer with, by name; the core itself does not load gRPC."""

    CANCELLED = "CANCELLED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"


@dataclass(eq=False)
class GuestpullError(Exception):
    """Base of all errors that are raised on purpose.

    Subclasses are dataclasses; `str(error)` is `explain()`.
    """

    status: ClassVar[Status] = Status.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def explain(self) -> str:
        """One sentence of what happened, one of what to do."""
        raise NotImplementedError

    def facts(self) -> dict[str, str]:
        """The fields as text, for ErrorInfo's metadata."""
        return {field.name: _as_text(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        return self.explain()


def _as_text(fact: object) -> str:
    return ", ".join(str(one) for one in fact) if isinstance(fact, tuple) else str(fact)


# -- the request ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class InvalidReference(GuestpullError):
    """A reference that the distribution grammar does not allow."""

    status, reason = Status.INVALID_ARGUMENT, "INVALID_REFERENCE"
    reference: str
    problem: str

    def explain(self) -> str:
        return (
            f"{self.reference!r} is no image reference: {self.problem}. "
            "Write it as [host[:port]/]name[:tag][@sha256:digest]."
        )


@dataclass(eq=False)
class InvalidDigest(GuestpullError):
    """A text that is no digest as the OCI image specification defines it."""

    status, reason = Status.INVALID_ARGUMENT, "INVALID_DIGEST"
    digest: str

    def explain(self) -> str:
        return f"{self.digest!r} is no digest. Write it as sha256: and 64 lower-case hex digits."


@dataclass(eq=False)
class InvalidPlatform(GuestpullError):
    """A platform that is not written as os/architecture[/variant]."""

    status, reason = Status.INVALID_ARGUMENT, "INVALID_PLATFORM"
    platform: str

    def explain(self) -> str:
        return (
            f"{self.platform!r} is no platform. Write it as os/architecture[/variant], e.g. linux/arm64/v8."
        )


@dataclass(eq=False)
class InvalidRequest(GuestpullError):
    """A field of a request that cannot be used as it is."""

    status, reason = Status.INVALID_ARGUMENT, "INVALID_REQUEST"
    field: str
    problem: str
    remedy: str

    def explain(self) -> str:
        return f"{self.field}: {self.problem}. {self.remedy}"


@dataclass(eq=False)
class InvalidBundlePath(GuestpullError):
    """A bundle path that is not absolute, cannot be a directory, or lies outside the allowed roots."""

    status, reason = Status.INVALID_ARGUMENT, "INVALID_BUNDLE_PATH"
    bundle_path: str
    problem: str

    def explain(self) -> str:
        return (
            f"bundle path {self.bundle_path!r}: {self.problem}. "
            "Name an absolute directory that the service may write to (its configuration has bundle_roots)."
        )


@dataclass(eq=False)
class BundleExists(GuestpullError):
    """The bundle is in use: it holds a config.json or a root filesystem, or another pull is making it."""

    status, reason = Status.ALREADY_EXISTS, "BUNDLE_EXISTS"
    bundle_path: str
    found: str

    def explain(self) -> str:
        return (
            f"bundle {self.bundle_path}: {self.found}. "
            "Release the bundle first (guestpull release), or choose another directory."
        )


@dataclass(eq=False)
class CallerNotAllowed(GuestpullError):
    """A user of this machine who may not call this service."""

    status, reason = Status.PERMISSION_DENIED, "CALLER_NOT_ALLOWED"

    def explain(self) -> str:
        return (
            "this user may not call guestpulld. "
            "Call it as the user that it runs as, or have allowed_uids in its configuration name this one."
        )


# -- the registry -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class ImageNotFound(GuestpullError):
    """The registry has no such repository, tag or manifest."""

    status, reason = Status.NOT_FOUND, "IMAGE_NOT_FOUND"
    reference: str
    host: str
    answer: str

    def explain(self) -> str:
        return (
            f"{self.reference}: {self.host} has no such image ({self.answer}). "
            "Check the name and the tag; a private repository may also answer so to the wrong credentials."
        )


@dataclass(eq=False)
class NotInFile(ImageNotFound):
    """A local image's file or directory has no image of that name."""

    status, reason = Status.NOT_FOUND, "IMAGE_NOT_IN_FILE"
    names: str

    def explain(self) -> str:
        has = f"its images are {self.names}" if self.names else "its images have no names"
        return f"{self.reference}: {self.host} has no such image ({self.answer}); {has}. Name one of these."


@dataclass(eq=False)
class NotAtRegistry(GuestpullError):
    """An image of the store that its registry does not have: what is wrong with it cannot be downloaded again."""

    status, reason = Status.NOT_FOUND, "NOT_AT_REGISTRY"
    image: str
    manifest_digest: str

    def explain(self) -> str:
        return (
            f"image {self.image}: no registry has its manifest {self.manifest_digest}. "
            "If it was baked from a file: bake it again, which mends it; otherwise remove it."
        )


@dataclass(eq=False)
class BlobNotFound(GuestpullError):
    """The registry has the manifest, but not a blob that it names."""

    status, reason = Status.NOT_FOUND, "BLOB_NOT_FOUND"
    reference: str
    digest: str
    host: str

    def explain(self) -> str:
        return (
            f"{self.reference}: {self.host} has no blob {self.digest}, which the manifest names. "
            "Push the image again; the registry's copy is incomplete."
        )


@dataclass(eq=False)
class ImageNotPresent(GuestpullError):
    """The store has no such image, and the registry was not to be asked."""

    status, reason = Status.NOT_FOUND, "IMAGE_NOT_PRESENT"
    image: str

    def explain(self) -> str:
        return (
            f"the store has no image {self.image}. "
            "`guestpull images` lists what is there; pull it with another policy than NEVER."
        )


@dataclass(eq=False)
class AmbiguousImage(GuestpullError):
    """A shortened image id that several images begin with."""

    status, reason = Status.INVALID_ARGUMENT, "AMBIGUOUS_IMAGE"
    image: str
    matches: int

    def explain(self) -> str:
        return f"image id {self.image} fits {self.matches} images. Give more digits of it."


@dataclass(eq=False)
class Unauthenticated(GuestpullError):
    """The registry or its token server wants credentials, or refuses those that were sent."""

    status, reason = Status.UNAUTHENTICATED, "UNAUTHENTICATED"
    reference: str
    host: str
    with_credentials: bool

    def explain(self) -> str:
        if self.with_credentials:
            return (
                f"{self.reference}: {self.host} refuses the credentials. "
                "Check user and password in auth_info."
            )
        return f'{self.reference}: {self.host} wants credentials. Pass auth_info as "user:password".'


@dataclass(eq=False)
class AccessDenied(GuestpullError):
    """The registry knows who asks and does not allow it."""

    status, reason = Status.PERMISSION_DENIED, "ACCESS_DENIED"
    reference: str
    host: str

    def explain(self) -> str:
        return (
            f"{self.reference}: {self.host} denies access. "
            "Ask its owner for the right to pull from this repository."
        )


@dataclass(eq=False)
class RegistryBlocked(GuestpullError):
    """The registry configuration blocks this registry."""

    status, reason = Status.PERMISSION_DENIED, "REGISTRY_BLOCKED"
    reference: str
    prefix: str

    def explain(self) -> str:
        return (
            f"{self.reference}: the registry configuration blocks {self.prefix}. "
            "Pull from another registry, or remove `blocked` from that entry of registry_config."
        )


@dataclass(eq=False)
class RegistryUnavailable(GuestpullError):
    """The registry does not answer, or answers nonsense, after all retries."""

    status, reason = Status.UNAVAILABLE, "REGISTRY_UNAVAILABLE"
    reference: str
    host: str
    problem: str
    attempts: int

    def explain(self) -> str:
        tries = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return (
            f"{self.reference}: {self.host} cannot be used ({self.problem}; {tries}). "
            "Check that it runs and can be reached from here, then pull again."
        )


@dataclass(eq=False)
class RateLimited(GuestpullError):
    """The registry's rate limit is used up, and did not recover within the retries."""

    status, reason = Status.UNAVAILABLE, "RATE_LIMITED"
    reference: str
    host: str
    retry_after: str

    def explain(self) -> str:
        when = f" in {self.retry_after} seconds" if self.retry_after else " later"
        return (
            f"{self.reference}: {self.host} limits the rate of requests (429). Pull again{when}, or log in."
        )


# -- what the registry sent ---------------------------------------------------------------------------------


@dataclass(eq=False)
class UnsupportedImage(GuestpullError):
    """What the reference names is no image that can be run here; `found` says what it is."""

    status, reason = Status.FAILED_PRECONDITION, "UNSUPPORTED_IMAGE"
    reference: str
    found: str

    def explain(self) -> str:
        return (
            f"{self.reference} cannot be run here: {self.found}. "
            "Name a Linux container image (OCI, or Docker schema 2)."
        )


@dataclass(eq=False)
class NoMatchingPlatform(GuestpullError):
    """The index has no manifest for the wanted platform."""

    status, reason = Status.FAILED_PRECONDITION, "NO_MATCHING_PLATFORM"
    reference: str
    platform: str
    available: str

    def explain(self) -> str:
        return (
            f"{self.reference} has no image for {self.platform}; it has {self.available or 'none at all'}. "
            "Ask for one of these platforms."
        )


@dataclass(eq=False)
class InvalidManifest(GuestpullError):
    """A manifest, index or config that is not as its specification says."""

    status, reason = Status.DATA_LOSS, "INVALID_MANIFEST"
    reference: str
    digest: str
    problem: str

    def explain(self) -> str:
        return (
            f"{self.reference}: {self.digest} cannot be read: {self.problem}. "
            "Build or push the image again with a tool that follows the OCI image specification."
        )


@dataclass(eq=False)
class DigestMismatch(GuestpullError):
    """Bytes whose digest is not the one that names them."""

    status, reason = Status.DATA_LOSS, "DIGEST_MISMATCH"
    what: str
    expected: str
    actual: str
    source: str

    def explain(self) -> str:
        return (
            f"{self.what} {self.expected}: {self.source} gave bytes whose digest is {self.actual}. "
            "Pull again; if it persists, the registry or a proxy in between alters the data."
        )


@dataclass(eq=False)
class SizeMismatch(GuestpullError):
    """A blob or manifest whose length is not the one its descriptor gives."""

    status, reason = Status.DATA_LOSS, "SIZE_MISMATCH"
    what: str
    expected_bytes: int
    actual_bytes: int
    source: str

    def explain(self) -> str:
        return (
            f"{self.what}: {self.source} gave {self.actual_bytes} bytes where its descriptor says "
            f"{self.expected_bytes}. Pull again; if it persists, push the image again."
        )


@dataclass(eq=False)
class LayerChanged(GuestpullError):
    """A layer of a read-only store is not what its diff_id says."""

    status, reason = Status.DATA_LOSS, "LAYER_CHANGED"
    layer: str
    store_path: str
    change: str

    def explain(self) -> str:
        return (
            f"layer {self.layer} at {self.store_path} is not what its image says ({self.change}). "
            "Make that store again; `guestpulld verify --deep` on it lists all that was changed."
        )


@dataclass(eq=False)
class ImageChanged(GuestpullError):
    """What a store has of an image is not what the image's id says."""

    status, reason = Status.DATA_LOSS, "IMAGE_CHANGED"
    image: str
    store: str
    change: str

    def explain(self) -> str:
        return (
            f"image {self.image} of {self.store} is not what its id says ({self.change}). "
            "Run `guestpulld verify --deep --repair` on that store, or make it again."
        )


@dataclass(eq=False)
class CorruptLayer(GuestpullError):
    """A layer that cannot be decompressed, or whose tar cannot be read or unpacked."""

    status, reason = Status.DATA_LOSS, "CORRUPT_LAYER"
    layer: str
    problem: str

    def explain(self) -> str:
        return (
            f"layer {self.layer} cannot be unpacked: {self.problem}. Build the image again; nothing was kept."
        )


@dataclass(eq=False)
class LimitExceeded(GuestpullError):
    """An image that costs more than the configured limits allow."""

    status, reason = Status.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED"
    what: str
    limit: str
    allowed: int

    def explain(self) -> str:
        return (
            f"{self.what} exceeds limits.{self.limit} ({self.allowed}). "
            "If you trust the image, raise that limit in the configuration."
        )


# -- this machine -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class StorageFull(GuestpullError):
    """The file system of the work directory or of the bundle has no room (ENOSPC, EDQUOT)."""

    status, reason = Status.RESOURCE_EXHAUSTED, "STORAGE_FULL"
    doing: str
    path: str

    def explain(self) -> str:
        return (
            f"{self.doing}: no space left on the file system of {self.path}. "
            "Make room (guestpull rmi, guestpulld gc) and pull again; nothing was kept of this pull."
        )


@dataclass(eq=False)
class StorageFailed(GuestpullError):
    """The operating system refused a step on the work directory or the bundle."""

    status, reason = Status.INTERNAL, "STORAGE_FAILED"
    doing: str
    path: str
    problem: str

    def explain(self) -> str:
        return (
            f"{self.doing}: {self.path}: {self.problem}. "
            "Check that the file system is there, writable and healthy."
        )


@contextmanager
def storage_errors(doing: str, path: str | bytes) -> Iterator[None]:
    """Turn an OSError of the steps within into the error that a user can act on.

    Args:
        doing: what is being done, as an error would begin: "committing layer sha256:…".
        path: what it is done to; the path that the operating system names wins over it.

    Raises:
        StorageFull: ENOSPC or EDQUOT.
        StorageFailed: any other OSError.
    """
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str | bytes) else path
        where = os.fsdecode(named)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(doing, where) from error
        raise StorageFailed(doing, where, error.strerror or str(error)) from error


@dataclass(eq=False)
class MountFailed(GuestpullError):
    """The kernel refused the overlay mount."""

    status, reason = Status.FAILED_PRECONDITION, "MOUNT_FAILED"
    rootfs: str
    problem: str
    remedy: str

    def explain(self) -> str:
        return f"{self.rootfs} cannot be mounted: {self.problem}. {self.remedy}"


@dataclass(eq=False)
class WorkerFailed(GuestpullError):
    """A layer worker died without saying why, or of an error that it does not know."""

    status, reason = Status.INTERNAL, "WORKER_FAILED"
    layer: str
    problem: str
    remedy: str = "look for out-of-memory kills in the kernel's log"

    def explain(self) -> str:
        return (
            f"layer {self.layer}: its layer worker {self.problem}. Pull again; if it persists, {self.remedy}."
        )


@dataclass(eq=False)
class TooManyPulls(GuestpullError):
    """The queue of pulls is full."""

    status, reason = Status.RESOURCE_EXHAUSTED, "TOO_MANY_PULLS"
    limit: int

    def explain(self) -> str:
        return (
            f"{self.limit} pulls are under way or waiting already (limits.max_queued_pulls). Try again later."
        )


@dataclass(eq=False)
class ImageInUse(GuestpullError):
    """Bundles use the image that is to be removed."""

    status, reason = Status.FAILED_PRECONDITION, "IMAGE_IN_USE"
    image: str
    bundles: tuple[str, ...]

    def explain(self) -> str:
        return (
            f"{self.image} is used by {', '.join(self.bundles)}. "
            "Release these first, or use force: then its layers go with the last of them."
        )


@dataclass(eq=False)
class LayerInUse(GuestpullError):
    """A layer that is to be replaced is mounted, or a pull needs it."""

    status, reason = Status.FAILED_PRECONDITION, "LAYER_IN_USE"
    layer: str
    bundles: tuple[str, ...]

    def explain(self) -> str:
        users = ", ".join(self.bundles) or "a pull that is under way"
        return (
            f"layer {self.layer} is used by {users}, and cannot be replaced now. Release it, then try again."
        )


@dataclass(eq=False)
class ReadOnlyImage(GuestpullError):
    """The image lies in a read-only store."""

    status, reason = Status.FAILED_PRECONDITION, "READ_ONLY_IMAGE"
    image: str
    store: str

    def explain(self) -> str:
        return f"{self.image} lies in the read-only store {self.store}. Remove it where that store is made."


@dataclass(eq=False)
class BundleNotFound(GuestpullError):
    """No bundle of ours is at that path."""

    status, reason = Status.NOT_FOUND, "BUNDLE_NOT_FOUND"
    bundle_path: str

    def explain(self) -> str:
        return f"{self.bundle_path} is no bundle of this service. `guestpull bundles` lists them."


@dataclass(eq=False)
class BundleBusy(GuestpullError):
    """The bundle's rootfs cannot be unmounted because something uses it."""

    status, reason = Status.FAILED_PRECONDITION, "BUNDLE_BUSY"
    bundle_path: str

    def explain(self) -> str:
        return (
            f"{self.bundle_path}/rootfs is in use. Stop the container that runs in it, then release it again."
        )


@dataclass(eq=False)
class NoSuchUser(GuestpullError):
    """The image's User is not in the image's own /etc/passwd or /etc/group."""

    status, reason = Status.FAILED_PRECONDITION, "NO_SUCH_USER"
    user: str
    problem: str

    def explain(self) -> str:
        return (
            f"the image's User {self.user!r}: {self.problem}. "
            "Add it to the image, or build the image with a numeric User."
        )


@dataclass(eq=False)
class InvalidStore(GuestpullError):
    """The work directory cannot be used: a damaged meta_store.json, or a form that we do not know."""

    status, reason = Status.FAILED_PRECONDITION, "INVALID_STORE"
    path: str
    problem: str

    def explain(self) -> str:
        return (
            f"{self.path}: {self.problem}. "
            "Run `guestpulld verify` on the work directory to see what is there."
        )


@dataclass(eq=False)
class WorkDirInUse(GuestpullError):
    """Another process owns the work directory."""

    status, reason = Status.FAILED_PRECONDITION, "WORK_DIR_IN_USE"
    work_dir: str
    owner: str

    def explain(self) -> str:
        return (
            f"work directory {self.work_dir} is in use by {self.owner}. "
            "Stop that process, or give this one a --work-dir of its own."
        )


@dataclass(eq=False)
class InsecureWorkDir(GuestpullError):
    """Another user of this machine could alter the work directory, or reach the files of its layers."""

    status, reason = Status.FAILED_PRECONDITION, "INSECURE_WORK_DIR"
    path: str
    problem: str
    remedy: str

    def explain(self) -> str:
        return f"{self.path}: {self.problem}. {self.remedy}"


@dataclass(eq=False)
class InvalidConfiguration(GuestpullError):
    """A configuration file that cannot be used; `place` is the path within it."""

    status, reason = Status.INVALID_ARGUMENT, "INVALID_CONFIGURATION"
    path: str
    place: str
    problem: str

    def explain(self) -> str:
        where = f" at {self.place}" if self.place else ""
        return f"{self.path}{where}: {self.problem}. Mend the file; README.md lists the keys."


@dataclass(eq=False)
class AddressInUse(GuestpullError):
    """The address to listen on is taken, or cannot be used."""

    status, reason = Status.FAILED_PRECONDITION, "ADDRESS_IN_USE"
    address: str
    problem: str

    def explain(self) -> str:
        return f"cannot listen on {self.address}: {self.problem}. Choose another --listen address."


# -- the caller ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Cancelled(GuestpullError):
    """The caller left, or the service is shutting down."""

    status, reason = Status.CANCELLED, "CANCELLED"
    what: str

    def explain(self) -> str:
        return f"{self.what} was cancelled. Nothing of it was kept."


@dataclass(eq=False)
class DeadlineExceeded(GuestpullError):
    """The caller's deadline passed."""

    status, reason = Status.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"
    what: str

    def explain(self) -> str:
        return f"{self.what} did not finish in time. Allow more time; layers that were completed are reused."
