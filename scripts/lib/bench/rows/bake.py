"""Baking: an image into an empty work directory, and one more that shares all of its base with it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bench.context import Bench
from bench.place import Cgroup, run
from bench.report import Figure


def bake(bench: Bench) -> None:
    """`guestpulld bake` of the tree, then of an image that adds a small layer to it."""
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


def _seconds(cgroup: Cgroup, work_dir: Path, reference: str) -> float:
    program = Path(sys.executable).with_name("guestpulld")
    begun = time.monotonic()
    run(*cgroup.command([program, "bake", "--work-dir", work_dir, reference]))
    return time.monotonic() - begun
