"""The extraction on a tree in memory: what entries make of each other."""

from __future__ import annotations

import stat

import pytest

from guestpull_server.config import Limits
from guestpull_server.layer.expected import Directory, File
from guestpull_server.layer.refusals import TarError
from guestpull_server.layer.replay import Replay
from support.images import Entry, directory, file, hardlink, opaque, symlink, whiteout
from support.reading import pieces


def _replayed(*entries: Entry) -> Replay:
    """Replay entries whose contents are not in the tar."""
    headers = b"".join(one.header.tobuf() + bytes(-len(one.content) % 512) for one in entries)
    replay = Replay(pieces(headers, 700), Limits())
    replay.apply_all()
    return replay


def _at(replay: Replay, path: str) -> File | Directory | None:
    found: File | Directory = replay.root
    for name in path.encode().split(b"/"):
        if not isinstance(found, Directory) or name not in found.children:
            return None
        found = found.children[name]
    return found


def _file(replay: Replay, path: str) -> File:
    found = _at(replay, path)
    assert isinstance(found, File)
    return found


def _directory(replay: Replay, path: str) -> Directory:
    found = _at(replay, path)
    assert isinstance(found, Directory)
    return found


def test_entries_become_nodes_with_their_attributes() -> None:
    made = _file(_replayed(file("d/f", b"12345", mode=0o640, uid=3, gid=4, mtime=5)), "d/f")
    assert (made.mode, made.uid, made.gid, made.mtime_ns, made.size) == (
        stat.S_IFREG | 0o640,
        3,
        4,
        5 * 10**9,
        5,
    )
    assert (made.path, made.links) == (b"d/f", 1)


def test_a_missing_parent_is_a_directory_without_a_time() -> None:
    parent = _directory(_replayed(file("a/b/f")), "a/b")
    assert (parent.mode, parent.uid, parent.mtime_ns, parent.path) == (stat.S_IFDIR | 0o755, 0, 0, b"a/b")


def test_the_last_entry_of_a_path_wins_and_the_first_content_is_lost() -> None:
    replay = _replayed(file("f", b"1"), file("f", b"22"))
    assert _file(replay, "f").size == 2
    assert [one.replaced_as for one in replay.contents] == [0, -1]
    assert replay.replaced == 1


def test_a_content_with_another_name_is_not_lost() -> None:
    replay = _replayed(file("a", b"1"), hardlink("b", "a"), file("a", b"2"))
    assert [(one.replaced_as, one.path, one.links) for one in replay.contents] == [
        (-1, b"b", 1),
        (-1, b"a", 1),
    ]


def test_contents_of_a_replaced_directory_are_lost_files_first_by_name() -> None:
    replay = _replayed(
        file("t/2/b", b"1"), file("t/1/a", b"1"), file("t/z", b"1"), file("t/y", b"1"), file("t", b"1")
    )
    assert [one.replaced_as for one in replay.contents] == [3, 2, 1, 0, -1]


def test_an_empty_file_has_no_content_to_lose() -> None:
    replay = _replayed(file("f"), file("f"))
    assert (replay.contents, replay.replaced) == ([], 0)


@pytest.mark.parametrize("target", ["usr/lib", "/usr/lib", "../../usr/./lib", "usr/x/../lib"])
def test_links_are_followed_within_the_root(target: str) -> None:
    replay = _replayed(directory("usr/lib"), symlink("lib", target), file("lib/f"), hardlink("h", "lib/f"))
    assert _file(replay, "usr/lib/f") is _file(replay, "h")


def test_a_link_that_was_replaced_is_not_followed_any_more() -> None:
    replay = _replayed(
        directory("a"), directory("b"), symlink("l", "a"), file("l/1"), symlink("l", "b"), file("l/2")
    )
    assert (set(_directory(replay, "a").children), set(_directory(replay, "b").children)) == ({b"1"}, {b"2"})


def test_a_parent_that_was_replaced_is_not_taken_for_the_one_before() -> None:
    replay = _replayed(
        file("a/b/1"),
        file("c/1"),
        file("a/b"),
        directory("a/b"),
        file("a/b/2"),
        symlink("c", "a"),
        file("c/3"),
    )
    assert set(_directory(replay, "a/b").children) == {b"2"}
    assert set(_directory(replay, "a").children) == {b"b", b"3"}


def test_whiteouts_are_devices_and_opaque_directories() -> None:
    replay = _replayed(
        whiteout("a"), opaque("o"), whiteout("d"), directory("d"), directory("e"), whiteout("e")
    )
    assert _file(replay, "a").is_whiteout
    assert [_directory(replay, path).opaque for path in "ode"] == [True] * 3


def test_a_hard_link_to_nothing_is_refused() -> None:
    with pytest.raises(TarError):
        _replayed(hardlink("a", "missing"))


def test_a_parent_that_is_a_file_is_refused() -> None:
    with pytest.raises(TarError):
        _replayed(file("a"), file("a/b"))


@pytest.mark.parametrize("links", [[symlink("a", "a")], [symlink("a", "b"), symlink("b", "a/x")]])
def test_links_that_never_end_are_refused(links: list[Entry]) -> None:
    with pytest.raises(TarError):
        _replayed(*links, file("a/f"))
