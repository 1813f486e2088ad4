"""Where a cold pull spends its time: py-spy for Python's lines, perf for everything below them.

    DIR/stacks.txt     stacks of the daemon and the layer workers, native frames too, with their samples
    DIR/flame.svg      the same as a flame graph, for a browser
    DIR/perf.txt       CPU time by program and function of the whole machine, the kernel's too

Each looks at a pull of its own; both make it slower.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.context import Bench
from bench.daemon import Daemon
from bench.place import Refusal

_RATE: Final = 250  # samples a second
_PATIENCE: Final = 60.0  # seconds
_ATTACHING: Final = 1.5  # seconds


def profile(bench: Bench, directory: Path) -> None:
    """Profile a cold pull of the tree, as gzip.

    Raises:
        Refusal: py-spy is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    spy = Path(sys.executable).with_name("py-spy")
    if not spy.exists():
        raise Refusal(f"{spy} is missing; `pip install --group profile` installs it")
    for form, name in (("raw", "stacks.txt"), ("flamegraph", "flame.svg")):
        with bench.daemon() as (daemon, _):
            command: list[str | Path] = [
                spy,
                "record",
                "--subprocesses",
                "--native",
                "--threads",
                "--rate",
                str(_RATE),
            ]
            command += ["--format", form, "--output", directory / name, "--pid", str(daemon.pid)]
            with _recorded(command):
                _pull(bench, daemon)
        bench.report.say(f"wrote {directory / name}")
    if shutil.which("perf") is None:
        bench.report.say("perf is not installed (package linux-perf): no perf.txt")
        return
    with bench.daemon() as (daemon, _):
        raw = directory / "perf.data"
        with _recorded(["perf", "record", "-q", "-a", "-e", "cpu-clock", "-F", "999", "-o", raw]):
            _pull(bench, daemon)
    report = ["perf", "report", "--stdio", "-i", raw, "--sort", "comm,dso,symbol", "--percent-limit", "0.3"]
    done = subprocess.run([str(part) for part in report], capture_output=True, text=True, check=False)
    (directory / "perf.txt").write_text(done.stdout)
    bench.report.say(f"wrote {directory / 'perf.txt'}")


def _pull(bench: Bench, daemon: Daemon) -> None:
    reference = bench.images.tree("gzip").reference(bench.registry)
    bundle = daemon.new_bundle()
    daemon.client.pull(reference, bundle)
    daemon.client.release_bundle(bundle)


@contextmanager
def _recorded(command: Sequence[str | Path]) -> Iterator[None]:
    """Run a recorder meanwhile; it writes its file when it is interrupted."""
    recorder = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        # it takes a moment to attach
        time.sleep(_ATTACHING)
        yield
    finally:
        recorder.send_signal(signal.SIGINT)
        _, said = recorder.communicate(timeout=_PATIENCE)
    if recorder.returncode not in (0, -signal.SIGINT, 130):
        raise Refusal(f"{command[0]} failed: {said.decode(errors='replace').strip()[-1000:]}")
