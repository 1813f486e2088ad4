"""All errors that a user of guestpull can see.

Each class carries its facts as fields, and its gRPC status and stable `reason` as class attributes. `explain`
renders one sentence that says what happened and one that says what to do. Do not format messages elsewhere,
and do not catch an error to reword it. `service/status.py` maps `status` and `reason` to the wire; the table
in README.md lists them.

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
    """The gRPC status codes in use, by name, so that the core does not import gRPC."""

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
    """Base class of all expected errors.

    Subclasses are dataclasses. `str(error)` is `explain()`.
    """

    status: ClassVar[Status] = Status.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def explain(self) -> str:
        """Return one sentence that says what happened and one that says what to do."""
        raise NotImplementedError

    def facts(self) -> dict[str, str]:
        """Return the fields as text, for the metadata of ErrorInfo."""
        return {field.name: _as_text(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        return self.explain()


def _as_text(fact: object) -> str:
    return ", ".join(str(one) for one in fact) if isinstance(fact, tuple) else str(fact)


# -- the request ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class InvalidReference(GuestpullError):
    """The text is not a reference in the grammar of the distribution project."""

    status, reason = Status.INVALID_ARGUMENT, "INVALID_REFERENCE"
    reference: str
    problem: str

    def explain(self) -> str:
        return (
            f"Invalid image reference {self.reference!r}: {self.problem}. "
            "Use the form [host[:port]/]name[:tag][@sha256:digest]."
        )


@dataclass(eq=False)
class InvalidDigest(GuestpullError):
    """The text is not a digest as defined by the OCI image specification."""

    status, reason = Status.INVALID_ARGUMENT, "INVALID_DIGEST"
    digest: str

    def explain(self) -> str:
        return f"Invalid digest {self.digest!r}: expected sha256: followed by 64 lower-case hex digits."


@dataclass(eq=False)
class InvalidPlatform(GuestpullError):
    """The text is not a platform in the form os/architecture[/variant]."""

    status, reason = Status.INVALID_ARGUMENT, "INVALID_PLATFORM"
    platform: str

    def explain(self) -> str:
        return f"Invalid platform {self.platform!r}: expected os/architecture[/variant], e.g. linux/arm64/v8."


@dataclass(eq=False)
class InvalidRequest(GuestpullError):
    """A field of the request has an invalid value."""

    status, reason = Status.INVALID_ARGUMENT, "INVALID_REQUEST"
    field: str
    problem: str
    remedy: str

    def explain(self) -> str:
        return f"{self.field}: {self.problem}. {self.remedy}"


@dataclass(eq=False)
class InvalidBundlePath(GuestpullError):
    """The bundle path is not absolute, cannot be a directory, or is outside the allowed roots."""

    status, reason = Status.INVALID_ARGUMENT, "INVALID_BUNDLE_PATH"
    bundle_path: str
    problem: str

    def explain(self) -> str:
        return (
            f"Invalid bundle path {self.bundle_path!r}: {self.problem}. "
            "Use an absolute directory that the service may write to (see bundle_roots in its configuration)."
        )


@dataclass(eq=False)
class BundleExists(GuestpullError):
    """The bundle already holds a config.json or a root filesystem, or another pull is creating it."""

    status, reason = Status.ALREADY_EXISTS, "BUNDLE_EXISTS"
    bundle_path: str
    found: str

    def explain(self) -> str:
        return (
            f"Bundle {self.bundle_path} already exists: {self.found}. "
            "Release it first (guestpull release), or use another directory."
        )


# -- the registry -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class ImageNotFound(GuestpullError):
    """The registry does not have the repository, tag or manifest."""

    status, reason = Status.NOT_FOUND, "IMAGE_NOT_FOUND"
    reference: str
    host: str
    answer: str

    def explain(self) -> str:
        return (
            f"{self.reference}: image not found at {self.host} ({self.answer}). "
            "Check the name and the tag. Some registries also report this if the credentials are wrong."
        )


@dataclass(eq=False)
class NotInFile(ImageNotFound):
    """The local file or directory does not contain an image of that name."""

    status, reason = Status.NOT_FOUND, "IMAGE_NOT_IN_FILE"
    names: str

    def explain(self) -> str:
        found = f"it contains {self.names}" if self.names else "its images have no names"
        return f"{self.reference}: image not found in {self.host} ({self.answer}); {found}. Use one of these."


@dataclass(eq=False)
class NotAtRegistry(GuestpullError):
    """The registry no longer has an image of the store, so the image cannot be repaired by a download."""

    status, reason = Status.NOT_FOUND, "NOT_AT_REGISTRY"
    image: str
    manifest_digest: str

    def explain(self) -> str:
        return (
            f"Image {self.image}: its manifest {self.manifest_digest} is not at the registry. "
            "If the image was baked from a file, bake it again to repair it; otherwise remove it."
        )


@dataclass(eq=False)
class BlobNotFound(GuestpullError):
    """The registry has the manifest but not a blob that the manifest lists."""

    status, reason = Status.NOT_FOUND, "BLOB_NOT_FOUND"
    reference: str
    digest: str
    host: str

    def explain(self) -> str:
        return (
            f"{self.reference}: blob {self.digest} not found at {self.host}, although the manifest lists it. "
            "The registry's copy is incomplete; push the image again."
        )


@dataclass(eq=False)
class ImageNotPresent(GuestpullError):
    """The store does not have the image, and contacting the registry was not allowed."""

    status, reason = Status.NOT_FOUND, "IMAGE_NOT_PRESENT"
    image: str

    def explain(self) -> str:
        return (
            f"Image {self.image} is not in the store. "
            "Run `guestpull images` to list the images, or pull it with a policy other than NEVER."
        )


@dataclass(eq=False)
class AmbiguousImage(GuestpullError):
    """Several image ids begin with the given prefix."""

    status, reason = Status.INVALID_ARGUMENT, "AMBIGUOUS_IMAGE"
    image: str
    matches: int

    def explain(self) -> str:
        return f"Image id {self.image} matches {self.matches} images. Use more digits of the id."


@dataclass(eq=False)
class Unauthenticated(GuestpullError):
    """The registry or its token server requires credentials, or rejected those that were sent."""

    status, reason = Status.UNAUTHENTICATED, "UNAUTHENTICATED"
    reference: str
    host: str
    with_credentials: bool

    def explain(self) -> str:
        if self.with_credentials:
            return (
                f"{self.reference}: {self.host} rejected the credentials. "
                "Check the user and the password in auth_info."
            )
        return f'{self.reference}: {self.host} requires credentials. Pass auth_info as "user:password".'


@dataclass(eq=False)
class AccessDenied(GuestpullError):
    """The registry does not allow the caller to pull the image."""

    status, reason = Status.PERMISSION_DENIED, "ACCESS_DENIED"
    reference: str
    host: str

    def explain(self) -> str:
        return (
            f"{self.reference}: {self.host} denied access. Ask the repository's owner for permission to pull."
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
            "Pull from another registry, or remove `blocked` from this entry of registry_config."
        )


@dataclass(eq=False)
class RegistryUnavailable(GuestpullError):
    """The registry does not respond, or its response is unusable, after all retries."""

    status, reason = Status.UNAVAILABLE, "REGISTRY_UNAVAILABLE"
    reference: str
    host: str
    problem: str
    attempts: int

    def explain(self) -> str:
        tries = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return (
            f"{self.reference}: {self.host} is unavailable ({self.problem}; {tries}). "
            "Check that it is running and reachable from this machine, then pull again."
        )


@dataclass(eq=False)
class RateLimited(GuestpullError):
    """The registry's rate limit is exceeded, and retries did not succeed."""

    status, reason = Status.UNAVAILABLE, "RATE_LIMITED"
    reference: str
    host: str
    retry_after: str

    def explain(self) -> str:
        when = f" in {self.retry_after} seconds" if self.retry_after else " later"
        return f"{self.reference}: {self.host} limits the request rate (429). Pull again{when}, or log in."


