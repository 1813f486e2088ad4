"""The commands that tests may call: those that scripts/packages lists and scripts/setup installs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

_PACKAGES: Final = Path(__file__).parents[2] / "scripts/packages"
_ALL: Final = "*"
_NONE: Final = "-"
_SYSTEM_DIRECTORIES: Final = "/usr/sbin:/sbin"  # not in the PATH of every user who became root


def listed_commands() -> dict[str, str]:
    """The commands, and the Debian package of each."""
    listed: dict[str, str] = {}
    for line in _PACKAGES.read_text().splitlines():
        if line.startswith("#"):
            continue
        package, _, *commands = line.split()
        for command in sorted(commands_of(package)) if commands == [_ALL] else commands:
            if command != _NONE:
                listed[command] = package
    return listed


def commands_of(package: str) -> set[str]:
    """All commands of an installed Debian package."""
    files = subprocess.run(
        ["dpkg-query", "--listfiles", package], capture_output=True, check=True, text=True
    ).stdout
    paths = map(Path, files.splitlines())
    return {path.name for path in paths if path.parent.name in ("bin", "sbin")}


def link_commands(directory: Path) -> None:
    """Fill a directory with links to the installed ones of these commands."""
    for command in listed_commands():
        program = shutil.which(command, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_DIRECTORIES}")
        if program is not None:
            (directory / command).symlink_to(program)
