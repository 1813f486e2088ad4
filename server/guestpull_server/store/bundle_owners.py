"""Bundle directories that no other user of the machine can replace.

An image may hold setuid programs and devices, and a runtime runs what config.json says as root. Who can rename a
bundle's directory, or one above it, can put another in its place. So each directory on the way to a bundle, and
each link that leads there, belongs to root or the daemon's user, and others may write in none of them. In a sticky
directory like /tmp they may: there nobody can rename what belongs to another user.

Once this holds for a directory, only root and the daemon's user can change what its names lead to. The checks go
from the root directory down, so no other user can act between the check and the use of an existing entry. What did
not exist yet is checked again, through its descriptor, when it is made (bundle_paths.py).
"""

from __future__ import annotations

import os
import stat
from typing import Final

from guestpull_server.errors import InvalidBundlePath
from guestpull_server.store.access import is_other_user, lets_others_write

_MAX_LINKS: Final = 40  # as many as the kernel follows


def refuse_others(told: str, place: str, status: os.stat_result) -> None:
    """Make sure that other users can replace neither a directory nor a link, nor what is in it.

    Args:
        told: the bundle's path, for the error.
        place: the path of the directory or link.
        status: its status.

    Raises:
        InvalidBundlePath: they can.
    """
    if is_other_user(status.st_uid):
        problem = f"{place} belongs to user {status.st_uid}, who may replace what is in it"
        owner = os.geteuid()
        raise InvalidBundlePath(
            told, f"{problem}; use a directory of user {owner}, or run `chown {owner} {place}`"
        )
    if stat.S_ISDIR(status.st_mode) and lets_others_write(status) and not status.st_mode & stat.S_ISVTX:
        problem = f"other users may replace what is in {place}"
        raise InvalidBundlePath(told, f"{problem}; use another directory, or run `chmod go-w {place}`")


def real_path(path: str, told: str) -> str:
    """The real path of an absolute path; what does not exist is taken as it is named.

    Args:
        path: without `..` in it.
        told: the bundle's path, for the error.

    Raises:
        InvalidBundlePath: another user can replace a directory or a link on the way, links lead on and on, or the
            operating system refuses to say.
    """
    here = "/"
    ahead = path.split("/")[::-1]
    links = 0
    try:
        refuse_others(told, here, os.lstat(here))
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
                refuse_others(told, place, status)
                links += 1
                if links > _MAX_LINKS:
                    raise InvalidBundlePath(told, "it leads through too many links")
                target = os.readlink(place)
                here = "/" if target.startswith("/") else here
                ahead += target.split("/")[::-1]
            elif stat.S_ISDIR(status.st_mode):
                refuse_others(told, place, status)
                here = place
            else:
                raise InvalidBundlePath(told, f"{place} is a file")
    except FileNotFoundError:
        return os.path.normpath(os.path.join(place, *reversed(ahead)))
    except OSError as error:
        raise InvalidBundlePath(told, f"{error.filename}: {error.strerror}") from None
    return here
