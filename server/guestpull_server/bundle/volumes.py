"""The image's Volumes -> mounts.

The image specification's conversion.md asks for a mount at each, "such that application data is not written to
the container's root filesystem". As image-rs and umoci have it, that is a tmpfs. Theirs hide what the image has at
that place; ours begin with it (`tmpcopyup` of the runtime specification), and with the owner and the mode of the
directory, as Docker's volumes do. A directory with devices or fifos in it stays a part of the root filesystem:
runc cannot copy them, and would start nothing.

A path is the image's, and hostile: what the runtime mounts itself, or what is no directory, is not mounted over,
nor by way of a link: crun would mount over /proc/self, where it tells the kernel how to confine the process
(runc's CVE-2019-16884).
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import Final

from guestpull_server.bundle import image_files
from guestpull_server.bundle.spec import Mount
from guestpull_server.errors import storage_errors

_OPTIONS: Final = ("rw", "nosuid", "nodev", "relatime")
_RUNTIMES_OWN: Final = ("/proc", "/sys", "/dev")


def mounts_of(volumes: Iterable[str], rootfs: str) -> list[Mount]:
    """A mount for each volume, outer ones first.

    Args:
        volumes: paths, as the image config has them.
        rootfs: the mounted root filesystem.

    Raises:
        StorageFailed: the operating system refuses to look at the image's directories.
    """
    places = {place for path in volumes if (place := _place(path, rootfs)) is not None}
    return [mount for place in sorted(places) if not _is_reserved(place) for mount in _mount(place, rootfs)]


def _place(path: str, rootfs: str) -> str | None:
    with storage_errors("looking at the image's volume", rootfs + path):
        return image_files.resolved(rootfs, path)


def _is_reserved(path: str) -> bool:
    return path == "/" or any(path == own or path.startswith(f"{own}/") for own in _RUNTIMES_OWN)


def _mount(path: str, rootfs: str) -> list[Mount]:
    with storage_errors("looking at the image's volume", rootfs + path):
        status = image_files.status(rootfs, path)
        if status is None:
            return [Mount(path, "tmpfs", "tmpfs", [*_OPTIONS, "mode=0755"])]
        if not stat.S_ISDIR(status.st_mode):
            return []
        options = [
            *_OPTIONS,
            f"mode={stat.S_IMODE(status.st_mode):04o}",
            f"uid={status.st_uid}",
            f"gid={status.st_gid}",
        ]
        match image_files.contents(rootfs, path):
            case image_files.Contents.NOTHING:
                pass
            case image_files.Contents.PLAIN:
                options.append("tmpcopyup")
            case image_files.Contents.SPECIAL:
                return []
    return [Mount(path, "tmpfs", "tmpfs", options)]
