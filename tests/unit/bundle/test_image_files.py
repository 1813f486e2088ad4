"""Looking at files of an image without being led out of it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from guestpull_server.bundle.image_files import ImageFiles
from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import Cancelled, LimitExceeded
from support.bundles import CancelledAtCheck


def files_of(image: Path, **limits: int) -> ImageFiles:
    return ImageFiles(str(image), Limits(**limits), Cancellation("pull"))


def content(image: Path, path: str) -> bytes:
    return b"".join(files_of(image).lines(path))


def place(image: Path, path: str) -> str | None:
    """Where a path leads, whether anything is there or not."""
    with files_of(image).found(path) as found:
        return found.path if found is not None else None


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

    assert content(image, "etc/passwd") == b""
    with files_of(image).found("etc/passwd") as found:
        assert found is None or found.descriptor is None


@pytest.mark.parametrize("target", ["/usr/file", "../usr/file", "../../../usr/file", "/etc/../usr/file"])
def test_links_within_the_image_are_followed_as_within_a_container(image: Path, target: str) -> None:
    (image / "etc/passwd").symlink_to(target)

    assert content(image, "etc/passwd") == b"content"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("usr/file", "/usr/file"),
        ("/lib/file", "/usr/file"),
        ("lib/../x", "/x"),
        ("/no/where/../there", "/no/there"),
        ("dangling/further", "/not/there/further"),
        ("out/secret", "/secret"),
        ("../../usr/./file", "/usr/file"),
        ("n\0l", "/n\0l"),
        ("", "/"),
    ],
)
def test_a_path_leads_where_its_links_lead_within_the_image(image: Path, path: str, expected: str) -> None:
    (image / "lib").symlink_to("usr")
    (image / "dangling").symlink_to("/not/there")
    (image / "out").symlink_to("../../..")

    assert place(image, path) == expected


def test_a_directory_that_is_a_link_leads_nowhere_else_either(image: Path) -> None:
    (image / "var").symlink_to(image.parent)

    assert content(image, "var/secret") == b""


def test_a_directory_that_is_moved_meanwhile_does_not_lead_out_of_the_image(
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

    assert content(image, "etc/passwd") == b""


@pytest.mark.parametrize(
    "path", ["usr/file/", "usr/file/.", "usr/file/..", "usr/file/../file", "link/", "link/../etc"]
)
def test_a_path_through_a_file_cannot_be_resolved(image: Path, path: str) -> None:
    (image / "link").symlink_to("usr/file")

    assert place(image, path) is None


@pytest.mark.parametrize(("links", "expected"), [(40, b"content"), (41, b"")])
def test_as_many_links_are_followed_as_the_kernel_follows(image: Path, links: int, expected: bytes) -> None:
    (image / "0").symlink_to("usr/file")
    for number in range(1, links):
        (image / str(number)).symlink_to(f"{number - 1}")

    assert content(image, str(links - 1)) == expected


def test_a_loop_of_links_counts_as_absent(image: Path) -> None:
    (image / "etc/passwd").symlink_to("passwd")

    assert content(image, "etc/passwd") == b""


@pytest.mark.parametrize("path", ["usr/file/below", "nowhere", "usr", "x" * 300, "x/" * 3000, "usr/fi\0le"])
def test_what_is_not_a_regular_file_counts_as_absent(image: Path, path: str) -> None:
    assert content(image, path) == b""


def test_a_fifo_holds_nobody_up(image: Path) -> None:
    os.mkfifo(image / "etc/passwd")

    assert content(image, "etc/passwd") == b""


def test_a_file_that_is_too_large_is_refused_by_its_limit_and_not_read(image: Path) -> None:
    with (image / "etc/passwd").open("wb") as file:
        file.truncate(1 << 40)

    with pytest.raises(LimitExceeded) as caught:
        content(image, "etc/passwd")

    assert caught.value.limit == "max_read_bytes"


def test_concurrent_renames_do_not_make_a_file_absent(image: Path) -> None:
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
        found = {content(image, "etc/passwd") for _ in range(1000)}
    finally:
        done.set()
        others.join()

    assert found == {b"content"}


def test_a_directory_that_is_too_deep_is_refused_before_it_takes_all_descriptors(image: Path) -> None:
    make_depth(image, 300)

    assert place(image, "d/" * 200) == "/d" * 200
    with pytest.raises(LimitExceeded) as caught:
        place(image, "d/" * 300)

    assert caught.value.limit == "max_path_depth"


def make_depth(image: Path, depth: int) -> None:
    """Directories, each in the other, with links at the top and the bottom that lead to the other end."""
    deepest = os.open(image, os.O_PATH)
    for _ in range(depth):
        os.mkdir("d", dir_fd=deepest)
        above, deepest = deepest, os.open("d", os.O_PATH, dir_fd=deepest)
        os.close(above)
    os.symlink("/", "top", dir_fd=deepest)
    os.close(deepest)
    (image / "bottom").symlink_to("d/" * depth)


def test_the_steps_of_all_lookups_are_bounded_together(image: Path) -> None:
    make_depth(image, 248)
    files = files_of(image)

    def look_up_until_refused() -> None:
        while True:
            with files.found("bottom/top/" * 20) as found:
                assert found is not None
                assert found.path == "/"

    with pytest.raises(LimitExceeded) as caught:
        look_up_until_refused()

    assert caught.value.limit == "max_lookup_steps"


def test_a_step_looks_at_one_component_and_never_again_at_those_before_it(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_depth(image, 248)
    really_open = os.open
    opened: list[str] = []

    def counted(path: str, flags: int, *, dir_fd: int | None = None) -> int:
        opened.append(path)
        return really_open(path, flags, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", counted)

    place(image, "bottom/top/" * 20)

    assert len(opened) == 1 + 20 * (1 + 248 + 1)


@pytest.mark.parametrize("number", [1, 2, 100, 4000])
def test_a_cancelled_call_ends_a_lookup_at_the_next_step(image: Path, number: int) -> None:
    make_depth(image, 248)
    files = ImageFiles(str(image), Limits(), CancelledAtCheck(number))

    with pytest.raises(Cancelled), files.found("bottom/top/" * 20):
        pass


def test_a_cancelled_call_ends_the_reading_of_a_file(image: Path) -> None:
    (image / "etc/passwd").write_bytes(b"\n" * 5000)
    files = ImageFiles(str(image), Limits(), CancelledAtCheck(5))

    with pytest.raises(Cancelled):
        list(files.lines("etc/passwd"))


def test_a_path_that_is_not_utf8_cannot_be_resolved(image: Path) -> None:
    (image / "link").symlink_to(b"/\xff\xfe")

    assert place(image, "link/below") is None


def test_a_path_that_is_too_long_cannot_be_resolved(image: Path) -> None:
    (image / "far").symlink_to("x/" * 2000)

    assert place(image, "x/" * 4_000_000) is None
    assert place(image, "far/far/" + "x/" * 2000) is None


def test_no_descriptor_is_left_open(image: Path) -> None:
    (image / "link").symlink_to("usr/file/nothing")
    make_depth(image, 257)
    before = set(os.listdir("/proc/self/fd"))  # of which others may close some meanwhile

    content(image, "usr/file")
    for path in ("usr", "usr/file/below", "link", "missing/../usr", "usr/../../usr/file"):
        place(image, path)
    with files_of(image).found("usr") as found:
        assert found is not None
        assert not found.is_empty()
    with pytest.raises(LimitExceeded):
        place(image, "bottom")

    assert set(os.listdir("/proc/self/fd")) <= before
