"""Rows of guestpull alone: how its costs grow with layers, entries, images in the store, and callers."""

from __future__ import annotations

import hashlib
import io
import json
import statistics
import tarfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmark.contenders import Guestpull, cold_pull
from benchmark.images import Upload
from benchmark.machine import Meter, Registry, settle

Row = dict[str, float | int | str]
_LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True)
class SmallLayer:
    """A gzip layer in memory."""

    blob: bytes
    diff_id: str

    @property
    def digest(self) -> str:
        """The blob's digest."""
        return f"sha256:{hashlib.sha256(self.blob).hexdigest()}"


def layer_of(entries: int, name: str) -> SmallLayer:
    """A layer of small files, a hundred in a directory."""
    hasher = hashlib.sha256()
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31)
    out = io.BytesIO()
    for number in range(entries):
        header = tarfile.TarInfo(f"{name}/{number // 100:06}/{number:08}")
        header.size = 16
        block = header.tobuf(tarfile.USTAR_FORMAT) + f"{number:016}".encode() + bytes(496)
        hasher.update(block)
        out.write(compressor.compress(block))
    hasher.update(bytes(1024))
    out.write(compressor.compress(bytes(1024)) + compressor.flush())
    return SmallLayer(out.getvalue(), f"sha256:{hasher.hexdigest()}")


def push(registry: Registry, repository: str, layers: list[SmallLayer]) -> str:
    """Push an image of such layers; returns its reference."""
    upload = Upload(registry, repository)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/true"]},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
    ).encode()
    config_digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    upload.blob(config_digest, io.BytesIO(config), len(config))
    for layer in {layer.digest: layer for layer in layers}.values():
        upload.blob(layer.digest, io.BytesIO(layer.blob), len(layer.blob))
    described = [{"mediaType": _LAYER, "digest": one.digest, "size": len(one.blob)} for one in layers]
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config_digest,
            "size": len(config),
        },
        "layers": described,
    }
    upload.manifest("1", json.dumps(manifest).encode())
    return f"{registry.host}/{repository}:1"


