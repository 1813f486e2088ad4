"""The image's User -> numbers, looked up in the image's own /etc/passwd and /etc/group.

`User` is `user`, `uid`, `user:group`, `uid:gid` or any mixture (OCI config.md). The meaning is Docker's
(moby/sys/user, GetExecUser): a name must be there; a number need not be, and is never taken for a name, or the
image could give its `1000` the uid 0 (CVE-2016-3697). Without a group the user's own group counts, and the groups
that list the user are supplementary; with a group there are none of these. No User is uid 0.

The user's group is always among the supplementary ones as well. Without it a process could shed its group, and
with it the permissions that are denied to that group (CVE-2022-36109, CVE-2022-2989, CVE-2023-25173).

The files are the image's, and hostile: they are read from inside of it and up to a bound, and lines that are
malformed are as good as absent. A file that is there but cannot be read is an error, not an absent one: the
process would get another group than it should.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from guestpull_server.bundle import image_files
from guestpull_server.errors import NoSuchUser, storage_errors
from guestpull_server.models import MiB

_MAX_FILE_BYTES: Final = 4 * MiB
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
    """A line of group(5)."""

    name: str
    gid: int
    members: tuple[str, ...]


def user_of(user: str, rootfs: str) -> ProcessUser:
    """Look a User up.

    Args:
        user: as the image config has it.
        rootfs: the mounted root filesystem.

    Raises:
        NoSuchUser: it names a user or a group that is not there, or a number that cannot be.
        StorageFailed: the operating system refuses to read the image's files.
    """
    accounts = read_accounts(_lines(rootfs, "etc/passwd"))
    groups = read_groups(_lines(rootfs, "etc/group"))
    return resolve(user, accounts, groups)


def resolve(user: str, accounts: Iterable[Account], groups: Iterable[Group]) -> ProcessUser:
    """Find a User among accounts and groups, of which no more are looked at than it takes.

    Raises:
        NoSuchUser: see `user_of`.
    """
    name, _, group_name = user.partition(":")
    account = _account(user, name or "0", accounts)
    if group_name:
        gid = _gid(user, group_name, groups)
        return ProcessUser(account.uid, gid, (gid,))
    listing = (group.gid for group in groups if account.name and account.name in group.members)
    return ProcessUser(account.uid, account.gid, tuple(dict.fromkeys((account.gid, *listing))))


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
            members = fields[3].split(",") if len(fields) > 3 else []
            with suppress(ValueError):
                yield Group(
                    fields[0], _id(fields[2]), tuple(name.strip() for name in members if name.strip())
                )


def _id(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 10 or int(text) > _MAX_ID:
        raise ValueError(text)
    return int(text)


def _lines(rootfs: str, path: str) -> list[str]:
    """The lines of a file of the image; none where it has no such file."""
    with storage_errors("looking up the image's User", os.path.join(rootfs, path)):
        content = image_files.read(rootfs, path, _MAX_FILE_BYTES) or b""
    if len(content) == _MAX_FILE_BYTES:
        # half a line is none: `shop:x:1000:10` may have been the user of group 1000
        content = content[: content.rfind(b"\n") + 1]
    return [line.strip() for line in content.decode("utf-8", "surrogateescape").split("\n")]
