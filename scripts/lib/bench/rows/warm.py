"""Pulls of an image that is in the store: no layer is downloaded, a bundle is made.

The latency of one caller, and the throughput of 32. A goal for the latency of 32 callers at once would be a goal
for the throughput in disguise: they share the cores, so each waits for the others. gRPC alone, with a handler of
0.4 ms, answers 1,150 calls a second on two cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from bench.context import Bench
from bench.daemon import Daemon
from bench.report import Figure
from guestpull_client import PullPolicy

_IN_A_ROW: Final = 200
_AT_ONCE: Final = 32
_PULLS_A_CALLER: Final = 8
_MEDIAN_MS: Final = 5.0
_P99_MS: Final = 15.0
_PULLS_A_SECOND: Final = 1000


def warm(bench: Bench) -> None:
    """200 in a row, and 32 callers, through the Python client; with and without asking the registry."""
    image = bench.images.tree("gzip")
    reference = image.reference(bench.registry)
    times = 4 if bench.quick else 10
    bench.report.title(
        f"warm: pulls of an image whose {len(image.layers)} layers are there, by the Python client"
    )
    with bench.daemon() as (daemon, _):
        for policy, said in (
            (PullPolicy.UNSPECIFIED, "asks the registry for the tag"),
            (PullPolicy.IF_NOT_PRESENT, "asks nobody"),
        ):
            daemon.client.release_bundle(_pulled(daemon, reference, policy)[1])
            in_a_row = warm_pulls(daemon, reference, _IN_A_ROW, policy)
            a_second = _pulls_a_second(daemon, reference, policy, times)
            bench.report.add(
                Figure(
                    row="warm",
                    subject=f"in a row; {said}",
                    unit="ms",
                    values=in_a_row,
                    at_most=_MEDIAN_MS,
                    at_most_p99=_P99_MS,
                ),
                Figure(
                    row="warm",
                    subject=f"{_AT_ONCE} callers; {said}",
                    unit="/s",
                    values=a_second,
                    at_least=_PULLS_A_SECOND if policy is PullPolicy.IF_NOT_PRESENT else None,
                ),
            )


def warm_pulls(daemon: Daemon, reference: str, count: int, policy: PullPolicy) -> list[float]:
    """Milliseconds of so many warm pulls in a row. Bundles are released between them."""
    taken: list[float] = []
    for _ in range(count):
        milliseconds, bundle = _pulled(daemon, reference, policy)
        daemon.client.release_bundle(bundle)
        taken.append(milliseconds)
    return taken


def _pulls_a_second(daemon: Daemon, reference: str, policy: PullPolicy, times: int) -> list[float]:
    """Pulls a second of 32 callers, each of which pulls several times without a pause; releases are not timed."""
    rates: list[float] = []

    def caller(_number: int) -> list[str]:
        return [_pulled(daemon, reference, policy)[1] for _ in range(_PULLS_A_CALLER)]

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in range(times):
            begun = time.monotonic()
            bundles = [bundle for made in pool.map(caller, range(_AT_ONCE)) for bundle in made]
            rates.append(len(bundles) / (time.monotonic() - begun))
            release: Callable[[str], object] = daemon.client.release_bundle
            list(pool.map(release, bundles))
    return rates


def _pulled(daemon: Daemon, reference: str, policy: PullPolicy) -> tuple[float, str]:
    bundle = daemon.new_bundle()
    begun = time.monotonic()
    daemon.client.pull(reference, bundle, policy=policy)
    return (time.monotonic() - begun) * 1000, bundle
