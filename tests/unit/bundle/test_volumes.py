"""The image's Volumes -> mounts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.bundle import volumes as bundle_volumes
from guestpull_server.bundle.image_files import ImageFiles
from guestpull_server.bundle.spec import Mount
from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import LimitExceeded
from guestpull_server.models import GiB, MiB


def mounts_of(volumes: list[str], rootfs: str, limits: Limits | None = None) -> list[Mount]:
    limits = limits or Limits()
    return bundle_volumes.mounts_of(volumes, ImageFiles(rootfs, limits, Cancellation("pull")), limits)


def test_a_volume_that_is_missing_in_the_image_is_a_tmpfs(tmp_path: Path) -> None:
    (mount,) = mounts_of(["/data"], str(tmp_path))

    assert (mount.destination, mount.type, mount.source) == ("/data", "tmpfs", "tmpfs")
    assert mount.options == ["rw", "nosuid", "nodev", "relatime", f"size={GiB}", "mode=0755"]


def test_a_volume_has_the_owner_and_the_mode_of_the_image_s_directory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o1770)

    (mount,) = mounts_of(["/data"], str(tmp_path))

    assert mount.options[-3:] == ["mode=1770", f"uid={os.geteuid()}", f"gid={os.getegid()}"]


def test_a_volume_has_the_size_that_is_configured(tmp_path: Path) -> None:
    (mount,) = mounts_of(["/data"], str(tmp_path), Limits(volume_bytes=5 * MiB))

    assert f"size={5 * MiB}" in mount.options


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_a_volume_in_which_the_image_has_content_stays_in_the_rootfs(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    (tmp_path / "data").mkdir()
    make(tmp_path / "data/content")

    assert mounts_of(["/data"], str(tmp_path)) == []


def test_of_nested_volumes_the_inner_empty_one_is_a_tmpfs(tmp_path: Path) -> None:
    (tmp_path / "data/empty").mkdir(parents=True)

    assert [mount.destination for mount in mounts_of(["/data/empty", "/data"], str(tmp_path))] == [
        "/data/empty"
    ]


def test_nested_volumes_that_are_missing_are_mounted_outer_one_first(tmp_path: Path) -> None:
    mounts = mounts_of(["/data/inner", "/data"], str(tmp_path))

    assert [mount.destination for mount in mounts] == ["/data", "/data/inner"]


def test_too_many_volumes_are_refused_by_their_limit(tmp_path: Path) -> None:
    volumes = [f"/volume{number}" for number in range(257)]

    assert len(mounts_of(volumes[:256], str(tmp_path))) == 256
    with pytest.raises(LimitExceeded) as caught:
        mounts_of(volumes, str(tmp_path))

    assert caught.value.limit == "max_volumes"


def test_a_path_is_resolved_as_in_the_container(tmp_path: Path) -> None:
    volumes = ["data", "//data/", "/data/.", "/x/../data", "/../../data"]

    assert [mount.destination for mount in mounts_of(volumes, str(tmp_path))] == ["/data"]


@pytest.mark.parametrize(
    "path", ["/", "", "/..", "/proc", "/proc/sys", "/sys/fs", "/dev", "/dev/shm", "/x/../dev"]
)
def test_mounts_of_the_runtime_are_not_mounted_over(tmp_path: Path, path: str) -> None:
    assert mounts_of([path], str(tmp_path)) == []


def test_only_directories_are_mounted_over(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"a file")

    assert mounts_of(["/data", "/data/below"], str(tmp_path)) == []


def test_a_link_is_looked_at_within_the_image(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o700)
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "rootfs/data").symlink_to(outside)

    (mount,) = mounts_of(["/data"], str(tmp_path / "rootfs"))

    assert "mode=0755" in mount.options


@pytest.mark.parametrize("path", ["/link", "/link/self", "/link/1/attr", "/up/self", "/chain"])
@pytest.mark.parametrize("own", ["proc", "dev", "sys"])
def test_no_link_leads_a_volume_over_what_the_runtime_mounts_itself(
    tmp_path: Path, path: str, own: str
) -> None:
    (tmp_path / own).mkdir()
    (tmp_path / "link").symlink_to(f"/{own}")
    (tmp_path / "up").symlink_to(f"../../{own}")
    (tmp_path / "chain").symlink_to("link/self")

    assert mounts_of([path], str(tmp_path)) == []


def test_volumes_that_resolve_to_the_same_path_are_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "var").mkdir()
    (tmp_path / "var/run").symlink_to("/run")

    mounts = mounts_of(["/var/run", "/run", "/var/run/lock"], str(tmp_path))

    assert [mount.destination for mount in mounts] == ["/run", "/run/lock"]


def test_a_loop_of_links_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")

    assert mounts_of(["/loop", "/loop/data"], str(tmp_path)) == []


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("rootfs"))


@given(st.lists(st.text()))
def test_any_volumes_are_mounts_within_the_container(empty: str, volumes: list[str]) -> None:
    for mount in mounts_of(volumes, empty):
        assert mount.destination.startswith("/")
        assert ".." not in mount.destination.split("/")