# -- what the registry sent ---------------------------------------------------------------------------------


@dataclass(eq=False)
class UnsupportedImage(GuestpullError):
    """The reference names something other than a runnable image; `found` says what."""

    status, reason = Status.FAILED_PRECONDITION, "UNSUPPORTED_IMAGE"
    reference: str
    found: str

    def explain(self) -> str:
        return (
            f"{self.reference} is not a supported image: {self.found}. "
            "Use a Linux container image (OCI, or Docker schema 2)."
        )


@dataclass(eq=False)
class NoMatchingPlatform(GuestpullError):
    """The image is not available for the requested platform."""

    status, reason = Status.FAILED_PRECONDITION, "NO_MATCHING_PLATFORM"
    reference: str
    platform: str
    available: str

    def explain(self) -> str:
        return (
            f"{self.reference} is not available for {self.platform}; available: {self.available or 'none'}. "
            "Request one of these platforms."
        )


@dataclass(eq=False)
class InvalidManifest(GuestpullError):
    """A manifest, index or config does not follow its specification."""

    status, reason = Status.DATA_LOSS, "INVALID_MANIFEST"
    reference: str
    digest: str
    problem: str

    def explain(self) -> str:
        return (
            f"{self.reference}: {self.digest} is invalid: {self.problem}. "
            "Rebuild or push the image again with a tool that follows the OCI image specification."
        )


