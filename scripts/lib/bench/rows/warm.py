"""Pulls of an image that is there: no layer is downloaded, a bundle is made."""

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
_MEDIAN_MS: Final = 5.0
_P99_MS: Final = 15.0


def warm(bench: Bench) -> None:
    """200 in a row, and 32 at a time, through the Python client; with and without asking the registry."""
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
            at_once, apart = _at_once(daemon, reference, policy, times)
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
                    subject=f"{_AT_ONCE} at a time; {said}",
                    unit="ms",
                    values=at_once,
                    at_most=_MEDIAN_MS,
                    at_most_p99=_P99_MS,
                ),
                Figure(
                    row="warm", subject=f"{_AT_ONCE} at a time, their time a pull", unit="ms", values=apart
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


def _at_once(
    daemon: Daemon, reference: str, policy: PullPolicy, times: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of each of 32 pulls that begin at once; and of all 32 of them, divided by 32."""
    each: list[float] = []
    apart: list[float] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in range(times):
            begun = time.monotonic()
            done = [pool.submit(_pulled, daemon, reference, policy) for _ in range(_AT_ONCE)]
            answers = [one.result() for one in done]
            apart.append((time.monotonic() - begun) * 1000 / _AT_ONCE)
            each += [milliseconds for milliseconds, _ in answers]
            release: Callable[[str], object] = daemon.client.release_bundle
            list(pool.map(release, [bundle for _, bundle in answers]))
    return each, apart


def _pulled(daemon: Daemon, reference: str, policy: PullPolicy) -> tuple[float, str]:
    bundle = daemon.new_bundle()
    begun = time.monotonic()
    daemon.client.pull(reference, bundle, policy=policy)
    return (time.monotonic() - begun) * 1000, bundle
