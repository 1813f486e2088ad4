"""Mounts layers with overlayfs (Documentation/filesystems/overlayfs.rst).

Since Linux 6.8, each layer is passed to the kernel in a parameter `lowerdir+`, up to 500 of them. On older
kernels, all options must fit mount(2)'s one page; each layer is then passed as a link with a name of one or two
characters, relative to the working directory of the mounting thread. That is also done for paths that a
parameter cannot hold: those longer than 255 bytes, and those with a backslash, which only some parameters treat
as an escape.

Options: `redirect_dir=nofollow` and `metacopy=off`, so that an xattr of a layer cannot redirect overlayfs to
another directory or another file's contents; `index=off`, because an upper directory is mounted only once.
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
    """Mount layers at `rootfs`, writable; if this raises, nothing is mounted.

    Args:
        layers: bottom-most first. A layer that occurs twice is mounted at its topmost position.
        overlay_directory: an empty directory, in which the upper and work directories are created.
        rootfs: an empty directory. A link in its place is not followed.
        bundle_directory: a descriptor of the directory that contains the rootfs, used instead of its path,
            which may be replaced.
        cancellation: checked until the mount.

    Raises:
        MountFailed: the kernel refused the mount; the error says why, and what to do.
        StorageFull: the file system is full.
        StorageFailed: a system call before the mount failed.
        Cancelled: the caller cancelled.
        DeadlineExceeded: the deadline has passed.
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
    """Mount with one parameter per layer, or with mount(2) if that is impossible."""
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
            # mount(2) has no log: raise the first error, which says more
            raise error from None


def _prepare(
    layers: Sequence[StoredLayer], overlay_directory: str, cancellation: Cancellation
) -> Sequence[str]:
    """Create the upper and work directories; return the lower directories, topmost first."""
    by_path = {layer.store_path: layer for layer in reversed(layers)}
    topmost_first = list(by_path)
    lower = visible(topmost_first, cancellation)
    upper = os.path.join(overlay_directory, "upper")
    os.mkdir(upper, 0o755)
    os.mkdir(os.path.join(overlay_directory, "work"), 0o755)
    prepare_upper([by_path[path] for path in topmost_first], len(lower), upper, cancellation)
    if lower:
        return lower
    empty = os.path.join(overlay_directory, "empty")  # overlayfs requires a lower directory
    os.mkdir(empty, 0o755)
    return [empty]


def mount_one_by_one(lower: Sequence[str], overlay_directory: str, target: int) -> None:
    """Mount with one `lowerdir+` per layer.

    Args:
        lower: directories of layers, topmost first.
        overlay_directory: contains `upper` and `work`.
        target: a descriptor of the directory to mount on.

    Raises:
        OSError: a system call failed; the text includes the kernel's log.
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
    """Mount with mount(2), for kernels before 6.8; takes the arguments of `mount_one_by_one`.

    Raises:
        OSError: a system call failed.
    """
    links = os.path.join(overlay_directory, "lower")
    os.mkdir(links, 0o700)
    names = [_short_name(number) for number in range(len(lower))]
    for name, path in zip(names, lower, strict=True):
        os.symlink(path, os.path.join(links, name))
    # include the overlay's id in the path: users.py finds the bundle's mounts by it
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
            remedy = "Squash some layers."
        case errno.EMFILE | errno.ENFILE:
            remedy = "Raise guestpulld's limit of open files (ulimit -n)."
        case errno.ENOSPC:
            remedy = "The limit of mounts is reached (/proc/sys/fs/mount-max), or the file system is full."
        case errno.EINVAL:
            remedy = (
                "The work directory's file system may not support an upper directory (overlay and NFS do not): "
                "use a tmpfs or a local disk. The kernel's log may say more."
            )
        case errno.ENOENT | errno.ENOTDIR | errno.ESTALE:
            remedy = "A layer's directory is gone; `guestpulld verify --repair` downloads it again."
        case _:
            remedy = "The kernel's log may say more."
    return MountFailed(rootfs, problem, remedy)
