"""Converts an image config to the bundle's config.json, an OCI runtime config.

The conversion follows conversion.md of the image specification. Settings that an image cannot have (capabilities,
mounts, masked paths, device rules) are Docker's defaults. There is no seccomp filter; README.md explains why.
`runc run` and `crun run` start the result unchanged, without a terminal.

conversion.md leaves some choices. An image with neither Entrypoint nor Cmd gets `sh`, as in image-rs: the caller,
such as kata-agent, supplies its own arguments. See volumes.py for volumes and annotations.py for labels.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final

import msgspec

from guestpull_server.bundle.annotations import annotations_of
from guestpull_server.bundle.image_files import ImageFiles
from guestpull_server.bundle.spec import (
    Capabilities,
    DeviceRule,
    Linux,
    Mount,
    Namespace,
    Process,
    Resources,
    Rlimit,
    Root,
    RuntimeConfig,
    User,
)
from guestpull_server.bundle.users import user_of
from guestpull_server.bundle.volumes import mounts_of
from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import BundleExists, InvalidManifest, LimitExceeded, storage_errors
from guestpull_server.models import RUNTIME_CONFIG, ImageConfig

_NUL: Final = rb"\u0000"  # as JSON encodes it
_DEFAULT_PATH: Final = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DEFAULT_ARGUMENTS: Final = ["sh"]

_CAPABILITIES: Final = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
]
_MASKED_PATHS: Final = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
]
_READ_ONLY_PATHS: Final = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_MOUNTS: Final = [
    Mount("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
    Mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
    Mount(
        "/dev/pts",
        "devpts",
        "devpts",
        ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
    ),
    Mount("/dev/shm", "tmpfs", "shm", ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
    Mount("/dev/mqueue", "mqueue", "mqueue", ["nosuid", "noexec", "nodev"]),
    Mount("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", "ro"]),
    Mount("/sys/fs/cgroup", "cgroup", "cgroup", ["nosuid", "noexec", "nodev", "relatime", "ro"]),
]
_NAMESPACES: Final = [Namespace(kind) for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")]


def write_runtime_config(
    bundle_path: str,
    rootfs: str,
    image_config: bytes,
    bundle_directory: int,
    written: Callable[[os.stat_result], None],
    limits: Limits,
    cancellation: Cancellation,
) -> None:
    """Write a bundle's config.json atomically; never replace an existing one.

    Args:
        bundle_path: the bundle's directory.
        rootfs: the bundle's mounted root filesystem, in which users are looked up.
        image_config: the bytes of the image config.
        bundle_directory: a descriptor of the bundle's directory, used instead of its path, which may be replaced.
        written: called with the status of the complete file, before it gets the name config.json.
        limits: bounds on the cost of the conversion.
        cancellation: checked throughout.

    Raises:
        BundleExists: config.json exists.
        NoSuchUser: the image's User does not exist in the image.
        InvalidManifest: the image config is malformed, or has a NUL byte where runtimes refuse it.
        LimitExceeded: the image config or the image's content exceeds a limit.
        StorageFull: the file system is full.
        StorageFailed: a system call failed.
        Cancelled: the caller cancelled.
        DeadlineExceeded: the deadline has passed.
    """
    cancellation.check()
    _refuse_excess(image_config, limits)
    try:
        config = msgspec.json.decode(image_config, type=ImageConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(bundle_path, "the image config", str(error)) from None
    with storage_errors("writing the runtime config", os.path.join(bundle_path, RUNTIME_CONFIG)):
        there = f"/proc/self/fd/{bundle_directory}/{os.path.basename(rootfs)}"
        files = ImageFiles(there, limits, cancellation)
        converted = _runtime_config(config, files, limits, bundle_path)
        cancellation.check()
        document = msgspec.json.format(msgspec.json.encode(converted), indent=2) + b"\n"
        if _NUL in document:  # may also be text; the complete check takes a tenth of a warm pull
            _refuse_nul(msgspec.to_builtins(converted), bundle_path)
        if not _write_new(bundle_directory, document, written):
            raise BundleExists(bundle_path, f"it holds a {RUNTIME_CONFIG}")


def _write_new(directory: int, content: bytes, written: Callable[[os.stat_result], None]) -> bool:
    """Write config.json unless it exists; return whether it was written.

    The file gets its name when it is complete, so that undoing an interrupted pull finds no temporary file.
    """
    try:
        descriptor = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o644, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        return _write_in_place(directory, content, written)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o644)  # regardless of the umask
        file.write(content)
        file.flush()
        written(os.fstat(descriptor))
        try:
            os.link(f"/proc/self/fd/{descriptor}", RUNTIME_CONFIG, dst_dir_fd=directory)
        except FileExistsError:
            return False
    return True


def _write_in_place(directory: int, content: bytes, written: Callable[[os.stat_result], None]) -> bool:
    """Like `_write_new`, for file systems without O_TMPFILE: nobody reads the file before the pull has ended.

    A kill before `written` is called leaves the file behind, because nothing recorded that it is ours.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(RUNTIME_CONFIG, flags, 0o644, dir_fd=directory)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)
            file.write(content)
            file.flush()
            written(os.fstat(descriptor))
    except BaseException:
        os.unlink(RUNTIME_CONFIG, dir_fd=directory)
        raise
    return True


