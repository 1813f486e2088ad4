"""Resolves the image's User to uid and gids, with the image's own /etc/passwd and /etc/group.

`User` is `user`, `uid`, `user:group`, `uid:gid` or a mixture (OCI config.md), with Docker's meaning
(moby/sys/user, GetExecUser). A name must exist. A number need not exist, and is never looked up as a name: an
image could otherwise map the name `1000` to uid 0 (CVE-2016-3697). Without a group, the gid is that of the
user, and the groups that list the user are supplementary. With a group, there are no supplementary groups from
/etc/group. An empty User is uid 0.

The gid is always a supplementary group too. Otherwise a process could drop it, and with it the permissions that
files deny to that group (CVE-2022-36109, CVE-2022-2989, CVE-2023-25173).

The files are hostile. They are looked up inside the image, and malformed lines are skipped. A file that is too
large or unreadable is an error, because the process would get the wrong groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from guestpull_server.bundle.image_files import ImageFiles
from guestpull_server.config import Limits
from guestpull_server.errors import LimitExceeded, NoSuchUser, storage_errors

_MAX_ID: Final = (1 << 32) - 2  # to chown(2), 2**32 - 1 means "do not change"


@dataclass(frozen=True, slots=True)
class ProcessUser:
    """The user of a container's process; `additional_gids` begins with `gid`."""

    uid: int
    gid: int
    additional_gids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Account:
    """A line of passwd(5)."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Group:
    """A line of group(5); `members` is not split at its commas, because a line may have a million members."""

    name: str
    gid: int
    members: str

    def lists(self, user: str) -> bool:
        """Whether a user is a member of the group."""
        return f",{user}," in f",{self.members},"


def user_of(user: str, files: ImageFiles, limits: Limits) -> ProcessUser:
    """Look up a User.

    Args:
        user: the User of the image config.
        files: the image's files.
        limits: bounds on the size of the files and the number of groups.

    Raises:
        NoSuchUser: the user or the group does not exist, or a number is out of range.
        LimitExceeded: a file is too large, or the user is in too many groups.
        StorageFailed: the image's files cannot be read.
        Cancelled: the caller cancelled.
        DeadlineExceeded: the deadline has passed.
    """
    accounts = read_accounts(_lines(files, "etc/passwd"))
    groups = read_groups(_lines(files, "etc/group"))
    return resolve(user, accounts, groups, limits.max_groups)


def resolve(user: str, accounts: Iterable[Account], groups: Iterable[Group], max_groups: int) -> ProcessUser:
    """Find a User among accounts and groups; read only as many as needed.

    Raises:
        NoSuchUser: the user or the group does not exist, or a number is out of range.
        LimitExceeded: the user is in more than `max_groups` groups.
    """
    name, _, group_name = user.partition(":")
    account = _account(user, name or "0", accounts)
    if group_name:
        gid = _gid(user, group_name, groups)
        return ProcessUser(account.uid, gid, (gid,))
    gids = {account.gid: None}
    for group in groups:
        if account.name and group.lists(account.name):
            gids[group.gid] = None
            if len(gids) > max_groups:
                raise LimitExceeded("the number of the image user's groups", "max_groups", max_groups)
    return ProcessUser(account.uid, account.gid, tuple(gids))


def _account(user: str, name: str, accounts: Iterable[Account]) -> Account:
    number = _number(user, name)
    for account in accounts:
        if account.name == name if number is None else account.uid == number:
            return account
    if number is None:
        raise NoSuchUser(user, f"the image's /etc/passwd has no user {name!r}")
    return Account("", number, 0)


def _gid(user: str, name: str, groups: Iterable[Group]) -> int:
    number = _number(user, name)
    if number is not None:
        return number
    for group in groups:
        if group.name == name:
            return group.gid
    raise NoSuchUser(user, f"the image's /etc/group has no group {name!r}")


def _number(user: str, text: str) -> int | None:
    if not (text.isascii() and text.isdecimal()):
        return None
    if len(text) > 10 or int(text) > _MAX_ID:
        raise NoSuchUser(user, f"id {text[:40]} is out of range")
    return int(text)


def read_accounts(lines: Iterable[str]) -> Iterator[Account]:
    """Parse the lines of a passwd file; skip malformed ones."""
    for line in lines:
        fields = line.split(":")
        if len(fields) >= 4 and fields[0]:
            with suppress(ValueError):
                yield Account(fields[0], _id(fields[2]), _id(fields[3]))


def read_groups(lines: Iterable[str]) -> Iterator[Group]:
    """Parse the lines of a group file; skip malformed ones."""
    for line in lines:
        fields = line.split(":")
        if len(fields) >= 3 and fields[0]:
            with suppress(ValueError):
                yield Group(fields[0], _id(fields[2]), fields[3] if len(fields) > 3 else "")


def _id(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 10 or int(text) > _MAX_ID:
        raise ValueError(text)
    return int(text)


def _lines(files: ImageFiles, path: str) -> Iterator[str]:
    """The lines of one of the image's files; none if it does not exist."""
    with storage_errors("looking up the image's User", path):
        lines = files.lines(path)
    return (line.decode("utf-8", "surrogateescape").strip() for line in lines)
