"""Whole directories: deleted and measured however deep and odd they are."""

from __future__ import annotations

import os
from pathlib import Path

from guestpull_server.store.filesystem import remove_tree, tree_bytes


def deep(directory: Path, levels: int) -> None:
    """Directories within directories, deeper than any path can say."""
    here = os.open(directory, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d" * 100, dir_fd=here)
        below = os.open("d" * 100, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    with os.fdopen(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as file:
        file.write(b"12345")
    os.close(here)


def test_a_tree_deeper_than_any_path_is_measured_and_deleted(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    deep(tmp_path / "tree", 1500)

    assert tree_bytes(str(tmp_path / "tree")) == 5
    assert remove_tree(str(tmp_path / "tree")) == 5

    assert list(tmp_path.iterdir()) == []


def test_links_are_deleted_and_what_they_lead_to_is_not(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/file").write_bytes(b"theirs")
    (tmp_path / "tree/inner").mkdir(parents=True)
    (tmp_path / "tree/inner/up").symlink_to("..")
    (tmp_path / "tree/out").symlink_to(tmp_path / "theirs")
    (tmp_path / "tree/dangling").symlink_to("/nowhere")

    assert tree_bytes(str(tmp_path / "tree")) == 0
    assert remove_tree(str(tmp_path / "tree")) == 0

    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert (tmp_path / "theirs/file").read_bytes() == b"theirs"


def test_bytes_are_counted_once_however_many_links_a_file_has(tmp_path: Path) -> None:
    (tmp_path / "tree/inner").mkdir(parents=True)
    (tmp_path / "tree/one").write_bytes(b"12345")
    os.link(tmp_path / "tree/one", tmp_path / "tree/inner/two")
    os.mkfifo(tmp_path / "tree/fifo")

    assert tree_bytes(str(tmp_path / "tree")) == 5
    assert remove_tree(str(tmp_path / "tree")) == 5


def test_bytes_that_another_link_keeps_are_not_freed(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"12345")
    (tmp_path / "tree").mkdir()
    os.link(tmp_path / "kept", tmp_path / "tree/one")

    assert remove_tree(str(tmp_path / "tree")) == 0


def test_a_file_or_nothing_at_all_is_a_tree_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123")

    assert tree_bytes(str(tmp_path / "file")) == 3
    assert remove_tree(str(tmp_path / "file")) == 3
    assert remove_tree(str(tmp_path / "file")) == 0