def _refuse_excess(image_config: bytes, limits: Limits) -> None:
    """Bound the number of strings in an image config before decoding them to up to 20 times the bytes.

    Quotation marks within strings count as well; histories with long shell commands have many.

    Raises:
        LimitExceeded: there are too many strings.
    """
    if image_config.count(b'"') > 2 * limits.max_config_strings:
        raise LimitExceeded(
            "the number of strings in the image config", "max_config_strings", limits.max_config_strings
        )


def _runtime_config(
    config: ImageConfig, files: ImageFiles, limits: Limits, bundle_path: str
) -> RuntimeConfig:
    """Convert an image config.

    Args:
        config: the image config.
        files: the image's files.
        limits: bounds on the cost of the conversion.
        bundle_path: the bundle's directory, for the log.

    Raises:
        NoSuchUser: the image's User does not exist in the image.
        LimitExceeded: there are too many volumes, or finding them takes too many steps.
        StorageFailed: the image's files cannot be read.
    """
    process = config.process
    user = user_of(process.user or "", files, limits)
    # runc refuses a variable without a name or `=`; crun and podman skip it
    environment = [variable for variable in process.env or () if variable.find("=") > 0]
    if not any(variable.startswith("PATH=") for variable in environment):
        environment.insert(0, _DEFAULT_PATH)
    # ENTRYPOINT [""] in a Dockerfile resets the base image's, for Docker, podman and containerd
    entrypoint = process.entrypoint if process.entrypoint != [""] else None
    arguments = [*(entrypoint or []), *(process.cmd or [])]
    directory = process.working_dir or "/"
    return RuntimeConfig(
        process=Process(
            user=User(user.uid, user.gid, list(user.additional_gids)),
            args=arguments or _DEFAULT_ARGUMENTS,
            env=environment,
            cwd=directory if directory.startswith("/") else f"/{directory}",
            capabilities=Capabilities.all_of(_CAPABILITIES),
            rlimits=[Rlimit("RLIMIT_NOFILE", hard=1024, soft=1024)],
        ),
        root=Root("rootfs"),
        hostname="guestpull",
        mounts=[*_MOUNTS, *mounts_of(process.volumes or (), files, limits)],
        annotations=annotations_of(config, bundle_path),
        linux=Linux(
            resources=Resources(devices=[DeviceRule(allow=False, access="rwm")]),
            namespaces=_NAMESPACES,
            masked_paths=_MASKED_PATHS,
            readonly_paths=_READ_ONLY_PATHS,
        ),
    )


def _refuse_nul(value: object, bundle_path: str, place: str = "") -> None:
    """Refuse NUL bytes: arguments, variables and paths cannot have any, and runtimes refuse the document.

    Raises:
        InvalidManifest: there is a NUL byte.
    """
    match value:
        case str():
            if "\0" in value:
                raise InvalidManifest(bundle_path, "the image config", f"there is a NUL byte in {place}")
        case dict():
            for name, inner in value.items():
                _refuse_nul(name, bundle_path, place)
                _refuse_nul(inner, bundle_path, f"{place}.{name}".removeprefix("."))
        case list():
            for inner in value:
                _refuse_nul(inner, bundle_path, place)
