"""Looking at files of an image without being led out of it."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest

from guestpull_server.bundle import image_files

BOUND = 100


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A rootfs with a file, beside a secret."""
    (tmp_path / "secret").write_bytes(b"secret")
    rootfs = tmp_path / "rootfs"
    (rootfs / "etc").mkdir(parents=True)
    (rootfs / "usr").mkdir()
    (rootfs / "usr/file").write_bytes(b"content")
    return rootfs


@pytest.mark.parametrize("target", ["../../secret", "../../../../../secret", "/secret", "{outside}/secret"])
def test_no_link_leads_out_of_the_image(image: Path, target: str) -> None:
    (image / "etc/passwd").symlink_to(target.format(outside=image.parent))

    assert image_files.read(str(image), "etc/passwd", BOUND) is None
    assert image_files.status(str(image), "etc/passwd") is None


@pytest.mark.parametrize("target", ["/usr/file", "../usr/file", "../../../usr/file", "/etc/../usr/file"])
def test_links_within_the_image_are_followed_as_within_a_container(image: Path, target: str) -> None:
    (image / "etc/passwd").symlink_to(target)

    assert image_files.read(str(image), "etc/passwd", BOUND) == b"content"


def test_a_directory_that_is_a_link_leads_nowhere_else_either(image: Path) -> None:
    (image / "var").symlink_to(image.parent)

    assert image_files.read(str(image), "var/secret", BOUND) is None


def test_a_loop_of_links_is_as_good_as_nothing(image: Path) -> None:
    (image / "etc/passwd").symlink_to("passwd")

    assert image_files.read(str(image), "etc/passwd", BOUND) is None


@pytest.mark.parametrize("path", ["usr/file/below", "nowhere", "usr", "x" * 300, "x/" * 3000, "usr/fi\0le"])
def test_what_is_no_file_is_as_good_as_nothing(image: Path, path: str) -> None:
    assert image_files.read(str(image), path, BOUND) is None


def test_a_fifo_holds_nobody_up(image: Path) -> None:
    os.mkfifo(image / "etc/passwd")

    assert image_files.read(str(image), "etc/passwd", BOUND) is None


def test_no_more_is_read_than_was_asked_for(image: Path) -> None:
    with (image / "etc/passwd").open("wb") as file:
        file.truncate(1 << 40)

    assert image_files.read(str(image), "etc/passwd", BOUND) == bytes(BOUND)


def test_what_others_rename_meanwhile_makes_nothing_absent(image: Path) -> None:
    (image / "etc/passwd").symlink_to("../usr/" * 100 + "file")
    done = threading.Event()

    def rename() -> None:
        there, back = image / "here", image / "there"
        there.mkdir()
        while not done.is_set():
            os.rename(there, back)
            there, back = back, there

    others = threading.Thread(target=rename)
    others.start()
    try:
        found = {image_files.read(str(image), "etc/passwd", BOUND) for _ in range(1000)}
    finally:
        done.set()
        others.join()

    assert found == {b"content"}


def test_no_descriptor_is_left_open(image: Path) -> None:
    before = os.listdir("/proc/self/fd")

    image_files.read(str(image), "usr/file", BOUND)
    image_files.status(str(image), "usr")
    image_files.has_entries(str(image), "usr")
    with contextlib.suppress(OSError):
        image_files.has_entries(str(image), "usr/file")

    assert os.listdir("/proc/self/fd") == before
