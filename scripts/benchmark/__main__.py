"""scripts/bench: what is measured, in which order, and what is told of it."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from benchmark import bound, growth, images
from benchmark.contenders import Containerd, Contender, Cost, Guestpull, Podman, SkopeoUmoci, cold_pull
from benchmark.machine import NotEnough, Registry, available_bytes, on_signals_exit, tmpfs
from benchmark.report import Report

ROWS: Final = {
    "cold": "cold pulls beside podman, containerd and skopeo+umoci, in gzip, zstd and plain, and their bounds",
    "cores": "one big layer alone on one core and on two",
    "progress": "pulling with progress beside pulling without",
    "warm": "warm pulls, 200 in a row and 32 at a time",
    "start": "the daemon's start, with an empty store and with 10,000 layers",
    "store": "a store of 2,000 images and 10,000 layers: ListLayers, and warm pulls",
    "layers": "images of many layers",
    "entries": "layers of many entries, and the memory that they take",
    "callers": "many callers at once",
}
_GIB: Final = 2**30


def main(
    quick: Annotated[
        bool, typer.Option("--quick", help="A small image and fewer rounds: under a minute.")
    ] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of the cold pulls [5; quick: 2].")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Only these rows: {', '.join(ROWS)}.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Have py-spy write a profile of cold pulls into this directory.")
    ] = None,
) -> None:
    """Measure guestpull beside its peers, on one image, in one run."""
    unknown = set(only or ()) - ROWS.keys()
    if unknown:
        raise typer.BadParameter(f"there is no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    wanted = only or list(ROWS)
    shape = images.QUICK if quick else images.FULL
    needed = 3 * _GIB if quick else 8 * _GIB
    if available_bytes() < needed:
        raise NotEnough(f"{needed // _GIB} GiB of free memory are needed for the tmpfs that is measured in")
    cache = Path(os.environ.get("GUESTPULL_BENCH_DIR", Path.home() / ".cache/guestpull-bench"))
    report = Report()
    report.say("measuring: " + "; ".join(ROWS[row] for row in wanted) + "\n")
    with tmpfs(needed) as directory, Registry(cache / "registry") as registry:
        references = images.ensure(registry, shape, cache)
        bench = Bench(report, registry, directory, references, quick, rounds or (2 if quick else 5), profile)
        for row in wanted:
            getattr(bench, row)()
    if json_file is not None:
        json_file.write_text(json.dumps(report.document, indent=2) + "\n")


class Bench:
    """The rows, a method each."""

    def __init__(
        self,
        report: Report,
        registry: Registry,
        directory: Path,
        references: dict[str, str],
        quick: bool,
        rounds: int,
        profile: Path | None,
    ) -> None:
        self._report = report
        self._registry = registry
        self._directory = directory
        self._references = references
        self._quick = quick
        self._rounds = rounds
        self._profile = profile
        self._cores = len(os.sched_getaffinity(0))

    def _guestpull(self, name: str = "guestpull", cores: frozenset[int] = frozenset()) -> Guestpull:
        return Guestpull(self._directory / name, cores, self._profile)

    def cold(self) -> None:
        """Cold pulls, all contenders in turn, round by round."""
        for kind in images.FORMATS:
            reference = self._references[kind]
            with contextlib.ExitStack() as stack:
                contenders: list[Contender] = [
                    stack.enter_context(self._guestpull()),
                    Podman(self._directory / "podman"),
                    stack.enter_context(Containerd(self._directory / "containerd")),
                    SkopeoUmoci(self._directory / "umoci"),
                ]
                contenders = [one for one in contenders if kind in one.formats]
                costs: dict[str, list[Cost]] = {one.name: [] for one in contenders}
                expected: list[str] = []
                for _ in range(self._rounds):
                    for one in contenders:
                        costs[one.name].append(cold_pull(one, reference, expected))
                memory = {one.name: cold_pull(one, reference, expected, memory=True) for one in contenders}
            parts = bound.measure(self._registry, reference, kind, self._directory)
            self._report.cold(kind, costs, memory, parts, self._cores)

    def cores(self) -> None:
        """One layer alone, on one core and on two."""
        entries = 5_000 if self._quick else 40_000
        reference = self._one_big_layer(entries)
        medians: list[float] = []
        for cores in (frozenset({0}), frozenset({0, 1})):
            with self._guestpull(cores=cores) as guestpull:
                seconds = [cold_pull(guestpull, reference, []).seconds for _ in range(self._rounds)]
            medians.append(statistics.median(seconds))
        one, two = medians
        row: growth.Row = {
            "one_core_s": round(one, 3),
            "two_cores_s": round(two, 3),
            "faster": round(one / two, 2),
        }
        self._report.row("one layer, 1 core and 2", row)

    def _one_big_layer(self, entries: int) -> str:
        reference = f"bench-one-{entries}"
        if not self._registry.has(reference, "gzip"):
            shape = images.Shape(f"one-{entries}", (entries,))
            images.ensure(self._registry, shape, self._directory)
        return f"{self._registry.host}/{reference}:gzip"

    def progress(self) -> None:
        """With progress and without, in turn."""
        reference = self._references["gzip"]
        seconds: dict[bool, list[float]] = {False: [], True: []}
        with self._guestpull() as guestpull:
            for _ in range(self._rounds + 1):
                for with_progress in (False, True):
                    seconds[with_progress].append(guestpull.pull(reference, progress=with_progress).seconds)
                    guestpull.forget(reference)
        without, with_ = (statistics.median(seconds[one]) for one in (False, True))
        row: growth.Row = {
            "without_s": round(without, 3),
            "with_s": round(with_, 3),
            "costs_percent": round(100 * (with_ / without - 1), 1),
        }
        self._report.row("progress", row)

    def warm(self) -> None:
        """Warm pulls in an otherwise empty store."""
        with self._guestpull() as guestpull:
            for at_once in (1, 32):
                row = growth.warm(guestpull, self._small(), self._directory, at_once)
                self._report.row(f"warm pull, {at_once} at a time", row)

    def _small(self) -> str:
        return growth.push(self._registry, "small", [growth.layer_of(100, "a"), growth.layer_of(100, "b")])

    def start(self) -> None:
        """From nothing to healthy."""
        with self._guestpull() as guestpull:
            self._report.row("start, empty store", growth.start(guestpull))
            guestpull.stop()
            growth.fill(guestpull.work_dir, 2_000, 10_000)
            guestpull.start()
            self._report.row("start, 10,000 layers", growth.start(guestpull))

    def store(self) -> None:
        """A store that has grown."""
        for count in (0, 200, 2_000):
            with self._guestpull(f"store-{count}") as guestpull:
                guestpull.stop()
                growth.fill(guestpull.work_dir, count, 5 * count)
                guestpull.start()
                self._report.row(f"ListLayers, {5 * count:,} layers", growth.list_layers(guestpull))
                row = growth.warm(guestpull, self._small(), self._directory)
                self._report.row(f"warm pull, {count:,} images in the store", row)

    def layers(self) -> None:
        """Images of more and more layers."""
        with self._guestpull() as guestpull:
            for count in (10, 120) if self._quick else (1, 10, 120, 480):
                self._report.row("layers", growth.many_layers(guestpull, self._registry, count))

    def entries(self) -> None:
        """Layers of more and more entries."""
        with self._guestpull() as guestpull:
            for power in (3, 4) if self._quick else (3, 4, 5, 6):
                self._report.row("entries", growth.many_entries(guestpull, self._registry, 10**power))

    def callers(self) -> None:
        """More and more callers."""
        with self._guestpull() as guestpull:
            for count in (1, 8) if self._quick else (1, 8, 32):
                row = growth.many_callers(guestpull, self._registry, count, self._directory)
                self._report.row("callers", row)


if __name__ == "__main__":
    on_signals_exit()
    try:
        typer.run(main)
    except NotEnough as error:
        sys.exit(f"bench: {error}")
