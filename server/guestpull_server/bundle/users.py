"""The image's User -> numbers, looked up in the image's own /etc/passwd and /etc/group.

`User` is `user`, `uid`, `user:group`, `uid:gid` or any mixture (OCI config.md). The meaning is Docker's
(moby/sys/user, GetExecUser): a name must be there; a number need not be; without a group the user's own group
counts, and the groups that list the user are supplementary; with a group there are none.

The files are the image's, and hostile: they are opened within the rootfs, so that no link leads out of it
(openat2(2), RESOLVE_IN_ROOT), read up to a bound, and lines that are malformed are as good as absent.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from guestpull_server.errors import NoSuchUser
from guestpull_server.models import MiB

_SYS_OPENAT2: Final = 437
_RESOLVE_IN_ROOT: Final = 0x10
_MAX_FILE_BYTES: Final = 4 * MiB
_MAX_ID: Final = (1 << 32) - 2  # the last one means "leave it" to the kernel
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True, slots=True)
class ProcessUser:
    """Who a container's process runs as."""

    uid: int
    gid: int
    additional_gids: tuple[int, ...] = ()


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
        user: as the image config has it; empty is root.
        rootfs: the mounted root filesystem.

    Raises:
        NoSuchUser: it names a user or a group that is not there, or a number that cannot be.
    """
    if not user:
        return ProcessUser(0, 0)
    passwd = read_accounts(_lines(rootfs, "etc/passwd"))
    group = read_groups(_lines(rootfs, "etc/group"))
    return resolve(user, tuple(passwd), tuple(group))


def resolve(user: str, accounts: Iterable[Account], groups: Iterable[Group]) -> ProcessUser:
    """Find a User among accounts and groups.

    Raises:
        NoSuchUser: see `user_of`.
    """
    name, colon, group_name = user.partition(":")
    account = _account(user, name, accounts) if name else Account("root", 0, 0)
    groups = tuple(groups)
    if colon and group_name:
        return ProcessUser(account.uid, _gid(user, group_name, groups))
    additional = (group.gid for group in groups if account.name and account.name in group.members)
    return ProcessUser(account.uid, account.gid, tuple(dict.fromkeys(additional)))


def _account(user: str, name: str, accounts: Iterable[Account]) -> Account:
    number = _number(user, name)
    for account in accounts:
        # as in Docker, a name that looks like a number may be either
        if account.name == name or account.uid == number:
            return account
    if number is None:
        raise NoSuchUser(user, f"the image's /etc/passwd has no user {name!r}")
    return Account("", number, 0)


def _gid(user: str, name: str, groups: Iterable[Group]) -> int:
    number = _number(user, name)
    for group in groups:
        if group.name == name or group.gid == number:
            return group.gid
    if number is None:
        raise NoSuchUser(user, f"the image's /etc/group has no group {name!r}")
    return number


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
    try:
        descriptor = _open_within(rootfs, path)
    except OSError:
        return []
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return []
        content = b""
        while len(content) < _MAX_FILE_BYTES and (
            more := os.read(descriptor, _MAX_FILE_BYTES - len(content))
        ):
            content += more
    finally:
        os.close(descriptor)
    return [line.strip() for line in content.decode("utf-8", "surrogateescape").split("\n")]


def _open_within(rootfs: str, path: str) -> int:
    """Open a file for reading as a process would whose root directory is `rootfs`."""
    root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # O_NONBLOCK: a fifo in the place of the file must not hold us up
        how = struct.pack(
            "QQQ", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0, _RESOLVE_IN_ROOT
        )
        result = int(
            _libc.syscall(
                ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(root), path.encode(), how, ctypes.c_size_t(len(how))
            )
        )
    finally:
        os.close(root)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result
