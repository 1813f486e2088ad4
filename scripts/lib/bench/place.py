"""Provides directories, tmpfs and cgroups for the benchmark, and removes them at the end.

`scripts/bench` starts the benchmark in a new mount namespace, so that all mounts, including those of the other
tools, end with it. Processes run in new cgroups, which count the CPU time of all descendants and are killed at
the end.
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
_BUSY_SAMPLE_SECONDS: Final = 1.0


class Refusal(Exception):
    """The benchmark cannot go on; the message is for a person."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that is measured. `memory_bytes` is the memory available now."""

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
    """The share of the cores' time that other processes use, sampled while this one sleeps."""
    idle, total = _cpu_ticks()
    time.sleep(_BUSY_SAMPLE_SECONDS)
    idle_later, total_later = _cpu_ticks()
    return 1 - (idle_later - idle) / max(1, total_later - total)


def _cpu_ticks() -> tuple[int, int]:
    ticks = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def cpu_seconds_of(cpu_stat: Path) -> float:
    """User and system time of all present and past processes of the cgroup with this cpu.stat file."""
    for line in cpu_stat.read_text().splitlines():
        if line.startswith("usage_usec "):
            return int(line.split()[1]) / 1e6
    raise AssertionError("cpu.stat has no usage_usec")


class Cgroup:
    """A group of processes whose CPU time is counted together. Created by `Place.cgroup`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()

    def command(self, command: Sequence[str | Path]) -> list[str]:
        """Wrap a command so that it enters this cgroup first."""
        enter = 'echo $$ >"$0" && exec "$@"'
        return ["sh", "-c", enter, str(self._directory / "cgroup.procs"), *map(str, command)]

    @property
    def cpu_seconds(self) -> float:
        """User and system time of its present and past processes."""
        return cpu_seconds_of(self.cpu_stat)

    @property
    def cpu_stat(self) -> Path:
        """The file with the CPU time."""
        return self._directory / "cpu.stat"

    @property
    def pids_file(self) -> Path:
        """The file with the ids of its processes."""
        return self._directory / "cgroup.procs"

    def remove(self) -> None:
        """Kill its processes, and wait until they have exited."""
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
    """A directory and a cgroup hierarchy for the benchmark. Created by `place`."""

    def __init__(self, directory: Path, cgroups: Path) -> None:
        self.directory = directory
        self._cgroups = cgroups
        self._number = 0

    @contextlib.contextmanager
    def cgroup(self) -> Iterator[Cgroup]:
        """Create a cgroup for a block; its processes are killed at the end."""
        self._number += 1
        cgroup = Cgroup(self._cgroups / str(self._number))
        try:
            yield cgroup
        finally:
            cgroup.remove()

    @contextlib.contextmanager
    def tmpfs(self) -> Iterator[Path]:
        """Mount a fresh tmpfs for a block; it is unmounted at the end with all mounts below it."""
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
        """Unmount a tmpfs and the mounts below it; wait until its memory is freed, unless it is in use."""
        try:
            run("umount", "--recursive", directory)
        except Refusal:
            run("umount", "--recursive", "--lazy", directory)


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """Create a place for a block, and remove it at the end.

    Raises:
        Refusal: this machine has no usable cgroups or mounts.
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
    """Run a command and return its output.

    Raises:
        Refusal: the command failed; the error includes its output.
    """
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        output = (done.stderr or done.stdout).strip()[-2000:]
        raise Refusal(f"`{' '.join(map(str, command))}` failed (status {done.returncode}): {output}")
    return done.stdout