def milliseconds(times: list[float]) -> Row:
    """Median and 99th percentile of seconds, in milliseconds."""
    ordered = sorted(times)
    return {
        "median_ms": round(1000 * statistics.median(ordered), 2),
        "p99_ms": round(1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
        "calls": len(ordered),
    }


def _timed(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


def warm(guestpull: Guestpull, reference: str, bundles: Path, at_once: int = 1, calls: int = 200) -> Row:
    """Warm pulls, in a row or at once; what they made is released between the rounds, unmeasured."""
    times: list[float] = []
    guestpull.client.pull(reference, str(bundles / "first"))
    with ThreadPoolExecutor(at_once) as pool:
        while len(times) < calls:
            paths = [str(bundles / f"warm-{number}") for number in range(at_once)]
            times += pool.map(lambda path: _timed(lambda: guestpull.client.pull(reference, path)), paths)
            for path in paths:
                guestpull.client.release_bundle(path)
    guestpull.client.release_bundle(str(bundles / "first"))
    return milliseconds(times)


def start(guestpull: Guestpull, rounds: int = 5) -> Row:
    """From the start of the process to a healthy service."""
    times: list[float] = []
    for _ in range(rounds):
        guestpull.stop()
        times.append(guestpull.start())
    return milliseconds(times)


def fill(work_dir: Path, images: int, layers: int) -> None:
    """Give a work directory a store of so many images, each of five of so many layers, as if it had grown."""
    layer_db: dict[str, object] = {}
    metas: list[dict[str, object]] = []
    (work_dir / "layers").mkdir(parents=True, exist_ok=True, mode=0o700)
    facts: list[str] = []
    for number in range(layers):
        digest = f"sha256:{hashlib.sha256(b'layer %d' % number).hexdigest()}"
        diff_id = f"sha256:{hashlib.sha256(b'tar %d' % number).hexdigest()}"
        name = digest.replace(":", "_")
        path = work_dir / "layers" / name
        path.mkdir()
        meta: dict[str, object] = {
            "decoder": "Gzip",
            "encrypted": False,
            "compressed_digest": digest,
            "uncompressed_digest": diff_id,
            "store_path": str(path),
        }
        metas.append(meta)
        layer_db[digest] = meta
        facts.append(
            json.dumps(
                {
                    "compressed_digest": digest,
                    "uncompressed_digest": diff_id,
                    "decoder": "Gzip",
                    "directory": name,
                    "size_bytes": number,
                    "entries": 1,
                }
            )
        )
    image_db: dict[str, object] = {}
    for number in range(images):
        image_id = f"sha256:{hashlib.sha256(b'image %d' % number).hexdigest()}"
        own = [metas[(5 * number + offset) % layers] for offset in range(5)]
        image_db[image_id] = {
            "id": image_id,
            "digest": f"sha256:{hashlib.sha256(b'manifest %d' % number).hexdigest()}",
            "reference": f"registry.example/app-{number}:1",
            "image_config": {
                "architecture": "amd64",
                "os": "linux",
                "config": {"Env": [f"VARIABLE_{n}=value" for n in range(20)]},
                "rootfs": {"type": "layers", "diff_ids": [one["uncompressed_digest"] for one in own]},
                "history": [{"created_by": f"RUN step {n} of many"} for n in range(20)],
            },
            "signed": False,
            "layer_metas": own,
        }
    store = {"image_db": image_db, "layer_db": layer_db, "snapshot_db": {}}
    (work_dir / "meta_store.json").write_text(json.dumps(store))
    (work_dir / "layer_facts.jsonl").write_text("".join(f"{line}\n" for line in facts))


def list_layers(guestpull: Guestpull, calls: int = 20) -> Row:
    """ListLayers of the whole store, through the client."""
    return milliseconds([_timed(guestpull.client.layers) for _ in range(calls)])


def many_layers(guestpull: Guestpull, registry: Registry, layers: int) -> Row:
    """A cold pull of an image of so many small layers."""
    reference = push(registry, f"layers-{layers}", [layer_of(20, f"layer-{n}") for n in range(layers)])
    settle()
    cost = cold_pull(guestpull, reference, [])
    return {
        "layers": layers,
        "seconds": round(cost.seconds, 3),
        "ms_per_layer": round(1000 * cost.seconds / layers, 2),
    }


def many_entries(guestpull: Guestpull, registry: Registry, entries: int) -> Row:
    """A cold pull of one layer of so many files of 16 bytes, with the peak of memory in a second one."""
    reference = push(registry, f"entries-{entries}", [layer_of(entries, "many")])
    costs = []
    for memory in (False, True):
        settle()
        costs.append(guestpull.pull(reference, memory=memory))
        guestpull.forget(reference)
    return {
        "entries": entries,
        "seconds": round(costs[0].seconds, 3),
        "us_per_entry": round(1e6 * costs[0].seconds / entries, 1),
        "peak_MiB": round(costs[1].peak_pss_bytes / 2**20, 1),
    }


def many_callers(guestpull: Guestpull, registry: Registry, callers: int, bundles: Path) -> Row:
    """So many callers at once, each of an image of its own with a base that all share."""
    base = layer_of(2000, "base")
    own = [layer_of(200, f"own-{number}") for number in range(callers)]
    references = [
        push(registry, f"caller-{callers}-{number}", [base, layer]) for number, layer in enumerate(own)
    ]
    settle()
    with Meter(guestpull.process.pid) as meter, ThreadPoolExecutor(callers) as pool:
        started = time.monotonic()
        list(
            pool.map(
                lambda job: guestpull.client.pull(job[1], str(bundles / f"caller-{job[0]}")),
                enumerate(references),
            )
        )
        seconds = time.monotonic() - started
    for number, reference in enumerate(references):
        guestpull.client.release_bundle(str(bundles / f"caller-{number}"))
        guestpull.client.remove_image(reference)
    return {"callers": callers, "seconds": round(seconds, 3), "cpu_seconds": round(meter.cpu_seconds, 2)}
