"""Directories that no other user of the machine may enter, write to, or replace.

An image may contain setuid files and device nodes, and a runtime runs what config.json names, as root.

The work directory. Each directory in it is 0700, whoever created it. Container processes are not affected: they
reach a layer through its mount. The work directory itself may be a mount point or may have been created by
image-rs: we create it 0700, and leave an existing one readable, because its directories are closed. But nobody
else may write to it, and so replace one of them.

Bundles. Whoever can rename a bundle's directory, or a directory above it, can replace it. So each directory on the
way to a bundle, and each link, must belong to root or the daemon's user, and must not be writable for others. It
may be sticky like /tmp, where nobody can rename what belongs to another user. Once this holds for a directory,
only root and the daemon's user can change what its names lead to. The checks start at the root directory, so no
other user can interfere between the check and the use of an existing entry. Directories that do not exist yet are
checked again, through their descriptors, when they are created (bundle_paths.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from typing import Final

from guestpull_server.errors import InsecureWorkDir, InvalidBundlePath

_CLOSED: Final = 0o700
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
_MAX_LINKS: Final = 40  # the kernel's limit

# -- the work directory -------------------------------------------------------------------------------------


def secure_work_dir(path: str, own_names: Collection[str]) -> None:
    """Ensure that nobody else can replace what is in a work directory.

    Args:
        path: the work directory.
        own_names: what a work directory contains. If it contains nothing else, its mode is changed. A directory
            that is used for other things as well, like /tmp, keeps its mode.

    Raises:
        InsecureWorkDir: it belongs to another user, or others can replace what is in it.
        OSError: the operating system refuses.
    """
    status = _owned(path)
    if not _is_writable_for_others(status):
        return
    if all(name in own_names for name in os.listdir(path)):
        os.chmod(path, stat.S_IMODE(status.st_mode) & ~_WRITABLE_BY_OTHERS)
    elif not status.st_mode & stat.S_ISVTX:
        raise InsecureWorkDir(
            path, "other users may write in it", f"Run `chmod go-w {path}`, or choose another --work-dir."
        )


def secure_directory(path: str) -> None:
    """Close a directory of the work directory to others.

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
    """Return the status of a directory that belongs to the daemon's user or root, as must a link to it.

    Raises:
        InsecureWorkDir: it belongs to another user.
        OSError: the operating system refuses.
    """
    status = os.stat(path)
    for owner in (os.lstat(path).st_uid, status.st_uid):
        if _is_other_user(owner):
            raise InsecureWorkDir(
                path,
                f"it belongs to user {owner}, who may put files of their own in it",
                f"Check what is in it and run `chown {os.geteuid()} {path}`, or choose another --work-dir.",
            )
    return status


# -- bundles ------------------------------------------------------------------------------------------------


def refuse_others(requested: str, place: str, status: os.stat_result) -> None:
    """Ensure that other users can replace neither a directory or link nor what is in it.

    Args:
        requested: the bundle's path, for the error.
        place: the path of the directory or link.
        status: its status.

    Raises:
        InvalidBundlePath: they can.
    """
    if _is_other_user(status.st_uid):
        problem = f"{place} belongs to user {status.st_uid}, who may replace what is in it"
        owner = os.geteuid()
        raise InvalidBundlePath(
            requested, f"{problem}; use a directory of user {owner}, or run `chown {owner} {place}`"
        )
    if stat.S_ISDIR(status.st_mode) and _is_writable_for_others(status) and not status.st_mode & stat.S_ISVTX:
        problem = f"other users may replace what is in {place}"
        raise InvalidBundlePath(requested, f"{problem}; use another directory, or run `chmod go-w {place}`")


def real_path(path: str, requested: str) -> str:
    """Resolve the links in an absolute path; keep names that do not exist.

    Args:
        path: a path without `..`.
        requested: the bundle's path, for the error.

    Raises:
        InvalidBundlePath: another user can replace a directory or a link on the way, there are too many links, or
            the operating system refuses.
    """
    here = "/"
    ahead = path.split("/")[::-1]
    links = 0
    try:
        refuse_others(requested, here, os.lstat(here))
        while ahead:
            name = ahead.pop()
            if name in ("", "."):
                continue
            if name == "..":
                here = os.path.dirname(here)
                continue
            place = os.path.join(here, name)
            status = os.lstat(place)
            if stat.S_ISLNK(status.st_mode):
                refuse_others(requested, place, status)
                links += 1
                if links > _MAX_LINKS:
                    raise InvalidBundlePath(requested, "it leads through too many links")
                target = os.readlink(place)
                here = "/" if target.startswith("/") else here
                ahead += target.split("/")[::-1]
            elif stat.S_ISDIR(status.st_mode):
                refuse_others(requested, place, status)
                here = place
            else:
                raise InvalidBundlePath(requested, f"{place} is a file")
    except FileNotFoundError:
        return os.path.normpath(os.path.join(place, *reversed(ahead)))
    except OSError as error:
        raise InvalidBundlePath(requested, f"{error.filename}: {error.strerror}") from None
    return here


def _is_other_user(uid: int) -> bool:
    """Return whether a user is neither root nor the daemon's own."""
    return uid not in (0, os.geteuid())


def _is_writable_for_others(status: os.stat_result) -> bool:
    """Return whether anybody but the daemon's user, its group, and root may write to a directory."""
    own_groups = (0, os.getegid())
    return bool(
        status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and status.st_gid not in own_groups)
    )
