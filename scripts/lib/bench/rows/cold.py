"""Measures a cold pull by guestpulld, podman, containerd, and skopeo with umoci, and the bound."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
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
_COLUMNS: Final = (
    "",
    "seconds (spread)",
    "of guestpulld",
    "of the bound",
    "CPU s (spread)",
    "registry's CPU s",
    "peak PSS, MiB",
)


@dataclass(frozen=True, slots=True)
class _Pull:
    """The cost of one pull: seconds, CPU seconds, and the registry's CPU seconds."""

    seconds: float
    cpu: float
    registry_cpu: float


def cold(bench: Bench, codec: Codec) -> None:
    """Pull the tree with one codec by each contender in turn, for several rounds, and check each result."""
    image = bench.images.tree(codec)
    nodes = bench.images.nodes()
    who = [one for one in contenders() if codec in one.codecs]
    row = f"cold-{codec}"
    bench.report.title(
        f"{row}: a cold pull of {image.tar_size / 1e9:.2f} GB, {image.entries:,} entries, "
        f"{image.size / 1e6:.0f} MB as {codec}, {len(image.layers)} layers; {bench.rounds} rounds"
    )
    pulls: dict[str, list[_Pull]] = {one.name: [] for one in who}
    parts: list[bound.Parts] = []
    for number in range(bench.rounds):
        for place_in_round in range(len(who)):
            one = who[(place_in_round + number) % len(who)]
            pulls[one.name].append(_timed(bench, one, codec, nodes))
        parts.append(bound.measure(bench.place, bench.registry, image, bench.images.tree("plain")))
    peaks = {one.name: _peak(bench, one, codec) for one in who}
    _show(bench, who, pulls, peaks, parts)
    _keep(bench, row, pulls, peaks, parts)
    _judge(bench, row, pulls, peaks, parts)


def _timed(bench: Bench, one: Contender, codec: Codec, nodes: list[Node]) -> _Pull:
    """Measure one pull and check its result."""
    reference = bench.images.tree(codec).reference(bench.registry)
    with (
        bench.place.tmpfs() as directory,
        bench.place.cgroup() as cgroup,
        one.make_ready(directory, cgroup, reference) as ready,
    ):
        used, registry_used = cgroup.cpu_seconds, bench.registry.cpu_seconds
        begun = time.monotonic()
        ready.pull()
        taken = _Pull(
            seconds=time.monotonic() - begun,
            cpu=cgroup.cpu_seconds - used,
            registry_cpu=bench.registry.cpu_seconds - registry_used,
        )
        check(ready.rootfs(), nodes, one.directory_times)
        return taken


def _peak(bench: Bench, one: Contender, codec: Codec) -> float:
    """Measure the peak memory of another pull, in MiB."""
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
    who: list[Contender],
    pulls: dict[str, list[_Pull]],
    peaks: dict[str, float],
    parts: list[bound.Parts],
) -> None:
    work = statistics.median(one.total for one in parts)
    ours = statistics.median(one.seconds for one in pulls["guestpulld"])
    cells = [_row(one, pulls[one.name], peaks[one.name], ours, work / bench.cores) for one in who]
    totals = [one.total for one in parts]
    alone = _cells("the bound", [one / bench.cores for one in totals], totals, ours, work / bench.cores)
    bench.report.table(_COLUMNS, [*cells, [*alone, "", ""]])
    middle = [
        statistics.median(getattr(one, part) for one in parts)
        for part in ("inflate", "hash_compressed", "hash_tar", "create")
    ]
    bench.report.say(
        "  the bound's CPU s: inflate {:.2f}, sha256 of the blobs {:.2f} and of the tars {:.2f}, "
        "creating the files {:.2f}; on {} cores".format(*middle, bench.cores)
    )
    bench.report.say()


def _row(one: Contender, taken: list[_Pull], peak: float, ours: float, limit: float) -> list[str]:
    seconds, cpu = [pull.seconds for pull in taken], [pull.cpu for pull in taken]
    registry_cpu = statistics.median(pull.registry_cpu for pull in taken)
    shared = _cells(f"{one.name} {one.version}", seconds, cpu, ours, limit)
    return [*shared, f"{registry_cpu:.2f}", f"{peak:.0f}"]


def _cells(name: str, seconds: list[float], cpu: list[float], ours: float, limit: float) -> list[str]:
    middle = statistics.median(seconds)
    return [name, shown(seconds), f"{middle / ours:.1f}x", f"{middle / limit:.2f}x", shown(cpu)]


def _keep(
    bench: Bench,
    row: str,
    pulls: dict[str, list[_Pull]],
    peaks: dict[str, float],
    parts: list[bound.Parts],
) -> None:
    for name, taken in pulls.items():
        bench.report.keep(
            Figure(row=row, subject=name, unit="s", values=[one.seconds for one in taken]),
            Figure(row=row, subject=f"{name}, CPU", unit="CPU s", values=[one.cpu for one in taken]),
            Figure(
                row=row,
                subject=f"{name}, the registry's CPU",
                unit="CPU s",
                values=[one.registry_cpu for one in taken],
            ),
            Figure(row=row, subject=f"{name}, peak PSS", unit="MiB", values=[peaks[name]]),
        )
    for part in ("inflate", "hash_compressed", "hash_tar", "create", "total"):
        bench.report.keep(
            Figure(
                row=row,
                subject=f"the bound, {part}",
                unit="CPU s",
                values=[getattr(one, part) for one in parts],
            )
        )


def _judge(
    bench: Bench,
    row: str,
    pulls: dict[str, list[_Pull]],
    peaks: dict[str, float],
    parts: list[bound.Parts],
) -> None:
    limit = statistics.median(one.total for one in parts) / bench.cores
    ours = statistics.median(one.seconds for one in pulls["guestpulld"])
    bench.report.add(
        Figure(
            row=row,
            subject="guestpulld's time, in bounds",
            unit="x",
            values=[one.seconds / limit for one in pulls["guestpulld"]],
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
    for name, taken in pulls.items():
        if name != "guestpulld":
            bench.report.add(
                Figure(
                    row=row,
                    subject=f"{name}'s time, in guestpulld's",
                    unit="x",
                    values=[one.seconds / ours for one in taken],
                    at_least=_FASTER_THAN.get(name) if row == "cold-gzip" else None,
                )
            )
