"""The image's User -> numbers."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.bundle import users
from guestpull_server.bundle.image_files import ImageFiles
from guestpull_server.bundle.users import (
    Account,
    Group,
    ProcessUser,
    read_accounts,
    read_groups,
)
from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import Cancelled, LimitExceeded, NoSuchUser, StorageFailed
from guestpull_server.models import MiB
from support.bundles import CancelledAtCheck

ACCOUNTS = (Account("root", 0, 0), Account("shop", 1000, 1001))
GROUPS = (
    Group("root", 0, ""),
    Group("shop", 1001, ""),
    Group("audit", 2000, "shop,root"),
    Group("wheel", 10, "shop"),
)


def resolve(user: str, accounts: Iterable[Account], groups: Iterable[Group]) -> ProcessUser:
    return users.resolve(user, accounts, groups, Limits().max_groups)


def user_of(user: str, rootfs: str) -> ProcessUser:
    return users.user_of(user, ImageFiles(rootfs, Limits(), Cancellation("pull")), Limits())


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("shop", ProcessUser(1000, 1001, (1001, 2000, 10))),
        ("1000", ProcessUser(1000, 1001, (1001, 2000, 10))),
        ("shop:wheel", ProcessUser(1000, 10, (10,))),
        ("shop:10", ProcessUser(1000, 10, (10,))),
        ("shop:", ProcessUser(1000, 1001, (1001, 2000, 10))),
        ("4242", ProcessUser(4242, 0, (0,))),
        ("4242:4343", ProcessUser(4242, 4343, (4343,))),
        ("4294967294", ProcessUser(4294967294, 0, (0,))),
    ],
)
def test_a_user_is_resolved_as_by_docker(user: str, expected: ProcessUser) -> None:
    assert resolve(user, ACCOUNTS, GROUPS) == expected


@pytest.mark.parametrize("user", ["", "0", "root", ":", "root:"])
def test_an_empty_user_is_root_with_root_s_groups(user: str) -> None:
    assert resolve(user, ACCOUNTS, GROUPS) == ProcessUser(0, 0, (0, 2000))


def test_a_number_is_never_taken_for_a_name() -> None:
    accounts = (Account("1234", 0, 0), *ACCOUNTS)
    groups = (Group("1235", 0, ""), *GROUPS)

    assert resolve("1234", accounts, groups) == ProcessUser(1234, 0, (0,))
    assert resolve("shop:1235", accounts, groups) == ProcessUser(1000, 1235, (1235,))


@given(st.sampled_from(["shop", "1000", "shop:wheel", "shop:10", "root", "4242", ""]))
def test_a_process_cannot_shed_its_group(user: str) -> None:
    found = resolve(user, ACCOUNTS, GROUPS)
    assert found.gid in found.additional_gids


@pytest.mark.parametrize(
    "user",
    [
        "ghost",
        "shop:ghosts",
        "4294967295",
        "99999999999",
        "0:4294967295",
        "-1",
        "\uff11",
        "shop:wheel:x",
        " shop",
    ],
)
def test_an_unknown_user_is_an_error_and_never_root(user: str) -> None:
    with pytest.raises(NoSuchUser):
        resolve(user, ACCOUNTS, GROUPS)


def rootfs_of(directory: Path, passwd: bytes, group: bytes = b"") -> str:
    (directory / "etc").mkdir()
    (directory / "etc/passwd").write_bytes(passwd)
    (directory / "etc/group").write_bytes(group)
    return str(directory)


def test_malformed_lines_are_skipped(tmp_path: Path) -> None:
    malformed = b"\n# comment\nshop\nshop:x\nshop:x:abc:1\nshop:x:-5:1\nshop:x:7:99999999999\n\xff\xfe\n"
    rootfs = rootfs_of(tmp_path, malformed + b"shop:x:5:6::/:/bin/sh", b"bad\nother:x:9:shop,,\n")

    assert user_of("shop", rootfs) == ProcessUser(5, 6, (6, 9))


@pytest.mark.parametrize("file", ["passwd", "group"])
def test_a_file_beyond_its_limit_is_refused_and_not_cut(tmp_path: Path, file: str) -> None:
    rootfs = rootfs_of(tmp_path, b"shop:x:5:6::/:/bin/sh\n")
    with open(f"{rootfs}/etc/{file}", "ab") as grown:
        grown.truncate(4 * MiB + 1)

    with pytest.raises(LimitExceeded) as caught:
        user_of("shop", rootfs)

    assert caught.value.limit == "max_read_bytes"


def test_more_groups_than_the_kernel_takes_are_refused(tmp_path: Path) -> None:
    group = b"".join(b"g:x:%d:shop\n" % number for number in range(100_000, 100_000 + 65_536))
    rootfs = rootfs_of(tmp_path, b"shop:x:5:6::/:/bin/sh\n", group)

    with pytest.raises(LimitExceeded) as caught:
        user_of("shop", rootfs)

    assert caught.value.limit == "max_groups"


def test_a_cancelled_call_ends_the_search_for_a_user(tmp_path: Path) -> None:
    rootfs = rootfs_of(tmp_path, b"\n" * 100_000 + b"shop:x:5:6::/:/bin/sh\n")
    files = ImageFiles(rootfs, Limits(), CancelledAtCheck(20))

    with pytest.raises(Cancelled):
        users.user_of("shop", files, Limits())


def test_an_image_without_files_has_numbers_only(tmp_path: Path) -> None:
    assert user_of("", str(tmp_path)) == ProcessUser(0, 0, (0,))
    assert user_of("5:6", str(tmp_path)) == ProcessUser(5, 6, (6,))
    with pytest.raises(NoSuchUser):
        user_of("root", str(tmp_path))


def test_unreadable_files_do_not_count_as_absent(tmp_path: Path) -> None:
    rootfs = rootfs_of(tmp_path, b"shop:x:5:6::/:/bin/sh\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, hard))
    try:
        with pytest.raises(StorageFailed):
            user_of("5", rootfs)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@given(st.text(), st.lists(st.text()), st.lists(st.text()))
def test_any_user_in_any_files_is_numbers_or_a_named_error(
    user: str, passwd: list[str], group: list[str]
) -> None:
    with contextlib.suppress(NoSuchUser):
        found = resolve(user, read_accounts(passwd), read_groups(group))
        for number in (found.uid, found.gid, *found.additional_gids):
            assert 0 <= number < 2**32 - 1


@given(
    st.from_regex(r"[a-z_][a-z0-9_-]{0,15}", fullmatch=True),
    st.integers(0, 2**32 - 2),
    st.integers(0, 2**32 - 2),
)
def test_any_user_in_the_files_is_found(name: str, uid: int, gid: int) -> None:
    accounts = list(read_accounts([f"{name}:x:{uid}:{gid}:gecos:/home:/bin/sh"]))
    groups = list(read_groups([f"others:x:77:else,{name}", f"{name}:x:{gid}:"]))

    expected = ProcessUser(uid, gid, tuple(dict.fromkeys((gid, 77))))
    assert resolve(name, accounts, groups) == resolve(str(uid), accounts, groups) == expected