@dataclass(eq=False)
class DigestMismatch(GuestpullError):
    """Content does not have the digest that it was requested by."""

    status, reason = Status.DATA_LOSS, "DIGEST_MISMATCH"
    what: str
    expected: str
    actual: str
    source: str

    def explain(self) -> str:
        return (
            f"{self.what} {self.expected}: {self.source} sent bytes with digest {self.actual}. "
            "Pull again; if the error persists, the registry or a proxy in between alters the data."
        )


@dataclass(eq=False)
class SizeMismatch(GuestpullError):
    """A blob or manifest does not have the length that its descriptor gives."""

    status, reason = Status.DATA_LOSS, "SIZE_MISMATCH"
    what: str
    expected_bytes: int
    actual_bytes: int
    source: str

    def explain(self) -> str:
        return (
            f"{self.what}: expected {self.expected_bytes} bytes, but {self.source} sent {self.actual_bytes}. "
            "Pull again; if the error persists, push the image again."
        )


@dataclass(eq=False)
class LayerChanged(GuestpullError):
    """A layer of a read-only store does not match its diff_id."""

    status, reason = Status.DATA_LOSS, "LAYER_CHANGED"
    layer: str
    store_path: str
    change: str

    def explain(self) -> str:
        return (
            f"Layer {self.layer} at {self.store_path} does not match its diff_id ({self.change}). "
            "Rebuild this store; run `guestpulld verify --deep` on it to list all changes."
        )


@dataclass(eq=False)
class ImageChanged(GuestpullError):
    """An image config in a store does not match the image id."""

    status, reason = Status.DATA_LOSS, "IMAGE_CHANGED"
    image: str
    store: str
    change: str

    def explain(self) -> str:
        return (
            f"Image {self.image} in {self.store} does not match its id ({self.change}). "
            "Run `guestpulld verify --deep --repair` on this store, or rebuild it."
        )


@dataclass(eq=False)
class CorruptLayer(GuestpullError):
    """A layer cannot be decompressed, or its tar cannot be read or unpacked."""

    status, reason = Status.DATA_LOSS, "CORRUPT_LAYER"
    layer: str
    problem: str

    def explain(self) -> str:
        return (
            f"Layer {self.layer} cannot be unpacked: {self.problem}. "
            "Rebuild the image; nothing of the layer was kept."
        )


@dataclass(eq=False)
class LimitExceeded(GuestpullError):
    """An image exceeds a configured limit."""

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
    """The file system of the work directory or the bundle is full (ENOSPC, EDQUOT)."""

    status, reason = Status.RESOURCE_EXHAUSTED, "STORAGE_FULL"
    doing: str
    path: str

    def explain(self) -> str:
        return (
            f"{self.doing}: no space left on the file system of {self.path}. "
            "Free some space (guestpull rmi, guestpull gc), then pull again; completed layers are reused."
        )


@dataclass(eq=False)
class StorageFailed(GuestpullError):
    """An operation on the work directory or the bundle failed."""

    status, reason = Status.INTERNAL, "STORAGE_FAILED"
    doing: str
    path: str
    problem: str

    def explain(self) -> str:
        return (
            f"{self.doing}: {self.path}: {self.problem}. "
            "Check that the file system is mounted, writable and healthy."
        )


