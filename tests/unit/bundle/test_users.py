"""The image's User -> numbers."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.bundle.users import (
    Account,
    Group,
    ProcessUser,
    read_accounts,
    read_groups,
    resolve,
    user_of,
)
from guestpull_server.errors import NoSuchUser

ACCOUNTS = (Account("root", 0, 0), Account("shop", 1000, 1001), Account("1234", 7, 8))
GROUPS = (
    Group("root", 0, ()),
    Group("shop", 1001, ()),
    Group("audit", 2000, ("shop", "root")),
    Group("wheel", 10, ("shop",)),
)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("shop", ProcessUser(1000, 1001, (2000, 10))),
        ("1000", ProcessUser(1000, 1001, (2000, 10))),
        ("shop:wheel", ProcessUser(1000, 10)),
        ("shop:10", ProcessUser(1000, 10)),
        ("shop:", ProcessUser(1000, 1001, (2000, 10))),
        ("4242", ProcessUser(4242, 0)),
        ("4242:4343", ProcessUser(4242, 4343)),
        (":wheel", ProcessUser(0, 10)),
        ("0", ProcessUser(0, 0, (2000,))),
        ("1234", ProcessUser(7, 8)),
        ("4294967294", ProcessUser(4294967294, 0)),
    ],
)
def test_a_user_is_what_docker_takes_it_for(user: str, expected: ProcessUser) -> None:
    assert resolve(user, ACCOUNTS, GROUPS) == expected


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
def test_a_user_that_is_not_there_is_an_error_and_never_root(user: str) -> None:
    with pytest.raises(NoSuchUser):
        resolve(user, ACCOUNTS, GROUPS)


def rootfs_of(directory: Path, passwd: bytes, group: bytes = b"") -> str:
    (directory / "etc").mkdir()
    (directory / "etc/passwd").write_bytes(passwd)
    (directory / "etc/group").write_bytes(group)
    return str(directory)


def test_lines_that_are_malformed_are_as_good_as_absent(tmp_path: Path) -> None:
    malformed = b"\n# comment\nshop\nshop:x\nshop:x:abc:1\nshop:x:-5:1\nshop:x:7:99999999999\n\xff\xfe\n"
    passwd = malformed + b"shop:x:5:6::/:/bin/sh"
    assert user_of("shop", rootfs_of(tmp_path, passwd, b"bad\nother:x:9:shop,,\n")) == ProcessUser(5, 6, (9,))


def test_no_link_leads_out_of_the_image(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("shop:x:5:6::/:/bin/sh\n")
    rootfs = tmp_path / "rootfs"
    (rootfs / "etc").mkdir(parents=True)
    for target in (str(outside), "../../outside", "/outside"):
        with contextlib.suppress(FileNotFoundError):
            (rootfs / "etc/passwd").unlink()
        (rootfs / "etc/passwd").symlink_to(target)
        with pytest.raises(NoSuchUser):
            user_of("shop", str(rootfs))


def test_links_within_the_image_are_followed_as_within_a_container(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr/passwd").write_text("shop:x:5:6::/:/bin/sh\n")
    (tmp_path / "etc/passwd").symlink_to("/usr/passwd")

    assert user_of("shop", str(tmp_path)) == ProcessUser(5, 6)


def test_a_fifo_in_the_place_of_passwd_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    os.mkfifo(tmp_path / "etc/passwd")

    with pytest.raises(NoSuchUser):
        user_of("shop", str(tmp_path))


def test_an_image_without_files_has_numbers_only(tmp_path: Path) -> None:
    assert user_of("", str(tmp_path)) == ProcessUser(0, 0)
    assert user_of("5:6", str(tmp_path)) == ProcessUser(5, 6)
    with pytest.raises(NoSuchUser):
        user_of("root:staff", str(tmp_path))


@given(st.text(), st.lists(st.text()), st.lists(st.text()))
def test_any_user_in_any_files_is_numbers_or_a_named_error(
    user: str, passwd: list[str], group: list[str]
) -> None:
    with contextlib.suppress(NoSuchUser):
        found = resolve(user, read_accounts(passwd), read_groups(group))
        assert 0 <= found.uid < 2**32 - 1
        assert 0 <= found.gid < 2**32 - 1
