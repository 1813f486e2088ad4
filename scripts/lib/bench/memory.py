"""Samples the peak of the summed PSS of a cgroup's processes, in a separate process.

    with watched(cgroup) as peak:
        ...
    peak.bytes

PSS divides a shared page among its processes. Sampling every 20 ms slows the watched processes down, so a pull
that is timed is not watched.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.place import Cgroup

_INTERVAL: Final = 0.02  # seconds


@dataclass(slots=True)
class Peak:
    """The result; set when the block of `watched` is left."""

    bytes: int = 0


@contextlib.contextmanager
def watched(cgroup: Cgroup) -> Iterator[Peak]:
    """Watch the processes of a cgroup within a block."""
    peak = Peak()
    command = [sys.executable, "-P", "-m", "bench.memory", str(cgroup.pids_file)]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert watcher.stdout is not None
        watcher.stdout.readline()
        yield peak
    finally:
        output, _ = watcher.communicate()
        peak.bytes = int(output)


def _summed(pids_file: Path) -> int:
    total = 0
    for pid in pids_file.read_text().split():
        # a process may exit meanwhile
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def _watch(pids_file: Path) -> None:
    import select

    peak = 0
    sys.stdout.write("watching\n")
    sys.stdout.flush()
    # the parent closes standard input to end the watch
    while not select.select([sys.stdin], [], [], 0)[0]:
        begun = time.monotonic()
        peak = max(peak, _summed(pids_file))
        time.sleep(max(0.0, _INTERVAL - (time.monotonic() - begun)))
    sys.stdout.write(f"{peak}\n")


if __name__ == "__main__":
    _watch(Path(sys.argv[1]))
