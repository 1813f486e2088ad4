"""A cold pull: guestpulld beside podman, containerd, and skopeo with umoci; against the bound."""

from __future__ import annotations

import statistics
import time
from typing import Final

from bench import bound
from bench.check import check
from bench.contenders import Contender, contenders
from bench.context import Bench
from bench.layers import Codec
from bench.memory import watched
from bench.report import Figure, shown
from bench.tree import Node

_BOUND_RATIO: Final = 1.25
_MEMORY_MIB: Final = 150
_FASTER_THAN: Final = {"podman": 6.0, "containerd": 5.0}


def cold(bench: Bench, codec: Codec) -> None:
    """Pull the tree in one form by each contender in turn, several rounds, and check what each made."""
    image = bench.images.tree(codec)
    nodes = bench.images.nodes()
    who = [one for one in contenders() if codec in one.codecs]
    row = f"cold-{codec}"
    bench.report.title(
        f"{row}: a cold pull of {image.tar_size / 1e9:.2f} GB, {image.entries:,} entries, "
        f"{image.size / 1e6:.0f} MB as {codec}, {len(image.layers)} layers; {bench.rounds} rounds"
    )
    seconds: dict[str, list[float]] = {one.name: [] for one in who}
    cpu: dict[str, list[float]] = {one.name: [] for one in who}
    parts: list[bound.Parts] = []
    for number in range(bench.rounds):
        for place_in_round in range(len(who)):
            one = who[(place_in_round + number) % len(who)]
            taken, used = _timed(bench, one, codec, nodes)
            seconds[one.name].append(taken)
            cpu[one.name].append(used)
        parts.append(bound.measure(bench.place, bench.registry, image, bench.images.tree("plain")))
    peaks = {one.name: _peak(bench, one, codec) for one in who}
    _show(bench, row, who, seconds, cpu, peaks, parts)


def _timed(bench: Bench, one: Contender, codec: Codec, nodes: list[Node]) -> tuple[float, float]:
    """Seconds, and CPU seconds, of one pull whose result is right."""
    reference = bench.images.tree(codec).reference(bench.registry)
    with (
        bench.place.tmpfs() as directory,
        bench.place.cgroup() as cgroup,
        one.make_ready(directory, cgroup, reference) as ready,
    ):
        used_before = cgroup.cpu_seconds
        begun = time.monotonic()
        ready.pull()
        taken = time.monotonic() - begun
        used = cgroup.cpu_seconds - used_before
        check(ready.rootfs(), nodes, one.directory_times)
        return taken, used


def _peak(bench: Bench, one: Contender, codec: Codec) -> float:
    """Peak memory of one more pull, in MiB."""
    reference = bench.images.tree(codec).reference(bench.registry)
    with (
        bench.place.tmpfs() as directory,
        bench.place.cgroup() as cgroup,
        one.make_ready(directory, cgroup, reference) as ready,
        watched(cgroup) as peak,
    ):
        ready.pull()
    return peak.bytes / 2**20


def _show(
    bench: Bench,
    row: str,
    who: list[Contender],
    seconds: dict[str, list[float]],
    cpu: dict[str, list[float]],
    peaks: dict[str, float],
    parts: list[bound.Parts],
) -> None:
    bounds = [one.total / bench.cores for one in parts]
    limit = statistics.median(bounds)
    ours = statistics.median(seconds["guestpulld"])
    cells = [
        [
            f"{one.name} {one.version}",
            shown(seconds[one.name]),
            f"{statistics.median(seconds[one.name]) / ours:.1f}x",
            f"{statistics.median(seconds[one.name]) / limit:.2f}x",
            shown(cpu[one.name]),
            f"{peaks[one.name]:.0f}",
        ]
        for one in who
    ]
    work = [one.total for one in parts]
    cells.append(["the bound", shown(bounds), f"{limit / ours:.1f}x", "1.00x", shown(work), ""])
    bench.report.table(
        ["", "seconds (spread)", "of guestpulld", "of the bound", "CPU s", "peak PSS, MiB"], cells
    )
    middle = [
        statistics.median(getattr(one, part) for one in parts)
        for part in ("inflate", "hash_compressed", "hash_tar", "create")
    ]
    bench.report.say(
        "  the bound's CPU s: inflate {:.2f}, sha256 of the blobs {:.2f} and of the tars {:.2f}, "
        "creating the files {:.2f}; on {} cores".format(*middle, bench.cores)
    )
    for one in who:
        bench.report.keep(
            Figure(row=row, subject=one.name, unit="s", values=seconds[one.name]),
            Figure(row=row, subject=f"{one.name}, CPU", unit="CPU s", values=cpu[one.name]),
        )
        if one.name != "guestpulld":
            bench.report.keep(
                Figure(row=row, subject=f"{one.name}, peak PSS", unit="MiB", values=[peaks[one.name]])
            )
    bench.report.keep(Figure(row=row, subject="the bound", unit="s", values=bounds))
    bench.report.say()
    bench.report.add(
        Figure(
            row=row,
            subject="guestpulld's time, in bounds",
            unit="x",
            values=[one / limit for one in seconds["guestpulld"]],
            at_most=_BOUND_RATIO,
        ),
        Figure(
            row=row,
            subject="guestpulld's peak PSS, daemon and workers",
            unit="MiB",
            values=[peaks["guestpulld"]],
            at_most=_MEMORY_MIB,
        ),
    )
    for one in who:
        if one.name != "guestpulld":
            bench.report.add(
                Figure(
                    row=row,
                    subject=f"{one.name}'s time, in guestpulld's",
                    unit="x",
                    values=[value / ours for value in seconds[one.name]],
                    at_least=_FASTER_THAN.get(one.name) if row == "cold-gzip" else None,
                )
            )
