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


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("usr/file", "/usr/file"),
        ("/lib/file", "/usr/file"),
        ("lib/../x", "/x"),
        ("/no/where/../there", "/no/there"),
        ("dangling/further", "/not/there/further"),
        ("out/secret", "/secret"),
        ("../../usr/./file/", "/usr/file"),
        ("usr/file/below", "/usr/file/below"),
        ("n\0l", "/n\0l"),
        ("", "/"),
    ],
)
def test_a_place_is_where_links_lead_within_the_image(image: Path, path: str, place: str) -> None:
    (image / "lib").symlink_to("usr")
    (image / "dangling").symlink_to("/not/there")
    (image / "out").symlink_to("../../..")

    assert image_files.resolved(str(image), path) == place


def test_a_directory_that_is_a_link_leads_nowhere_else_either(image: Path) -> None:
    (image / "var").symlink_to(image.parent)

    assert image_files.read(str(image), "var/secret", BOUND) is None


def test_a_directory_that_is_moved_away_leads_nobody_out(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image / "usr/deep").mkdir()
    (image / "etc/passwd").symlink_to("../usr/deep/../../secret")
    really_open = os.open

    def open_and_move(path: str, flags: int, *, dir_fd: int | None = None) -> int:
        descriptor = really_open(path, flags, dir_fd=dir_fd)
        if path == "deep":
            os.rename(image / "usr", image.parent / "usr")
        return descriptor

    monkeypatch.setattr(os, "open", open_and_move)

    assert image_files.read(str(image), "etc/passwd", BOUND) is None


@pytest.mark.parametrize(
    "path", ["usr/file/", "usr/file/.", "usr/file/..", "usr/file/../file", "link/", "link/../etc"]
)
def test_a_file_is_no_directory_on_the_way(image: Path, path: str) -> None:
    (image / "link").symlink_to("usr/file")

    assert image_files.status(str(image), path) is None


@pytest.mark.parametrize(("links", "content"), [(40, b"content"), (41, None)])
def test_as_many_links_are_followed_as_the_kernel_follows(
    image: Path, links: int, content: bytes | None
) -> None:
    (image / "0").symlink_to("usr/file")
    for number in range(1, links):
        (image / str(number)).symlink_to(f"{number - 1}")

    assert image_files.read(str(image), str(links - 1), BOUND) == content


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


def test_no_depth_takes_all_descriptors(image: Path) -> None:
    deepest = os.open(image, os.O_PATH)
    for _ in range(300):
        os.mkdir("d", dir_fd=deepest)
        above, deepest = deepest, os.open("d", os.O_PATH, dir_fd=deepest)
        os.close(above)
    os.close(deepest)

    assert image_files.status(str(image), "d/" * 200) is not None
    assert image_files.status(str(image), "d/" * 300) is None


def test_a_path_that_is_longer_than_any_may_be_leads_nowhere_at_once(image: Path) -> None:
    (image / "far").symlink_to("x/" * 2000)

    assert image_files.resolved(str(image), "x/" * 4_000_000) is None
    assert image_files.resolved(str(image), "far/far/" + "x/" * 2000) is None


def test_no_descriptor_is_left_open(image: Path) -> None:
    (image / "link").symlink_to("usr/file/nothing")
    before = set(os.listdir("/proc/self/fd"))  # of which others may close some meanwhile

    image_files.read(str(image), "usr/file", BOUND)
    image_files.status(str(image), "usr")
    image_files.contents(str(image), "usr")
    with contextlib.suppress(OSError):
        image_files.contents(str(image), "usr/file")
    image_files.status(str(image), "link")

    assert set(os.listdir("/proc/self/fd")) <= before
