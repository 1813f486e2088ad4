"""Profiles a cold pull: py-spy and a sampler for Python's lines, perf for native code and the kernel.

    DIR/daemon.txt     stacks of the daemon with native frames, and their samples; speedscope.app shows them
    DIR/worker.txt     lines of a layer worker's main thread, and their samples; see sample.py
    DIR/perf.txt       CPU time of the daemon and the workers by library and function, including the kernel

Each profiles a separate pull, and slows it down.
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
from bench.place import Refusal, run

_RATE: Final = 250  # samples per second
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
    _record_daemon(bench, spy, directory / "daemon.txt")
    _sample_worker(bench, directory / "worker.txt")
    if shutil.which("perf") is None:
        bench.report.say("perf is not installed (package linux-perf): no perf.txt")
        return
    _record_all(bench, directory)


def _record_daemon(bench: Bench, spy: Path, file: Path) -> None:
    with bench.daemon() as (daemon, _):
        command: list[str | Path] = [spy, "record", "--native", "--threads", "--rate", str(_RATE)]
        command += ["--format", "raw", "--output", file, "--pid", str(daemon.pid)]
        with _recorded(command):
            _pull(bench, daemon)
    bench.report.say(f"wrote {file}")


def _sample_worker(bench: Bench, file: Path) -> None:
    blob = bench.registry.blob_path(bench.images.one_layer().layers[0].digest)
    with bench.place.tmpfs() as directory:
        file.write_text(run(sys.executable, "-P", "-m", "bench.sample", blob, directory))
    bench.report.say(f"wrote {file}")


def _record_all(bench: Bench, directory: Path) -> None:
    raw = directory / "perf.data"
    with bench.daemon() as (daemon, cgroup):
        # perf follows the fork server, so it sees workers from their start
        pids = ",".join(cgroup.pids_file.read_text().split())
        with _recorded(["perf", "record", "-q", "-e", "cpu-clock", "-F", "999", "-o", raw, "-p", pids]):
            _pull(bench, daemon)
    reports = [
        run("perf", "report", "--stdio", "-i", raw, "--sort", order, "--percent-limit", "0.5")
        for order in ("dso", "dso,symbol")
    ]
    (directory / "perf.txt").write_text("".join(reports))
    bench.report.say(f"wrote {directory / 'perf.txt'}")


def _pull(bench: Bench, daemon: Daemon) -> None:
    reference = bench.images.tree("gzip").reference(bench.registry)
    bundle = daemon.new_bundle()
    daemon.client.pull(reference, bundle)
    daemon.client.release_bundle(bundle)


@contextmanager
def _recorded(command: Sequence[str | Path]) -> Iterator[None]:
    """Run a recorder during a block; it writes its file when it is interrupted."""
    recorder = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        # it takes a moment to attach
        time.sleep(_ATTACHING)
        yield
    finally:
        recorder.send_signal(signal.SIGINT)  # it may have exited together with the process that it recorded
        _, output = recorder.communicate(timeout=_PATIENCE)
    if recorder.returncode not in (0, -signal.SIGINT, 130):
        raise Refusal(f"{command[0]} failed: {output.decode(errors='replace').strip()[-1000:]}")