@contextmanager
def storage_errors(doing: str, path: str | bytes) -> Iterator[None]:
    """Convert an OSError raised inside the block.

    Args:
        doing: the operation, as it begins the message: "committing layer sha256:…".
        path: the path to report if the OSError does not name one.

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
    """The overlay mount failed."""

    status, reason = Status.FAILED_PRECONDITION, "MOUNT_FAILED"
    rootfs: str
    problem: str
    remedy: str

    def explain(self) -> str:
        return f"Cannot mount {self.rootfs}: {self.problem}. {self.remedy}"


@dataclass(eq=False)
class WorkerFailed(GuestpullError):
    """A layer worker died unexpectedly, or of an unknown error."""

    status, reason = Status.INTERNAL, "WORKER_FAILED"
    layer: str
    problem: str
    remedy: str = "check the kernel log for out-of-memory kills"

    def explain(self) -> str:
        return (
            f"Layer {self.layer}: the layer worker {self.problem}. "
            f"Pull again; if the error persists, {self.remedy}."
        )


@dataclass(eq=False)
class TooManyPulls(GuestpullError):
    """The queue of pulls is full."""

    status, reason = Status.RESOURCE_EXHAUSTED, "TOO_MANY_PULLS"
    limit: int
    registry: str = ""

    def explain(self) -> str:
        if self.registry:
            return (
                f"{self.limit} pulls from {self.registry} are already running or queued "
                "(limits.max_queued_pulls_per_registry). Try again later."
            )
        return f"{self.limit} pulls are already running or queued (limits.max_queued_pulls). Try again later."


@dataclass(eq=False)
class ImageInUse(GuestpullError):
    """The image to be removed is used by bundles."""

    status, reason = Status.FAILED_PRECONDITION, "IMAGE_IN_USE"
    image: str
    bundles: tuple[str, ...]

    def explain(self) -> str:
        return (
            f"{self.image} is in use by {', '.join(self.bundles)}. "
            "Release these bundles first, or use force; its layers are then deleted with the last bundle."
        )


@dataclass(eq=False)
class LayerInUse(GuestpullError):
    """The layer to be replaced is mounted or used by a pull."""

    status, reason = Status.FAILED_PRECONDITION, "LAYER_IN_USE"
    layer: str
    bundles: tuple[str, ...]

    def explain(self) -> str:
        users = ", ".join(self.bundles) or "a running pull"
        return f"Layer {self.layer} cannot be replaced: it is in use by {users}. Release it, then try again."


@dataclass(eq=False)
class ReadOnlyImage(GuestpullError):
    """The image is in a read-only store."""

    status, reason = Status.FAILED_PRECONDITION, "READ_ONLY_IMAGE"
    image: str
    store: str

    def explain(self) -> str:
        return f"{self.image} is in the read-only store {self.store}. Remove it where this store is built."


@dataclass(eq=False)
class BundleNotFound(GuestpullError):
    """The path is not a bundle of this service."""

    status, reason = Status.NOT_FOUND, "BUNDLE_NOT_FOUND"
    bundle_path: str

    def explain(self) -> str:
        return f"{self.bundle_path} is not a bundle of this service. Run `guestpull bundles` to list them."


@dataclass(eq=False)
class BundleBusy(GuestpullError):
    """The bundle's rootfs is in use. Each entry of `users` says who uses it and how."""

    status, reason = Status.FAILED_PRECONDITION, "BUNDLE_BUSY"
    bundle_path: str
    users: tuple[str, ...]

    def explain(self) -> str:
        return (
            f"{self.bundle_path}/rootfs is in use: {'; '.join(self.users)}. "
            "Stop the container and remove the mounts of the rootfs or on it, then release it again; "
            "nothing was deleted."
        )


@dataclass(eq=False)
class NoSuchUser(GuestpullError):
    """The image's User cannot be resolved in the image's /etc/passwd and /etc/group."""

    status, reason = Status.FAILED_PRECONDITION, "NO_SUCH_USER"
    user: str
    problem: str

    def explain(self) -> str:
        return (
            f"Cannot resolve the image's User {self.user!r}: {self.problem}. "
            "Add the user to the image, or build the image with a numeric User."
        )


@dataclass(eq=False)
class InvalidStore(GuestpullError):
    """The work directory cannot be used: meta_store.json is damaged, or its format is unknown."""

    status, reason = Status.FAILED_PRECONDITION, "INVALID_STORE"
    path: str
    problem: str

    def explain(self) -> str:
        return f"{self.path}: {self.problem}. Run `guestpulld verify` on the work directory for details."


