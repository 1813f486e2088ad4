"""The command behind `scripts/bench`."""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

from bench.chart import draw
from bench.context import Bench
from bench.images import Images
from bench.place import Machine, Refusal, busy_share, place
from bench.profile import profile
from bench.registry import Registry
from bench.report import Report
from bench.rows import bake, cold, cores, growth, store, warm
from bench.tree import Size
from guestpull_client import GuestpullError

_FULL: Final = Size(1_380_000_000, 74_000)
_QUICK: Final = Size(150_000_000, 8_000)
_NEEDED_BYTES: Final = {
    False: 6 * 2**30,
    True: 2 * 2**30,
}  # by --quick: blobs, one tree, one copy of the blobs

_BUSY: Final = 0.1  # of the cores

ROWS: Final[dict[str, Callable[[Bench], None]]] = {
    "cold-gzip": functools.partial(cold.cold, codec="gzip"),
    "cold-zstd": functools.partial(cold.cold, codec="zstd"),
    "cold-plain": functools.partial(cold.cold, codec="plain"),
    "cores": cores.cores,
    "progress": cores.progress,
    "warm": warm.warm,
    "store": store.store,
    "layers": growth.layers,
    "entries": growth.entries,
    "callers": growth.callers,
    "bake": bake.bake,
    "pod": bake.pod,
    "record": bake.record,
    "verify": bake.verify,
}
_QUICK_ROWS: Final = ("cold-gzip", "warm", "store", "layers")


def measure(bench: Bench, rows: Sequence[str]) -> None:
    """Measure the rows, one after another."""
    for name in rows:
        ROWS[name](bench)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures guestpulld beside podman, containerd, and skopeo with umoci, on this machine.",
        epilog="The images are made once, of this machine's files, and kept in $GUESTPULL_BENCH_DIR "
        "(~/.cache/guestpull-bench).",
    )
    parser.add_argument("--quick", action="store_true", help="a small image and few rows, in under a minute")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=ROWS, help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each is measured [5; quick: 2]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the cold pulls there, as SVG")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="profile one cold pull into DIR, instead of measuring"
    )
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> None:
    machine = Machine.here()
    quick: bool = arguments.quick
    needed = _NEEDED_BYTES[quick]
    if machine.memory_bytes < needed:
        raise Refusal(
            f"this needs {needed / 2**30:.0f} GiB of memory, and {machine.memory_bytes / 2**30:.1f} GiB are free. "
            "Free some, or try --quick."
        )
    rounds: int = arguments.rounds or (2 if quick else 5)
    rows: list[str] = arguments.only or list(_QUICK_ROWS if quick else ROWS)
    today = dt.datetime.now(dt.UTC).date().isoformat()
    report = Report({"machine": str(machine), "date": today, "rounds": str(rounds), "quick": str(quick)})
    report.say(f"guestpull bench, {today}: {machine}")
    report.say(f"rows: {', '.join(rows)}; all of it on tmpfs; medians, with the spread beside them")
    _warn_if_busy(report)
    kept = Path(os.environ.get("GUESTPULL_BENCH_DIR") or "~/.cache/guestpull-bench").expanduser()
    directory = kept.absolute() / ("quick" if quick else "full")
    directory.mkdir(parents=True, exist_ok=True)
    with place() as here, here.cgroup() as cgroup, Registry(directory / "registry", cgroup) as registry:
        images = Images(directory, registry, _QUICK if quick else _FULL, report.say)
        bench = Bench(here, registry, images, report, rounds, quick, machine.cores)
        if arguments.profile is not None:
            profile(bench, arguments.profile)
            return
        measure(bench, rows)
    _warn_if_busy(report)
    report.verdicts()
    if arguments.json is not None:
        report.write(arguments.json)
    if arguments.chart is not None:
        draw(report.figures, machine.cores, f"{machine}, {today}", arguments.chart)


def _warn_if_busy(report: Report) -> None:
    busy = busy_share()
    if busy > _BUSY:
        report.say(
            f"WARNING: others keep {busy:.0%} of this machine's cores busy; these figures will be too slow"
        )


def _terminate(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the benchmark; exit status 0 if it completed, with any figures; 1 if it could not; 130 after Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _terminate)
    try:
        _run(_arguments())
    except (Refusal, GuestpullError) as error:
        sys.stderr.write(f"bench: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("bench: stopped; nothing is left but the images that were made\n")
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
