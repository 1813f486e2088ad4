"""The image's Volumes -> mounts.

The image specification's conversion.md asks to keep application data out of the container's root filesystem; a
converter may fill a volume with the image's content, and need not use mounts. What others do:

  Docker, podman        a directory on the host's disk, mounted over the place; begins with a copy of the image's
                        content, its owner and mode
  containerd's CRI      the same, one for each container
  umoci, image-rs       an empty tmpfs without a size; hides what the image has there, is owned by root

Ours: where the image has no directory, or an empty one, a tmpfs of `limits.volume_bytes` with the directory's
owner and mode. A volume in which the image has content stays part of the root filesystem: the content is there
without a copy, what is written goes to the bundle's upper directory, and is deleted with the bundle. The
specification's `tmpcopyup` would copy the content into memory: a sparse file of 1 GiB is 246 bytes of a layer.

A path is hostile. What the runtime mounts itself, and what is not a directory, is not mounted over, nor by way of
a link: crun would mount over /proc/self, where it tells the kernel how to confine the process (CVE-2019-16884).
"""

from __future__ import annotations

import stat
from collections.abc import Collection
from typing import Final

from guestpull_server.bundle.image_files import Found, ImageFiles
from guestpull_server.bundle.spec import Mount
from guestpull_server.config import Limits
from guestpull_server.errors import LimitExceeded, storage_errors

_OPTIONS: Final = ("rw", "nosuid", "nodev", "relatime")
_RUNTIMES_OWN: Final = ("/proc", "/sys", "/dev")


def mounts_of(volumes: Collection[str], files: ImageFiles, limits: Limits) -> list[Mount]:
    """The mounts for an image's volumes, outer ones first.

    Args:
        volumes: paths, as the image config has them.
        files: the image's files.
        limits: bound the number of volumes, and the size of each.

    Raises:
        LimitExceeded: there are too many, or it takes too many steps to find them.
        StorageFailed: the operating system refuses to look at the image's directories.
        Cancelled: the caller left.
        DeadlineExceeded: the caller's time is up.
    """
    if len(volumes) > limits.max_volumes:
        raise LimitExceeded("the number of the image's volumes", "max_volumes", limits.max_volumes)
    mounts: dict[str, Mount] = {}
    for path in volumes:
        with storage_errors("looking at the image's volume", path), files.found(path) as found:
            if found is not None and not _is_reserved(found.path) and found.path not in mounts:
                options = _attributes(found)
                if options is not None:
                    options = [*_OPTIONS, f"size={limits.volume_bytes}", *options]
                    mounts[found.path] = Mount(found.path, "tmpfs", "tmpfs", options)
    return [mounts[place] for place in sorted(mounts)]


def _is_reserved(path: str) -> bool:
    return path == "/" or any(path == own or path.startswith(f"{own}/") for own in _RUNTIMES_OWN)


def _attributes(found: Found) -> list[str] | None:
    """The mount options for a volume's mode and owner; None if nothing is to be mounted there."""
    status = found.status()
    if status is None:
        return ["mode=0755"]
    if not stat.S_ISDIR(status.st_mode) or not found.is_empty():
        return None
    return [f"mode={stat.S_IMODE(status.st_mode):04o}", f"uid={status.st_uid}", f"gid={status.st_gid}"]