@dataclass(eq=False)
class WorkDirInUse(GuestpullError):
    """Another process uses the work directory."""

    status, reason = Status.FAILED_PRECONDITION, "WORK_DIR_IN_USE"
    work_dir: str
    owner: str

    def explain(self) -> str:
        return (
            f"Work directory {self.work_dir} is in use by {self.owner}. "
            "Stop that process, or use another --work-dir."
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
class WorkDirReplaced(GuestpullError):
    """The work directory was deleted, renamed or mounted over while a request used it."""

    status, reason = Status.UNAVAILABLE, "WORK_DIR_REPLACED"
    work_dir: str

    def explain(self) -> str:
        return (
            f"Work directory {self.work_dir} was deleted or replaced while in use; its content is lost. "
            "Try again; guestpulld opens it again."
        )


@dataclass(eq=False)
class InvalidConfiguration(GuestpullError):
    """A configuration file is invalid; `place` is the path within it."""

    status, reason = Status.FAILED_PRECONDITION, "INVALID_CONFIGURATION"
    path: str
    place: str
    problem: str

    def explain(self) -> str:
        where = f" at {self.place}" if self.place else ""
        return f"{self.path}{where}: {self.problem}. Fix the file; docs/configuration.md lists the keys."


@dataclass(eq=False)
class AddressInUse(GuestpullError):
    """The address to listen on is in use or invalid."""

    status, reason = Status.FAILED_PRECONDITION, "ADDRESS_IN_USE"
    address: str
    problem: str

    def explain(self) -> str:
        return f"Cannot listen on {self.address}: {self.problem}. Use another --listen address."


@dataclass(eq=False)
class TooFewDescriptors(GuestpullError):
    """The limit of open files is too low (RLIMIT_NOFILE)."""

    status, reason = Status.FAILED_PRECONDITION, "TOO_FEW_DESCRIPTORS"
    allowed: int
    needed: int

    def explain(self) -> str:
        return (
            f"The limit of open files is {self.allowed}; guestpulld needs {self.needed}, and more for each pull. "
            "Raise it with `ulimit -n 1024` in a shell, or LimitNOFILE= in a systemd unit."
        )


@dataclass(eq=False)
class InsecureAddress(GuestpullError):
    """The address to listen on would admit callers without authentication."""

    status, reason = Status.FAILED_PRECONDITION, "INSECURE_ADDRESS"
    address: str
    loopback: bool

    def explain(self) -> str:
        if self.loopback:
            return (
                f"Refusing to serve {self.address} without TLS: every user of this machine could call it, "
                "which is the same as root access. Listen on a unix socket, use --tls-certificate, --tls-key and "
                "--tls-client-authorities, or allow it with --insecure-tcp."
            )
        return (
            f"Refusing to serve {self.address} without TLS: it is reachable from other machines. "
            "Use --tls-certificate, --tls-key and --tls-client-authorities."
        )


@dataclass(eq=False)
class NoSuchGroup(GuestpullError):
    """The configured group of the socket does not exist."""

    status, reason = Status.FAILED_PRECONDITION, "NO_SUCH_GROUP"
    group: str

    def explain(self) -> str:
        return (
            f"Invalid socket_group: group {self.group!r} does not exist. "
            "Create it (groupadd --system), or set another group in the configuration."
        )


@dataclass(eq=False)
class MayNotMount(GuestpullError):
    """The process is not allowed to mount file systems, which bundles require."""

    status, reason = Status.FAILED_PRECONDITION, "MAY_NOT_MOUNT"
    problem: str
    remedy: str

    def explain(self) -> str:
        return f"guestpulld cannot mount an overlay: {self.problem}. {self.remedy}"


# -- the caller ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Cancelled(GuestpullError):
    """The caller cancelled the request, or the service is shutting down."""

    status, reason = Status.CANCELLED, "CANCELLED"
    what: str

    def explain(self) -> str:
        return f"{self.what} was cancelled. Repeat it if this was not intended; completed layers are reused."


@dataclass(eq=False)
class DeadlineExceeded(GuestpullError):
    """The caller's deadline passed."""

    status, reason = Status.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"
    what: str

    def explain(self) -> str:
        return f"{self.what} exceeded its deadline. Allow more time; completed layers are reused."
