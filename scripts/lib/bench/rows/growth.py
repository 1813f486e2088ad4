"""Measures how cost grows with entries in a layer, layers in an image, and concurrent callers."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from bench.context import Bench
from bench.images import Image
from bench.report import Figure

_MEMORY_MIB: Final = 150.0
_MANY_LAYERS: Final = 480
_PER_LAYER_GROWTH: Final = 1.0


def entries(bench: Bench) -> None:
    """Pull one layer with 10^3 to 10^6 small files; measure time per entry, and memory."""
    counts = (1_000, 10_000) if bench.quick else (1_000, 10_000, 100_000, 1_000_000)
    bench.report.title(
        "entries: a cold pull of one layer of so many files, a quarter of them of 100 bytes, the others empty"
    )
    for count in counts:
        image = bench.images.entries(count)
        seconds = [bench.cold_pull(image) for _ in range(bench.rounds if count < 1_000_000 else 1)]
        bench.report.add(
            Figure(row="entries", subject=f"{count:,} entries", unit="s", values=seconds),
            Figure(
                row="entries",
                subject=f"{count:,} entries, an entry",
                unit="us",
                values=[one * 1e6 / count for one in seconds],
            ),
            Figure(
                row="entries",
                subject=f"{count:,} entries, peak PSS",
                unit="MiB",
                values=[bench.peak_of_cold_pull(image)],
                at_most=_MEMORY_MIB,
            ),
        )


def layers(bench: Bench) -> None:
    """Pull images of 1 to 480 layers; measure time per layer."""
    counts = (1, 30, 120) if bench.quick else (1, 30, 120, _MANY_LAYERS)
    bench.report.title("layers: a cold pull of so many layers of 20 files each")
    middle: Figure | None = None
    for count in counts:
        image = bench.images.layers(count)
        seconds = [bench.cold_pull(image) for _ in range(bench.rounds)]
        a_layer = Figure(
            row="layers",
            subject=f"{count} layers, a layer",
            unit="ms",
            values=[one * 1000 / count for one in seconds],
            # 10 % for noise; the cost of an image with one layer is mostly not that of the layer
            at_most=middle.median * (_PER_LAYER_GROWTH + 0.1) if middle is not None else None,
        )
        bench.report.add(
            Figure(row="layers", subject=f"{count} layers", unit="s", values=seconds),
            a_layer,
        )
        if count == 30:
            middle = a_layer


def callers(bench: Bench) -> None:
    """Pull with concurrent callers: each with a different image, and all with the same one."""
    counts = (1, 8) if bench.quick else (1, 2, 4, 8, 16, 32)
    bench.report.title("callers: so many cold pulls that begin at once")
    for count in counts:
        images = [bench.images.small(number) for number in range(count)]
        seconds = [_all_at_once(bench, images) for _ in range(bench.rounds)]
        bench.report.add(
            Figure(
                row="callers",
                subject=f"{count} callers, an image of 500 files each",
                unit="ms",
                values=[one * 1000 for one in seconds],
            ),
            Figure(
                row="callers",
                subject=f"{count} callers, an image",
                unit="ms",
                values=[one * 1000 / count for one in seconds],
            ),
        )
    image = bench.images.tree("gzip")
    for count in (1, 8):
        seconds = [_all_at_once(bench, [image] * count) for _ in range(bench.rounds)]
        bench.report.add(
            Figure(row="callers", subject=f"{count} callers, all the big image", unit="s", values=seconds)
        )


def _all_at_once(bench: Bench, images: list[Image]) -> float:
    with bench.daemon() as (daemon, _), ThreadPoolExecutor(len(images)) as pool:
        begun = time.monotonic()
        pulls = [
            pool.submit(daemon.client.pull, image.reference(bench.registry), daemon.new_bundle())
            for image in images
        ]
        for one in pulls:
            one.result()
        seconds = time.monotonic() - begun
        for bundle in daemon.client.bundles():
            daemon.client.release_bundle(bundle.bundle_path)
    return seconds
