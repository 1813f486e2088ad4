"""Measures pulls of an image that is in the store: they download no layer, and create a bundle.

There are goals for the latency of one caller and the throughput of 32. The latency of 32 concurrent callers
follows from the throughput, because they wait for each other. gRPC alone, with a handler of 0.4 ms, answers
1,150 calls per second on two cores.
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
    """Make 200 pulls in a row, and pulls by 32 callers, with the Python client; with and without the registry."""
    image = bench.images.tree("gzip")
    reference = image.reference(bench.registry)
    times = 4 if bench.quick else 10
    bench.report.title(
        f"warm: pulls of an image whose {len(image.layers)} layers are there, by the Python client"
    )
    with bench.daemon() as (daemon, _):
        for policy, what in (
            (PullPolicy.UNSPECIFIED, "asks the registry for the tag"),
            (PullPolicy.IF_NOT_PRESENT, "asks nobody"),
        ):
            daemon.client.release_bundle(_pulled(daemon, reference, policy)[1])
            in_a_row = warm_pulls(daemon, reference, _IN_A_ROW, policy)
            a_second = _pulls_a_second(daemon, reference, policy, times)
            bench.report.add(
                Figure(
                    row="warm",
                    subject=f"in a row; {what}",
                    unit="ms",
                    values=in_a_row,
                    at_most=_MEDIAN_MS,
                    at_most_p99=_P99_MS,
                ),
                Figure(
                    row="warm",
                    subject=f"{_AT_ONCE} callers; {what}",
                    unit="/s",
                    values=a_second,
                    at_least=_PULLS_A_SECOND if policy is PullPolicy.IF_NOT_PRESENT else None,
                ),
            )


def warm_pulls(daemon: Daemon, reference: str, count: int, policy: PullPolicy) -> list[float]:
    """Measure warm pulls in a row, in milliseconds. Bundles are released between them."""
    taken: list[float] = []
    for _ in range(count):
        milliseconds, bundle = _pulled(daemon, reference, policy)
        daemon.client.release_bundle(bundle)
        taken.append(milliseconds)
    return taken


def _pulls_a_second(daemon: Daemon, reference: str, policy: PullPolicy, times: int) -> list[float]:
    """Measure pulls per second by 32 callers who each pull several times in a row; do not time releases."""
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
