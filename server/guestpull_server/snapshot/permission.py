"""Checks at a daemon's start whether this process may mount."""

from __future__ import annotations

import errno
from typing import Final

from guestpull_server.errors import MayNotMount
from guestpull_server.snapshot.syscalls import FilesystemContext

_CAP_SYS_ADMIN: Final = 1 << 21


def check_may_mount() -> None:
    """Check that this process may mount overlays.

    Raises:
        MayNotMount: this process may not, or the kernel has no overlayfs.
    """
    try:
        with FilesystemContext("overlay"):
            return
    except OSError as error:
        raise MayNotMount(*_refusal(error)) from None


def _refusal(error: OSError) -> tuple[str, str]:
    """What prevents mounting, and what to do about it."""
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    if not int(status.get("CapEff", "0"), 16) & _CAP_SYS_ADMIN:
        return "it lacks CAP_SYS_ADMIN", "Start it as root; in a container, add that capability."
    if error.errno == errno.ENODEV:
        return "this kernel has no overlayfs", "Load the module (modprobe overlay)."
    refused = f"fsopen(2) fails with {error.strerror!r}"
    if status.get("Seccomp", "0").strip() != "0":
        return (
            f"{refused}, and a seccomp filter is in force",
            "Allow fsopen, fsconfig, fsmount, move_mount, mount and umount2 in that filter.",
        )
    return refused, "Use Linux 5.6 or newer, in a user namespace that owns the mount namespace."
