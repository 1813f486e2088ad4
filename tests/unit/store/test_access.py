"""A work directory is closed to other users of the machine, whoever made it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from guestpull_server.errors import InsecureWorkDir
from guestpull_server.store.workdir import DIRECTORIES
from support.stores import open_store


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_work_directory_that_is_made_is_closed_to_others(tmp_path: Path) -> None:
    open_store(tmp_path / "work").close()

    assert {mode_of(path) for path in (tmp_path / "work", *(tmp_path / "work").glob("*/"))} == {0o700}


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o1777, 0o711, 0o500])
def test_rooms_that_others_made_are_closed(tmp_path: Path, mode: int) -> None:
    rooms = [tmp_path / "work" / room for room in DIRECTORIES]
    for room in rooms:
        room.mkdir(parents=True)
        room.chmod(mode)

    open_store(tmp_path / "work").close()

    assert [mode_of(room) for room in rooms] == [0o700] * len(rooms)


def test_a_work_directory_that_exists_stays_readable(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir(mode=0o755)

    open_store(tmp_path / "work").close()

    assert mode_of(tmp_path / "work") == 0o755


@pytest.mark.parametrize(("before", "after"), [(0o1777, 0o1755), (0o777, 0o755)])
def test_nobody_else_may_write_in_a_work_directory(tmp_path: Path, before: int, after: int) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work").chmod(before)
    (tmp_path / "work/config.json").write_text("{}")

    open_store(tmp_path / "work").close()

    assert mode_of(tmp_path / "work") == after


def test_a_directory_with_other_uses_that_others_may_write_in_is_refused(tmp_path: Path) -> None:
    (tmp_path / "somebodys").touch()
    tmp_path.chmod(0o777)

    with pytest.raises(InsecureWorkDir, match=f"chmod go-w {tmp_path}"):
        open_store(tmp_path)

    assert mode_of(tmp_path) == 0o777
    assert [path.name for path in tmp_path.iterdir()] == ["somebodys"]


def test_a_directory_like_tmp_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "somebodys").touch()
    tmp_path.chmod(0o1777)

    open_store(tmp_path).close()

    assert mode_of(tmp_path) == 0o1777
