"""Converts the image's Volumes to mounts.

conversion.md asks to keep application data out of the container's root filesystem. A converter may fill a
volume with the image's content, and need not use mounts. Existing tools differ:

  Docker, podman        mount a directory of the host's disk, initialised with the image's content, owner and mode
  containerd's CRI      the same, with one directory per container
  umoci, image-rs       mount an empty tmpfs without a size limit, owned by root, which hides the image's content

Here, a volume that is missing or empty in the image becomes a tmpfs of `limits.volume_bytes` with the
directory's owner and mode. A volume with content stays part of the root filesystem: it needs no copy, and what
is written to it goes to the bundle's upper directory and is deleted with the bundle. The runtime
specification's `tmpcopyup` would copy the content into memory, where a sparse file of 1 GiB, 246 bytes in a
layer, takes 1 GiB.

Paths are hostile. A path that is not a directory, or that is or leads by a link to a mount of the runtime, is
skipped: crun would mount over /proc/self, through which it tells the kernel how to confine the process
(CVE-2019-16884).
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
        volumes: the paths of the image config.
        files: the image's files.
        limits: bounds on the number of volumes and the size of each.

    Raises:
        LimitExceeded: there are too many volumes, or finding them takes too many steps.
        StorageFailed: the image's directories cannot be read.
        Cancelled: the caller cancelled.
        DeadlineExceeded: the deadline has passed.
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
    """The mount options for a volume's mode and owner; None if the volume is not mounted."""
    status = found.status()
    if status is None:
        return ["mode=0755"]
    if not stat.S_ISDIR(status.st_mode) or not found.is_empty():
        return None
    return [f"mode={stat.S_IMODE(status.st_mode):04o}", f"uid={status.st_uid}", f"gid={status.st_gid}"]
