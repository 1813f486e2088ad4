"""Lists and unmounts overlays for the store (implements its `Mounts`)."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from guestpull_server.errors import storage_errors
from guestpull_server.snapshot.mountinfo import Mount, mount_id_of, own_mounts
from guestpull_server.snapshot.syscalls import unmount
from guestpull_server.snapshot.users import (
    UNNAMED_USER,
    is_alive,
    is_overlay_of,
    overlay_option,
    users_besides,
)

_TRIES: Final = 20
_SECONDS_BETWEEN_TRIES: Final = 0.025
_ROOTFS: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class OverlayMounts:
    """The overlay mounts of the machine."""

    def mounted(self) -> frozenset[str]:
        """The absolute mount points of overlays in this process's mount namespace.

        Raises:
            StorageFailed: /proc cannot be read.
        """
        with _proc_errors():
            mounts = own_mounts()
        return frozenset(mount.mount_point for mount in mounts.with_text(b" - overlay "))

    def is_used(self, overlay_directory: str) -> bool:
        """Whether a bundle's overlay is mounted, or kept alive otherwise, anywhere on the machine.

        Raises:
            StorageFailed: /proc cannot be read.
        """
        with _proc_errors():
            return bool(users_besides(None, overlay_directory)) or is_alive(overlay_directory) is True

    def unmount(self, rootfs: str | None, overlay_directory: str) -> tuple[str, ...]:
        """Unmount a bundle's rootfs if nothing else uses its overlay; return a phrase for each user.

        An empty result means that the overlay is mounted nowhere on the machine. Otherwise the rootfs stays
        mounted, unless a user appeared during the unmount. Harmless if nothing is mounted. `rootfs` is None if
        the bundle's directory is gone.

        Like containerd, retry for a while: a process that was forked elsewhere on the machine keeps open files
        until it calls exec.

        Raises:
            StorageFailed: unmounting failed for another reason than its use.
        """
        users: tuple[str, ...] = ()
        with storage_errors("unmounting", rootfs or overlay_directory):
            for attempt in range(_TRIES):
                if attempt:
                    time.sleep(_SECONDS_BETWEEN_TRIES)
                users = self._unmount_once(rootfs, overlay_directory)
                if not users:
                    break
        return users

    def detach(self, rootfs: str, overlay_directory: str) -> None:
        """Unmount a bundle's rootfs, even if it is in use, and the mounts on it; harmless if it is not mounted.

        Raises:
            StorageFailed: a system call failed.
        """
        with storage_errors("unmounting", rootfs):
            while _mounts_at(rootfs, overlay_directory):
                unmount(rootfs, detach=True)

    @staticmethod
    def _unmount_once(rootfs: str | None, overlay_directory: str) -> tuple[str, ...]:
        at_rootfs = _mounts_at(rootfs, overlay_directory) if rootfs is not None else []
        users = users_besides(at_rootfs[-1].mount_id if at_rootfs else None, overlay_directory)
        if users:
            return users
        if rootfs is not None and at_rootfs:
            try:
                unmount(rootfs)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                return (
                    f"a process with its working directory or an open file in {at_rootfs[0].mount_point}",
                )
        alive = is_alive(overlay_directory)
        if alive is False:
            return ()
        # a user may have appeared since the first check
        users = users_besides(None, overlay_directory)
        return users or ((UNNAMED_USER,) if alive else ())


def _mounts_at(rootfs: str, overlay_directory: str) -> list[Mount]:
    """The mounts on a rootfs, from the topmost one down to the bundle's overlay; none if that is not mounted.

    Raises:
        OSError: /proc cannot be read.
    """
    try:
        descriptor = os.open(rootfs, _ROOTFS)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if error.errno == errno.ELOOP:
            return []
        raise
    try:
        topmost = mount_id_of(descriptor)
    finally:
        os.close(descriptor)
    mounts, option = own_mounts(), overlay_option(overlay_directory)
    found: list[Mount] = []
    mount = mounts.get(topmost)
    while mount is not None:
        found.append(mount)
        if is_overlay_of(mount, option):
            return found
        below = mounts.get(mount.parent_id)
        mount = below if below is not None and below.mount_point == mount.mount_point else None
    return []


@contextmanager
def _proc_errors() -> Iterator[None]:
    with storage_errors("reading the list of mounts", "/proc"):
        yield
