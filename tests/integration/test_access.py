"""Other users of the machine, and what lies in a work directory."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from guestpull_server.errors import InsecureWorkDir
from support.stores import open_store

OTHER = 4242


def runs_as_root(program: Path) -> bool:
    """Whether another user becomes root by a program."""
    ended = subprocess.run([program, "-u"], user=OTHER, group=OTHER, capture_output=True, text=True)
    return ended.stdout == "0\n"


def test_a_setuid_file_in_a_store_that_is_taken_over_is_out_of_reach(open_disk: Path) -> None:
    layer = open_disk / "work/layers/0"
    layer.mkdir(parents=True)
    program = Path(shutil.copy("/usr/bin/id", layer))
    program.chmod(0o4755)
    assert runs_as_root(program)

    open_store(open_disk / "work").close()

    with pytest.raises(PermissionError):
        runs_as_root(program)


@pytest.mark.parametrize("place", ["work", "work/layers", "work/staging"])
def test_directories_of_another_user_are_refused(disk: Path, place: str) -> None:
    (disk / place).mkdir(parents=True)
    os.chown(disk / place, OTHER, OTHER)

    with pytest.raises(InsecureWorkDir, match=f"chown 0 {disk / place}"):
        open_store(disk / "work")


def test_a_link_of_another_user_is_not_followed(disk: Path) -> None:
    (disk / "elsewhere").mkdir(mode=0o755)
    (disk / "work").mkdir()
    (disk / "work/layers").symlink_to(disk / "elsewhere")
    os.chown(disk / "work/layers", OTHER, OTHER, follow_symlinks=False)

    with pytest.raises(InsecureWorkDir):
        open_store(disk / "work")

    assert (disk / "elsewhere").stat().st_mode & 0o777 == 0o755


def test_layers_that_others_reach_and_that_cannot_be_closed_are_refused(disk: Path) -> None:
    layers = disk / "work/layers"
    layers.mkdir(parents=True)
    subprocess.run(["mount", "--bind", layers, layers], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", layers], check=True)
        with pytest.raises(InsecureWorkDir, match="additional_stores"):
            open_store(disk / "work")
    finally:
        subprocess.run(["umount", layers], check=True)
