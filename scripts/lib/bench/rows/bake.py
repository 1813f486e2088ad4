"""Measures baking an image, starting a container from it, and verifying its layers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from bench.context import Bench
from bench.daemon import Daemon
from bench.place import Cgroup, Refusal, run
from bench.report import Figure

_PROGRAM: Final = Path(sys.executable).with_name("guestpulld")
_AGENT: Final = _PROGRAM.with_name("guestpull-agent")
_PROVED_PER_CORE: Final = 1.0  # gigabytes per second
_FILE_BYTES: Final = (4 * 1024, 16 * 1024, 64 * 1024, 1024 * 1024)
_RECORD_SIZE_PERCENT: Final = 1.0
_RECORD_TIME_PERCENT: Final = 3.0
_RUNNING: Final = re.compile(r"running after (\d+) ms")


def bake(bench: Bench) -> None:
    """Measure `guestpulld bake` of the tree, then of an image that adds a small layer to it."""
    first, second = bench.images.tree("gzip"), bench.images.plus()
    bench.report.title(f"bake: {first.tar_size / 1e9:.2f} GB from the registry; then an image that shares it")
    alone: list[float] = []
    shared: list[float] = []
    for _ in range(bench.rounds):
        with bench.place.tmpfs() as directory, bench.place.cgroup() as cgroup:
            alone.append(_seconds(cgroup, directory / "store", first.reference(bench.registry)))
            shared.append(_seconds(cgroup, directory / "store", second.reference(bench.registry)))
    middle = sorted(alone)[len(alone) // 2]
    bench.report.add(
        Figure(row="bake", subject="into an empty work directory", unit="s", values=alone),
        Figure(row="bake", subject="one more that shares its layers", unit="s", values=shared),
        Figure(
            row="bake",
            subject="the second's time, in the first's",
            unit="x",
            values=[one / middle for one in shared],
        ),
    )


def verify(bench: Bench) -> None:
    """Measure `guestpulld verify --deep` of the tree: it reassembles and hashes each layer's tar."""
    image = bench.images.tree("gzip")
    bench.report.title(f"verify: {image.tar_size / 1e9:.2f} GB proved to be what the image's diff_ids say")
    taken: list[float] = []
    used: list[float] = []
    with bench.place.tmpfs() as directory, bench.place.cgroup() as cgroup:
        _seconds(cgroup, directory / "store", image.reference(bench.registry))
        records = sum(file.stat().st_size for file in (directory / "store" / "records").iterdir())
        for _ in range(bench.rounds):
            used_before = cgroup.cpu_seconds
            begun = time.monotonic()
            run(*cgroup.command([_PROGRAM, "verify", "--deep", "--work-dir", directory / "store"]))
            taken.append(time.monotonic() - begun)
            used.append(cgroup.cpu_seconds - used_before)
    gigabytes = image.tar_size / 1e9
    bench.report.add(
        Figure(row="verify", subject="guestpulld verify --deep", unit="s", values=taken),
        Figure(
            row="verify", subject="gigabytes a second", unit="GB/s", values=[gigabytes / one for one in taken]
        ),
        Figure(
            row="verify",
            subject="gigabytes a CPU second",
            unit="GB/s",
            values=[gigabytes / one for one in used],
            at_least=_PROVED_PER_CORE,
        ),
        Figure(
            row="verify",
            subject="the records' size, of the unpacked layers'",
            unit="%",
            values=[100 * records / image.tar_size],
            at_most=_RECORD_SIZE_PERCENT,
        ),
        *(
            Figure(
                row="verify",
                subject=f"a layer of files of {file_bytes // 1024:,} KiB, a CPU second",
                unit="GB/s",
                values=[_proved(bench, file_bytes) for _ in range(bench.rounds)],
                at_least=_PROVED_PER_CORE,
            )
            for file_bytes in _FILE_BYTES
        ),
    )


def _proved(bench: Bench, file_bytes: int) -> float:
    """Measure the verification of a layer with files of one size, in gigabytes per CPU second."""
    with bench.place.tmpfs() as directory:
        return float(run(sys.executable, "-P", "-m", "bench.proving", directory, str(file_bytes)))


def record(bench: Bench) -> None:
    """Measure the cost of recording a layer's tar while unpacking it: with and without a record."""
    image = bench.images.one_layer()
    blob = bench.registry.blob_path(image.layers[0].digest)
    bench.report.title(
        f"record: unpacking a layer of {image.tar_size / 1e9:.2f} GB, with a record and without"
    )
    without: list[float] = []
    having: list[float] = []
    for _ in range(2 * bench.rounds):
        without.append(_unpacked(bench, blob, has_record=False))
        having.append(_unpacked(bench, blob, has_record=True))
    share = [100 * (more - less) / less for less, more in zip(without, having, strict=True)]
    bench.report.add(
        Figure(row="record", subject="without, CPU", unit="CPU s", values=without),
        Figure(row="record", subject="with, CPU", unit="CPU s", values=having),
        Figure(row="record", subject="more", unit="%", values=share, at_most=_RECORD_TIME_PERCENT),
    )


def _unpacked(bench: Bench, blob: Path, *, has_record: bool) -> float:
    """CPU seconds of unpacking a layer."""
    with bench.place.tmpfs() as directory, bench.place.cgroup() as cgroup:
        (directory / "layer").mkdir()
        command: list[str | Path] = [
            sys.executable,
            "-P",
            "-m",
            "bench.unpacking",
            blob,
            directory / "layer",
            cgroup.cpu_stat,
        ]
        if has_record:
            command.append(directory / "record")
        return float(run(*cgroup.command(command)))


def pod(bench: Bench) -> None:
    """Measure the time from the agent's request to a running container: pulled, and baked."""
    image = bench.images.plus()
    reference = image.reference(bench.registry)
    bench.report.title(f"pod: a container of {image.tar_size / 1e9:.2f} GB, from the request to running")
    pulled: list[float] = []
    baked: list[float] = []
    with bench.place.tmpfs() as directory, bench.place.cgroup() as cgroup:
        store = directory / "store"
        _seconds(cgroup, store, reference)
        for _ in range(bench.rounds):
            with bench.daemon() as (daemon, _):
                pulled.append(_running_after(daemon, reference, directory / "pods"))
            with bench.daemon(store) as (daemon, _):
                baked.append(_running_after(daemon, reference, directory / "pods"))
    bench.report.add(
        Figure(row="pod", subject="pulled from a registry on this machine", unit="ms", values=pulled),
        Figure(row="pod", subject="baked: from a store that is only read", unit="ms", values=baked),
    )


def _running_after(daemon: Daemon, reference: str, bundles: Path) -> float:
    """Milliseconds until the container runs."""
    command = [_AGENT, "run", "--time", "--policy", "missing", "--bundle-root", bundles, reference]
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"GUESTPULL_ADDRESS": daemon.client.address},
        capture_output=True,
        text=True,
        check=False,
    )
    running = _RUNNING.search(done.stderr)
    if done.returncode != 0 or running is None:
        raise Refusal(f"no container of {reference}: {done.stderr.strip()[-1000:]}")
    return float(running[1])


def _seconds(cgroup: Cgroup, work_dir: Path, reference: str) -> float:
    begun = time.monotonic()
    run(*cgroup.command([_PROGRAM, "bake", "--work-dir", work_dir, reference]))
    return time.monotonic() - begun
