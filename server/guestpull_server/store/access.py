"""Who may reach what lies in a work directory: nobody but the daemon's user.

A layer may hold setuid files and device nodes. Another user of this machine must not reach them by their paths, so
each room of a work directory is 0700, whoever made it. A container's processes are not affected: they reach a
layer through its mount.

The work directory itself may be a mount point, or may have been made by image-rs. One that we make is 0700; one
that exists stays readable, because its rooms are closed; but nobody else may write in it, and so replace a room.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection

from guestpull_server.errors import InsecureWorkDir

_CLOSED = 0o700
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def secure_work_dir(path: str, own_names: Collection[str]) -> None:
    """Make sure that nobody else can replace what is in a work directory.

    Args:
        path: the work directory.
        own_names: what a work directory holds. Where there is nothing else in it, its mode is changed; a directory
            that is used for other things as well, like /tmp, is left as it is.

    Raises:
        InsecureWorkDir: it belongs to another user, or others may replace what is in it.
        OSError: the operating system refuses.
    """
    status = _owned(path)
    if not lets_others_write(status):
        return
    if all(name in own_names for name in os.listdir(path)):
        os.chmod(path, stat.S_IMODE(status.st_mode) & ~_WRITABLE_BY_OTHERS)
    elif not status.st_mode & stat.S_ISVTX:
        raise InsecureWorkDir(
            path, "other users may write in it", f"Run `chmod go-w {path}`, or choose another --work-dir."
        )


def secure_room(path: str) -> None:
    """Close a room of a work directory to others.

    Raises:
        InsecureWorkDir: it belongs to another user, or its mode cannot be changed.
        OSError: the operating system refuses.
    """
    if stat.S_IMODE(_owned(path).st_mode) == _CLOSED:
        return
    try:
        os.chmod(path, _CLOSED)
    except OSError as error:
        problem = f"other users may enter it, and its mode cannot be changed ({error.strerror})"
        remedy = "Run `chmod 0700` on it where it is made, or name its store in additional_stores."
        raise InsecureWorkDir(path, problem, remedy) from error


def _owned(path: str) -> os.stat_result:
    """The status of a directory that belongs to the daemon's user, or to root; so must a link that leads to it.

    Raises:
        InsecureWorkDir: it belongs to another user.
        OSError: the operating system refuses.
    """
    status = os.stat(path)
    for owner in (os.lstat(path).st_uid, status.st_uid):
        if is_other_user(owner):
            raise InsecureWorkDir(
                path,
                f"it belongs to user {owner}, who may put files of their own in it",
                f"Check what is in it and run `chown {os.geteuid()} {path}`, or choose another --work-dir.",
            )
    return status


def is_other_user(uid: int) -> bool:
    """Whether a user is neither root nor the daemon's own."""
    return uid not in (0, os.geteuid())


def lets_others_write(status: os.stat_result) -> bool:
    """Whether anybody but the daemon's user, its group, and root may write in a directory."""
    own_groups = (0, os.getegid())
    return bool(
        status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and status.st_gid not in own_groups)
    )
