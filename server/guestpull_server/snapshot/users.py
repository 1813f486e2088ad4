"""Finds the users of a bundle's overlay on the machine.

A container runtime mounts the rootfs in its own mount namespace: the host can unmount its mount while the
container keeps running. The mounts of all namespaces are therefore searched. An overlay is identified by its
upper directory, `…/<overlay id>/upper`, in the options of its superblock. These are the same in every namespace
and for every root directory, and the id is random.

Mounts do not show every user: a file may be open in a detached mount, and a namespace may exist without a process.
The kernel knows: while an overlay's superblock exists, its upper and work directories are marked as in use, and
creating another overlay from them with `index=on` fails with EBUSY. `is_alive` tries that.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import Final

from guestpull_server.snapshot.mountinfo import Mount, Namespace, namespaces_with, own_mounts
from guestpull_server.snapshot.syscalls import FilesystemContext

_MAX_NAMED_USERS: Final = 8  # in one error; the next one names those that remain
UNNAMED_USER: Final = "something that uses it without a mount in a process's namespace, such as an open file"


def overlay_option(overlay_directory: str) -> bytes:
    """A text that occurs in the mount options of a bundle's overlay, and in those of no other mount."""
    return os.fsencode(f"/{os.path.basename(overlay_directory)}/upper")


def is_overlay_of(mount: Mount, option: bytes) -> bool:
    """Whether a mount is a mount of the overlay with this `overlay_option`."""
    return mount.filesystem == "overlay" and option in mount.options


def users_besides(rootfs_mount: int | None, overlay_directory: str) -> tuple[str, ...]:
    """List the mounts of a bundle's overlay besides its rootfs, and the mounts on them; a phrase each.

    Copies of the rootfs's mount that mount propagation created do not count: unmounting the rootfs unmounts them.

    Args:
        rootfs_mount: the id of the mount that is to be unmounted; None if the rootfs is not mounted.
        overlay_directory: the overlay directory of the bundle.

    Raises:
        OSError: /proc cannot be read.
    """
    option = overlay_option(overlay_directory)
    own = own_mounts()
    rootfs = own.get(rootfs_mount) if rootfs_mount is not None else None
    parent = own.get(rootfs.parent_id) if rootfs is not None else None
    users: dict[str, None] = {}
    seen: set[int] = set()
    for namespace in namespaces_with(option, own):
        overlays = {mount.mount_id: mount for mount in namespace.mounts.with_text(option)}
        overlays = {number: mount for number, mount in overlays.items() if is_overlay_of(mount, option)}
        for number, mount in overlays.items():
            below = namespace.mounts.get(mount.parent_id)
            if number not in seen | {rootfs_mount} and not _is_propagated_copy(mount, below, rootfs, parent):
                users[_mounted(namespace, mount, "it")] = None
        on_it = namespace.mounts.mounted_on(overlays)
        for mount in on_it:
            if mount.mount_id not in seen and mount.mount_id not in overlays:
                users[_mounted(namespace, mount, f"{mount.filesystem} {mount.source!r}")] = None
        seen.update(overlays, (mount.mount_id for mount in on_it))
    return tuple(users)[:_MAX_NAMED_USERS]


def _is_propagated_copy(
    mount: Mount, below: Mount | None, rootfs: Mount | None, parent: Mount | None
) -> bool:
    """Whether a mount is a propagated copy of the rootfs's mount: one that is on the same directory."""
    if below is None or rootfs is None or parent is None or not parent.peer_group:
        return False
    place, copied = _place(rootfs, parent), _place(mount, below)
    return below.is_propagated_to and below.device == parent.device and place == copied


def _place(mount: Mount, parent: Mount) -> str:
    """The directory that a mount is on, as a path within that directory's file system."""
    return os.path.normpath(f"{parent.root}/{os.path.relpath(mount.mount_point, parent.mount_point)}")


def _mounted(namespace: Namespace, mount: Mount, what: str) -> str:
    if namespace.process is None:
        return f"{what} is mounted at {mount.mount_point}"
    return f"process {namespace.process} ({_name_of(namespace.process)}) has {what} mounted at {mount.mount_point}"


def _name_of(process: int) -> str:
    try:
        with open(f"/proc/{process}/comm", "rb") as file:
            return file.read().decode(errors="replace").strip()
    except OSError:
        return "exited since"


def is_alive(overlay_directory: str) -> bool | None:
    """Whether the superblock of a bundle's overlay exists; None if that cannot be determined.

    The test overlay's upper directory is the bundle's `work`, not its `upper`, because the kernel leaves extended
    attributes there. The directories in `probe` are kept: with index=on, `work` accepts no others afterwards.
    """
    try:
        directory = os.open(overlay_directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for name in ("probe", "probe/lower", "probe/work"):
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=directory)
        # a path through the descriptor is short; a parameter holds 255 bytes
        path = f"/proc/self/fd/{directory}"
        with FilesystemContext("overlay") as context:
            context.set("lowerdir", f"{path}/probe/lower")
            context.set("upperdir", f"{path}/work")
            context.set("workdir", f"{path}/probe/work")
            context.set("index", "on")
            context.create()
    except OSError as error:
        return True if error.errno == errno.EBUSY else None
    finally:
        os.close(directory)
    return False
