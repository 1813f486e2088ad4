"""Baking an image, baking one more that shares its base, and proving that what is there is the image."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Final

from bench.context import Bench
from bench.place import Cgroup, run
from bench.report import Figure

_PROGRAM: Final = Path(sys.executable).with_name("guestpulld")
_PROVED_PER_CORE: Final = 1.0  # gigabytes a second
_RECORD_PERCENT: Final = 1.0


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


def verify(bench: Bench) -> None:
    """`guestpulld verify --deep` of the tree: each layer's tar put together again, and hashed."""
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
            at_most=_RECORD_PERCENT,
        ),
    )


def _seconds(cgroup: Cgroup, work_dir: Path, reference: str) -> float:
    begun = time.monotonic()
    run(*cgroup.command([_PROGRAM, "bake", "--work-dir", work_dir, reference]))
    return time.monotonic() - begun
