"""Measures start, lists and pulls with few and with many images in the store.

The images are a store in image-rs's format: a meta_store.json, and a directory per layer. They are not in the
registry.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from bench.context import Bench
from bench.daemon import Daemon, serving
from bench.report import Figure
from bench.rows.warm import warm_pulls
from guestpull_client import PullPolicy

_IMAGE_LAYERS: Final = 5  # of an image of the store
_HISTORY: Final = 20  # entries of an image config's history; real configs have a few kilobytes
_START_SECONDS: Final = 0.5
_LIST_MS: Final = 100.0
_SLOWER: Final = 2.0


def store(bench: Bench) -> None:
    """Measure start, ListLayers, ListImages and warm pulls, in stores with growing numbers of images."""
    sizes = (0, 200) if bench.quick else (0, 500, 1000, 2000)
    repetitions = 5 if bench.quick else 11
    reference = bench.images.small(0).reference(bench.registry)
    bench.report.title(f"store: what images in the store cost; {_IMAGE_LAYERS} layers each")
    empty_ms = 0.0
    for images in sizes:
        name = f"{images:,} images, {images * _IMAGE_LAYERS:,} layers"
        with bench.place.tmpfs() as directory, bench.place.cgroup() as cgroup:
            write_store(directory / "work", images)
            # do not measure the first start, which takes over a store that another program wrote
            with serving(directory, cgroup):
                pass
            starts: list[float] = []
            for _ in range(repetitions):
                with serving(directory, cgroup) as daemon:
                    starts.append(daemon.start_seconds)
            with serving(directory, cgroup) as daemon:
                daemon.client.release_bundle(
                    daemon.client.pull(reference, daemon.new_bundle()).rootfs_path[:-7]
                )
                figures = _measured(daemon, name, reference, starts, repetitions)
        warm = next(figure for figure in figures if figure.unit == "ms" and "warm" in figure.subject)
        bench.report.add(*figures)
        if images == 0:
            empty_ms = warm.median
        else:
            bench.report.add(
                Figure(
                    row="store",
                    subject=f"{name}: a warm pull, in the empty store's",
                    unit="x",
                    values=[warm.median / empty_ms],
                    at_most=_SLOWER,
                )
            )


def _measured(
    daemon: Daemon, name: str, reference: str, starts: list[float], repetitions: int
) -> list[Figure]:
    warm = warm_pulls(daemon, reference, 100, PullPolicy.UNSPECIFIED)
    return [
        Figure(row="store", subject=f"{name}: start", unit="s", values=starts, at_most=_START_SECONDS),
        Figure(
            row="store",
            subject=f"{name}: ListLayers",
            unit="ms",
            values=_repeated(daemon.list_layers, repetitions),
            at_most=_LIST_MS,
        ),
        Figure(
            row="store",
            subject=f"{name}: ListLayers, as the client's objects",
            unit="ms",
            values=_repeated(daemon.client.layers, repetitions),
        ),
        Figure(
            row="store",
            subject=f"{name}: ListImages, as the client's objects",
            unit="ms",
            values=_repeated(daemon.client.images, repetitions),
        ),
        Figure(row="store", subject=f"{name}: a warm pull", unit="ms", values=warm),
    ]


def _repeated(call: Callable[[], object], count: int) -> list[float]:
    taken: list[float] = []
    for _ in range(count):
        begun = time.monotonic()
        call()
        taken.append((time.monotonic() - begun) * 1000)
    return taken


def write_store(work_dir: Path, images: int) -> None:
    """Write a store of images without common layers, in image-rs's format."""
    image_db: dict[str, object] = {}
    layer_db: dict[str, object] = {}
    (work_dir / "layers").mkdir(parents=True)
    history = [
        {"created": "2026-01-02T03:04:05Z", "created_by": f"RUN /bin/sh -c step {number} # " + "x" * 80}
        for number in range(_HISTORY)
    ]
    for number in range(images):
        layers = [_layer(work_dir, f"{number}.{index}") for index in range(_IMAGE_LAYERS)]
        layer_db |= {str(layer["compressed_digest"]): layer for layer in layers}
        image_id = _digest(f"image {number}")
        image_db[image_id] = {
            "id": image_id,
            "digest": _digest(f"manifest {number}"),
            "reference": f"registry.example/team/image-{number}:1.0",
            "image_config": {
                "architecture": "amd64",
                "os": "linux",
                "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sh"]},
                "rootfs": {"type": "layers", "diff_ids": [layer["uncompressed_digest"] for layer in layers]},
                "history": history,
            },
            "signed": False,
            "layer_metas": layers,
        }
    document = {"image_db": image_db, "layer_db": layer_db, "snapshot_db": {}}
    (work_dir / "meta_store.json").write_bytes(msgspec.json.encode(document))


def _layer(work_dir: Path, name: str) -> dict[str, str | bool]:
    digest = _digest(f"layer {name}")
    directory = work_dir / "layers" / digest.replace(":", "_")
    directory.mkdir()
    (directory / "file").write_text(name)
    return {
        "decoder": "Gzip",
        "encrypted": False,
        "compressed_digest": digest,
        "uncompressed_digest": _digest(f"tar {name}"),
        "store_path": str(directory),
    }


def _digest(name: str) -> str:
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
