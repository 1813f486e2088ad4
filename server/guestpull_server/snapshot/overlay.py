"""Layers -> a mounted rootfs, by overlayfs (Documentation/filesystems/overlayfs.rst).

Each layer is given to the kernel by a parameter of its own, `lowerdir+` (Linux 6.8): up to 500 of them. For older
kernels all options must fit mount(2)'s one page: there each layer goes by a link of one or two characters,
relative to a directory that only the mounting thread is in. That is also the way for paths that a parameter cannot
have: those of more than 255 bytes, and those with a backslash, an escape in some parameters and not in others.

Options: `redirect_dir=nofollow` and `metacopy=off`, so that no xattr of a layer can send overlayfs to another
directory or to another file's contents; `index=off`, because an upper directory serves one mount only.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from guestpull_server.cancellation import Cancellation
from guestpull_server.errors import MountFailed, storage_errors
from guestpull_server.models import StoredLayer
from guestpull_server.snapshot.attributes import prepare_upper, visible
from guestpull_server.snapshot.syscalls import FilesystemContext, mount_from_directory

_SAFE_OPTIONS: Final = {"redirect_dir": "nofollow", "metacopy": "off", "index": "off"}
_SOURCE: Final = "guestpull"
_MAX_LAYERS: Final = 500  # the kernel's OVL_MAX_STACK
_LETTERS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


def mount_rootfs(
    layers: Sequence[StoredLayer],
    overlay_directory: str,
    rootfs: str,
    bundle_directory: int,
    cancellation: Cancellation,
) -> None:
    """Mount layers, writable, at `rootfs`; when this raises, nothing is mounted.

    Args:
        layers: bottom-most first. One that occurs twice counts at its topmost place.
        overlay_directory: where upper and work directories are made; empty.
        rootfs: an empty directory. It is not followed, should it have become a link.
        bundle_directory: the directory that the rootfs is in, open: whatever has its path by now is of no matter.
        cancellation: observed until the mount.

    Raises:
        MountFailed: the kernel refuses; the error says why, and what to do.
        StorageFull: there is no room for the upper directory.
        StorageFailed: the operating system refuses a step before the mount.
        Cancelled: the caller left.
        DeadlineExceeded: the caller's time is up.
    """
    with storage_errors("preparing the mount", overlay_directory):
        lower = _prepare(layers, overlay_directory, cancellation)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(os.path.basename(rootfs), flags, dir_fd=bundle_directory)
    try:
        _mount(lower, overlay_directory, target)
    except OSError as error:
        raise _refused(rootfs, error, len(lower)) from error
    finally:
        os.close(target)


def _mount(lower: Sequence[str], overlay_directory: str, target: int) -> None:
    """Mount by the newer way, or by the older one where that cannot be."""
    if any("\\" in path for path in (*lower, overlay_directory)):
        mount_by_one_page(lower, overlay_directory, target)
        return
    try:
        mount_one_by_one(lower, overlay_directory, target)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        try:
            mount_by_one_page(lower, overlay_directory, target)
        except OSError:
            # the older way has no log: the newer one's error says more
            raise error from None


def _prepare(
    layers: Sequence[StoredLayer], overlay_directory: str, cancellation: Cancellation
) -> Sequence[str]:
    """Make upper and work directories; returns the lower ones, topmost first."""
    by_path = {layer.store_path: layer for layer in reversed(layers)}
    topmost_first = list(by_path)
    lower = visible(topmost_first, cancellation)
    upper = os.path.join(overlay_directory, "upper")
    os.mkdir(upper, 0o755)
    os.mkdir(os.path.join(overlay_directory, "work"), 0o755)
    prepare_upper([by_path[path] for path in topmost_first], len(lower), upper, cancellation)
    if lower:
        return lower
    empty = os.path.join(overlay_directory, "empty")  # overlayfs wants a lower directory
    os.mkdir(empty, 0o755)
    return [empty]


def mount_one_by_one(lower: Sequence[str], overlay_directory: str, target: int) -> None:
    """Mount by one `lowerdir+` a layer.

    Args:
        lower: topmost first.
        overlay_directory: with `upper` and `work` in it.
        target: the directory to mount on, open.

    Raises:
        OSError: the kernel refuses; its text has the kernel's log of it.
    """
    with FilesystemContext("overlay") as context:
        try:
            context.set("source", _SOURCE)
            for path in lower:
                context.set("lowerdir+", path)
            context.set("upperdir", os.path.join(overlay_directory, "upper"))
            context.set("workdir", os.path.join(overlay_directory, "work"))
            for key, value in _SAFE_OPTIONS.items():
                context.set(key, value)
            context.create()
            context.mount_at(target)
        except OSError as error:
            log = context.log()
            number = error.errno or errno.EIO
            raise OSError(number, f"{os.strerror(number)}: {log}" if log else os.strerror(number)) from error


def mount_by_one_page(lower: Sequence[str], overlay_directory: str, target: int) -> None:
    """Mount by mount(2), for kernels before 6.8; arguments as for `mount_one_by_one`.

    Raises:
        OSError: the kernel refuses.
    """
    links = os.path.join(overlay_directory, "lower")
    os.mkdir(links, 0o700)
    names = [_short_name(number) for number in range(len(lower))]
    for name, path in zip(names, lower, strict=True):
        os.symlink(path, os.path.join(links, name))
    # its name is in the path: the bundle's mounts are recognised by it
    own = f"../../{os.path.basename(overlay_directory)}"
    options = {
        "lowerdir": ":".join(names),
        "upperdir": f"{own}/upper",
        "workdir": f"{own}/work",
        **_SAFE_OPTIONS,
    }
    text = ",".join(f"{key}={value}" for key, value in options.items())
    mount_from_directory(links, _SOURCE, f"/proc/self/fd/{target}", "overlay", text)


def _short_name(number: int) -> str:
    high, low = divmod(number, len(_LETTERS))
    return (_short_name(high - 1) if high else "") + _LETTERS[low]


def _refused(rootfs: str, error: OSError, layers: int) -> MountFailed:
    problem = error.strerror or str(error)
    match error.errno:
        case errno.EPERM | errno.EACCES:
            remedy = (
                "Run guestpulld as root, with CAP_SYS_ADMIN and without a seccomp filter against mounting."
            )
        case errno.ENODEV | errno.ENOSYS:
            problem = "this kernel has no overlayfs"
            remedy = "Load the module overlay, or use a kernel that has it."
        case errno.EINVAL | errno.E2BIG if layers > _MAX_LAYERS:
            problem = f"the image has {layers} layers, and overlayfs stacks at most {_MAX_LAYERS}"
            remedy = "Squash some of them."
        case errno.EMFILE | errno.ENFILE:
            remedy = "Raise the number of files that guestpulld may have open (ulimit -n)."
        case errno.ENOSPC:
            remedy = "The limit of mounts is reached (/proc/sys/fs/mount-max), or the file system is full."
        case errno.EINVAL:
            remedy = (
                "The file system of the work directory may not do as an upper directory (another overlay, NFS): "
                "use a tmpfs or a local disk. The kernel's log may say more."
            )
        case errno.ENOENT | errno.ENOTDIR | errno.ESTALE:
            remedy = "A layer's directory is gone; `guestpulld verify --repair` downloads it again."
        case _:
            remedy = "The kernel's log may say more."
    return MountFailed(rootfs, problem, remedy)
