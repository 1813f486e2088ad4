"""The commands that tests find in their PATH."""

from __future__ import annotations

import shutil

import pytest

from support.commands import commands_of, listed_commands

LISTED = listed_commands()


def test_a_command_that_is_not_listed_is_not_found() -> None:
    assert shutil.which("apt-get") is None  # though every Debian has it


@pytest.mark.parametrize("package", sorted(set(LISTED.values())))
def test_listed_commands_are_installed_and_come_from_their_package(package: str) -> None:
    listed = {command for command, brought_by in LISTED.items() if brought_by == package}

    assert listed <= commands_of(package)
    assert {command for command in listed if shutil.which(command) is None} == set()
