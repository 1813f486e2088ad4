"""The image's User -> numbers, looked up in the image's own /etc/passwd and /etc/group.

`User` is `user`, `uid`, `user:group`, `uid:gid` or any mixture (OCI config.md). The meaning is Docker's
(moby/sys/user, GetExecUser): a name must be there; a number need not be, and is never taken for a name, or the
image could give its `1000` the uid 0 (CVE-2016-3697). Without a group the user's own group counts, and the groups
that list the user are supplementary; with a group there are none of these. No User is uid 0.

The user's group is always among the supplementary ones as well. Without it a process could shed its group, and
with it the permissions that are denied to that group (CVE-2022-36109, CVE-2022-2989, CVE-2023-25173).

The files are the image's, and hostile: they are looked up inside the image, and lines that are malformed count as
absent. A file that is too large or cannot be read is an error: the process would get other groups than it should.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from guestpull_server.bundle.image_files import ImageFiles
from guestpull_server.config import Limits
from guestpull_server.errors import LimitExceeded, NoSuchUser, storage_errors

_MAX_ID: Final = (1 << 32) - 2  # the last one means "leave it" to the kernel


@dataclass(frozen=True, slots=True)
class ProcessUser:
    """Who a container's process runs as; `additional_gids` begins with its `gid`."""

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
    """A line of group(5); `members` is a list with commas, as it is there: a line may be a million of them."""

    name: str
    gid: int
    members: str

    def lists(self, user: str) -> bool:
        """Whether a user is one of its members."""
        return f",{user}," in f",{self.members},"


def user_of(user: str, files: ImageFiles, limits: Limits) -> ProcessUser:
    """Look up a User.

    Args:
        user: as the image config has it.
        files: the image's files.
        limits: bound the number of groups.

    Raises:
        NoSuchUser: it names a user or a group that is not there, or a number that cannot be.
        LimitExceeded: a file is too large, or lists the user in too many groups.
        StorageFailed: the operating system refuses to read the image's files.
        Cancelled: the caller left.
        DeadlineExceeded: the caller's time is up.
    """
    accounts = read_accounts(_lines(files, "etc/passwd"))
    groups = read_groups(_lines(files, "etc/group"))
    return resolve(user, accounts, groups, limits.max_groups)


def resolve(user: str, accounts: Iterable[Account], groups: Iterable[Group], max_groups: int) -> ProcessUser:
    """Find a User among accounts and groups; looks at no more of them than needed.

    Raises:
        NoSuchUser: see `user_of`.
        LimitExceeded: the user is in more than `max_groups`.
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
        raise NoSuchUser(user, f"{text[:40]} is beyond the ids that there are")
    return int(text)


def read_accounts(lines: Iterable[str]) -> Iterator[Account]:
    """The lines of a passwd file that are well-formed."""
    for line in lines:
        fields = line.split(":")
        if len(fields) >= 4 and fields[0]:
            with suppress(ValueError):
                yield Account(fields[0], _id(fields[2]), _id(fields[3]))


def read_groups(lines: Iterable[str]) -> Iterator[Group]:
    """The lines of a group file that are well-formed."""
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
    """The lines of a file of the image; none where it has no such file."""
    with storage_errors("looking up the image's User", path):
        lines = files.lines(path)
    return (line.decode("utf-8", "surrogateescape").strip() for line in lines)
