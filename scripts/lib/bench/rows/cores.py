"""Measures a big layer on one core and on all cores, and the cost of progress events."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from bench.context import Bench
from bench.daemon import serving
from bench.images import Image
from bench.registry import Registry
from bench.report import Figure

_SPEEDUP: Final = 1.5
_PROGRESS_COST: Final = 1.02


def cores(bench: Bench) -> None:
    """Pull one layer with everything (registry, daemon, client) on one core, and on all cores."""
    image = bench.images.one_layer()
    bench.report.title(
        f"cores: a cold pull of one layer of {image.tar_size / 1e9:.2f} GB; {bench.rounds} rounds"
    )
    on_one: list[float] = []
    on_all: list[float] = []
    for _ in range(bench.rounds):
        with _pinned():
            on_one.append(_pull_beside_registry(bench, image))
        on_all.append(_pull_beside_registry(bench, image))
    middle = statistics.median(on_all)
    bench.report.add(
        Figure(row="cores", subject="on one core", unit="s", values=on_one),
        Figure(row="cores", subject=f"on {bench.cores} cores", unit="s", values=on_all),
        Figure(
            row="cores",
            subject=f"one core's time, in that of {bench.cores}",
            unit="x",
            values=[one / middle for one in on_one],
            at_least=_SPEEDUP,
        ),
    )


def progress(bench: Bench) -> None:
    """Make the same cold pull with PullImage and with PullImageWithProgress, in turn."""
    image = bench.images.tree("gzip")
    rounds = bench.rounds * 2
    bench.report.title(
        f"progress: PullImageWithProgress against PullImage, a cold pull each; {rounds} rounds"
    )
    without_events: list[tuple[float, float]] = []
    with_events: list[tuple[float, float]] = []
    for number in range(rounds):
        for with_progress in (False, True) if number % 2 else (True, False):
            (with_events if with_progress else without_events).append(_pull(bench, image, with_progress))
    bench.report.add(
        Figure(row="progress", subject="PullImage", unit="s", values=[one[0] for one in without_events]),
        Figure(
            row="progress", subject="PullImageWithProgress", unit="s", values=[one[0] for one in with_events]
        ),
        Figure(
            row="progress", subject="PullImage, CPU", unit="CPU s", values=[one[1] for one in without_events]
        ),
        Figure(
            row="progress",
            subject="PullImageWithProgress, CPU",
            unit="CPU s",
            values=[one[1] for one in with_events],
        ),
        Figure(
            row="progress",
            subject="with progress, in the time without",
            unit="x",
            values=[
                statistics.median(one[0] for one in with_events)
                / statistics.median(one[0] for one in without_events)
            ],
            at_most=_PROGRESS_COST,
        ),
    )


def _pull(bench: Bench, image: Image, with_progress: bool) -> tuple[float, float]:
    with bench.daemon() as (daemon, cgroup):
        bundle = daemon.new_bundle()
        reference = image.reference(bench.registry)
        used_before = cgroup.cpu_seconds
        begun = time.monotonic()
        if with_progress:
            for _ in daemon.client.pull_with_progress(reference, bundle):
                pass
        else:
            daemon.client.pull(reference, bundle)
        seconds = time.monotonic() - begun
        used = cgroup.cpu_seconds - used_before
        daemon.client.release_bundle(bundle)
    return seconds, used


def _pull_beside_registry(bench: Bench, image: Image) -> float:
    """Make a cold pull from a newly started registry, on the cores that this process may use."""
    with (
        bench.place.tmpfs() as directory,
        bench.place.cgroup() as cgroup,
        Registry(bench.registry.directory, cgroup) as registry,
        serving(directory, cgroup) as daemon,
    ):
        bundle = daemon.new_bundle()
        begun = time.monotonic()
        daemon.client.pull(image.reference(registry), bundle)
        seconds = time.monotonic() - begun
        daemon.client.release_bundle(bundle)
    return seconds


@contextmanager
def _pinned() -> Iterator[None]:
    """Run everything that this thread starts within a block on one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
