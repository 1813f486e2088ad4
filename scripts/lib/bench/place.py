"""Where the benchmark happens, and how it leaves nothing.

`scripts/bench` starts us in a mount namespace of our own, so that every mount, ours and the peers', ends with
us. Processes are started in cgroups of our own, which count their CPU seconds, those of children and
grandchildren too, and which are killed whole at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PATIENCE: Final = 30.0  # seconds, for a cgroup to become empty
_LOOKING: Final = 1.0  # seconds, at what others do


class Refusal(Exception):
    """The benchmark cannot go on; the message is for a person."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures were measured on. `memory_bytes` is what is available now."""

    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    system: str

    @classmethod
    def here(cls) -> Machine:
        """This machine."""
        return cls(
            cpu=_field("/proc/cpuinfo", "model name", ":") or os.uname().machine,
            cores=len(os.sched_getaffinity(0)),
            memory_bytes=int((_field("/proc/meminfo", "MemAvailable", ":") or "0 kB").split()[0]) * 1024,
            kernel=os.uname().release,
            system=(_field("/etc/os-release", "PRETTY_NAME", "=") or "").strip('"'),
        )

    def __str__(self) -> str:
        return f"{self.cores} cores of {self.cpu}, Linux {self.kernel}, {self.system}"


def _field(file: str, name: str, separator: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path(file).read_text().splitlines():
            key, _, value = line.partition(separator)
            if key.strip() == name:
                return value.strip()
    return ""


def busy_share() -> float:
    """How much of the cores' time others use now; we sleep meanwhile."""
    idle, total = _cpu_ticks()
    time.sleep(_LOOKING)
    idle_later, total_later = _cpu_ticks()
    return 1 - (idle_later - idle) / max(1, total_later - total)


def _cpu_ticks() -> tuple[int, int]:
    ticks = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def cpu_seconds_of(cpu_stat: Path) -> float:
    """User and system time of all processes that are or were in the cgroup that has this file."""
    for line in cpu_stat.read_text().splitlines():
        if line.startswith("usage_usec "):
            return int(line.split()[1]) / 1e6
    raise AssertionError("cpu.stat has no usage_usec")


class Cgroup:
    """Some processes whose CPU time is counted together. Made by `Place.cgroup`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()

    def command(self, command: Sequence[str | Path]) -> list[str]:
        """The command, as one that enters this cgroup before it begins."""
        enter = 'echo $$ >"$0" && exec "$@"'
        return ["sh", "-c", enter, str(self._directory / "cgroup.procs"), *map(str, command)]

    @property
    def cpu_seconds(self) -> float:
        """User and system time of all processes that are or were in it."""
        return cpu_seconds_of(self.cpu_stat)

    @property
    def cpu_stat(self) -> Path:
        """Tells the CPU time."""
        return self._directory / "cpu.stat"

    @property
    def pids_file(self) -> Path:
        """Names the processes that are in it."""
        return self._directory / "cgroup.procs"

    def remove(self) -> None:
        """Kill what is in it, and wait until nothing is."""
        deadline = time.monotonic() + _PATIENCE
        (self._directory / "cgroup.kill").write_text("1")
        while True:
            try:
                self._directory.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
            else:
                return


class Place:
    """A directory, a cgroup hierarchy and fresh tmpfs in it. Made by `place`."""

    def __init__(self, directory: Path, cgroups: Path) -> None:
        self.directory = directory
        self._cgroups = cgroups
        self._number = 0

    @contextlib.contextmanager
    def cgroup(self) -> Iterator[Cgroup]:
        """A cgroup; its processes are killed at the end."""
        self._number += 1
        cgroup = Cgroup(self._cgroups / str(self._number))
        try:
            yield cgroup
        finally:
            cgroup.remove()

    @contextlib.contextmanager
    def tmpfs(self) -> Iterator[Path]:
        """A fresh tmpfs, gone at the end with all that is mounted below it."""
        self._number += 1
        directory = self.directory / str(self._number)
        directory.mkdir()
        run("mount", "-t", "tmpfs", "-o", "size=100%,nr_inodes=0,mode=755", "tmpfs", directory)
        try:
            yield directory
        finally:
            self._unmount(directory)
            directory.rmdir()

    def _unmount(self, directory: Path) -> None:
        """Unmount what is below it too, and wait until its memory is free, unless something still uses it."""
        try:
            run("umount", "--recursive", directory)
        except Refusal:
            run("umount", "--recursive", "--lazy", directory)


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """Take a place on this machine, and leave it as it was.

    Raises:
        Refusal: this machine does not allow it.
    """
    directory = Path(tempfile.mkdtemp(prefix="guestpull-bench-"))
    hierarchy = directory / "cgroup"
    hierarchy.mkdir()
    try:
        run("mount", "-t", "cgroup2", "none", hierarchy)
        ours = hierarchy / directory.name
        ours.mkdir()
        try:
            yield Place(directory, ours)
        finally:
            for child in ours.iterdir():
                if child.is_dir():
                    child.rmdir()
            ours.rmdir()
            run("umount", hierarchy)
    finally:
        shutil.rmtree(directory)


def run(*command: str | Path) -> str:
    """Run a command; returns what it printed.

    Raises:
        Refusal: it failed; with what it said.
    """
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise Refusal(f"`{' '.join(map(str, command))}` failed (status {done.returncode}): {said}")
    return done.stdout
