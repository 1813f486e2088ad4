"""Who uses a bundle's overlay, anywhere on the machine.

A container runtime has the rootfs in a mount namespace of its own: the host can unmount its own mount, and the
container runs on. So the mounts of all namespaces are looked at. An overlay is recognised by its upper directory,
`…/<overlay id>/upper`, in the options of its superblock. They are the same in each namespace, whatever its root
directory is, and an id is random.

Mounts do not tell everything: a file can be open in a mount that was detached, and a namespace can live without a
process. The kernel itself knows: while an overlay's superblock lives, its upper and work directories are marked as
in use, and another overlay with `index=on` cannot be made of them (EBUSY). `is_alive` tries that.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import Final

from guestpull_server.snapshot.mountinfo import Mount, Namespace, namespaces_with, own_mounts
from guestpull_server.snapshot.syscalls import FilesystemContext

_MOST_NAMED: Final = 8  # users in one error; who has ended these will see the others
UNNAMED_USER: Final = (
    "something that holds it without a mount in any process's namespace, such as an open file"
)


def overlay_option(overlay_directory: str) -> bytes:
    """What the options of a bundle's overlay have in them, and those of no other mount."""
    return os.fsencode(f"/{os.path.basename(overlay_directory)}/upper")


def is_overlay_of(mount: Mount, option: bytes) -> bool:
    """Whether a mount is one of the overlay with this `overlay_option`."""
    return mount.filesystem == "overlay" and option in mount.options


def users_besides(rootfs_mount: int | None, overlay_directory: str) -> tuple[str, ...]:
    """Who has a bundle's overlay mounted besides its rootfs, or something on it; a phrase each.

    Copies of the rootfs's mount that mount propagation made do not count: they go with it.

    Args:
        rootfs_mount: the id of the mount that is to be unmounted; None: there is none.
        overlay_directory: the bundle's.

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
            if number not in seen | {rootfs_mount} and not _goes_along(mount, below, rootfs, parent):
                users[_mounted(namespace, mount, "it")] = None
        on_it = namespace.mounts.mounted_on(overlays)
        for mount in on_it:
            if mount.mount_id not in seen and mount.mount_id not in overlays:
                users[_mounted(namespace, mount, f"{mount.filesystem} {mount.source!r}")] = None
        seen.update(overlays, (mount.mount_id for mount in on_it))
    return tuple(users)[:_MOST_NAMED]


def _goes_along(mount: Mount, below: Mount | None, rootfs: Mount | None, parent: Mount | None) -> bool:
    """Whether a mount is a copy that propagation made of the rootfs's: it is on the same directory."""
    if below is None or rootfs is None or parent is None or not parent.peer_group:
        return False
    place, copied = _place(rootfs, parent), _place(mount, below)
    return below.is_propagated_to and below.device == parent.device and place == copied


def _place(mount: Mount, parent: Mount) -> str:
    """The directory that a mount is on, as its file system has it."""
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
        return "ended since"


def is_alive(overlay_directory: str) -> bool | None:
    """Whether the superblock of a bundle's overlay lives; None where that cannot be found out.

    The bundle's `work` is the upper directory of what is made, and never its `upper`: the kernel leaves extended
    attributes there. The directories in `probe` stay: with index=on, `work` takes no others afterwards.
    """
    try:
        directory = os.open(overlay_directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for name in ("probe", "probe/lower", "probe/work"):
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=directory)
        # a parameter has room for 255 bytes: a path by way of the descriptor is short
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
