"""Checks from outside: of the files, the mount table, and the daemon's responses.

Every function returns what is wrong, a sentence each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from guestpull_client.models import Bundle
from support.daemon import Daemon, mounts_below
from support.peers import run
from torture.promises import BundlePromise, Promises, State
from torture.world import World

_DECODERS = {"+gzip": "Gzip", "+zstd": "Zstd", ".tar": "Uncompressed"}
_SECONDS_TO_END: Final = 5.0  # for processes that exit with the daemon, on a busy machine


def remains(work_dir: Path, world: World) -> list[str]:
    """Check the files of a killed daemon: the meta store must be readable, and layers complete."""
    try:
        text = (work_dir / "meta_store.json").read_text()
    except FileNotFoundError:
        return []
    try:
        meta: dict[str, Any] = json.loads(text)
    except ValueError as error:
        return [f"meta_store.json cannot be read: {error}: {text[:200]!r}"]
    return [
        *(one for digest, entry in meta["layer_db"].items() for one in _layer(world, digest, entry)),
        *(one for image_id, entry in meta["image_db"].items() for one in _image(world, image_id, entry)),
    ]


def after_start(daemon: Daemon, world: World, promises: Promises) -> list[str]:
    """Check a daemon that just started or has no callers: no unfinished work, and all promises kept.

    Records in the promises what became of bundles whose callers got no response.
    """
    client = daemon.client
    listed = {one.bundle_path: one for one in client.bundles()}
    layers = client.layers()
    images = {one.id for one in client.images()}
    return [
        *remains(daemon.work_dir, world),
        *(f"left in staging: {name}" for name in daemon.staged()),
        *(f"half-written: {path}" for path in daemon.work_dir.glob("*.tmp*")),
        *_strays(daemon, {one.store_path for one in layers}),
        *_bundles(daemon, listed, world, promises),
        *(
            f"image {one} was pulled and not removed, and is gone"
            for one in sorted(promises.present_images() - images)
        ),
    ]


def after_cleaning(daemon: Daemon) -> list[str]:
    """Check a stopped daemon after everything was released and removed: only garbage for gc may be left.

    That is layers of interrupted pulls, which are kept for the next pull.
    """
    collected = _guestpulld(daemon, "gc")["garbage"]
    wrong = [f"gc finds {one}" for one in collected if "no image and no bundle uses" not in one["what"]]
    wrong += [f"after gc, gc finds {one}" for one in _guestpulld(daemon, "gc", "--dry-run")["garbage"]]
    wrong += verified(daemon)
    for room in ("layers", "overlay", "staging", "records", "images"):
        if (daemon.work_dir / room).is_dir():
            wrong += [f"left in {room}: {name}" for name in os.listdir(daemon.work_dir / room)]
    wrong += [f"left mounted: {point}" for point in mounts_below(daemon.disk)]
    wrong += [f"left running: process {pid}" for pid in _left_running(daemon)]
    return wrong


def verified(daemon: Daemon) -> list[str]:
    """Check that `guestpulld verify --deep` finds only notes in an undamaged store.

    With --deep, the content of every layer must match the diff_id in its image's config.
    """
    findings = _guestpulld(daemon, "verify", "--deep")["findings"]
    return [f"verify finds {one}" for one in findings if one["fault"] != "note"]


def _left_running(daemon: Daemon) -> list[int]:
    """Processes that outlive their daemon: those whose standard error is still its log."""
    deadline = time.monotonic() + _SECONDS_TO_END
    while True:
        found = [int(name) for name in os.listdir("/proc") if name.isdigit() and _logs_to(name, daemon.log)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def _logs_to(process: str, log: Path) -> bool:
    try:
        return os.readlink(f"/proc/{process}/fd/2") == str(log)
    except OSError:
        return False


def _guestpulld(daemon: Daemon, *command: str) -> dict[str, Any]:
    program = (sys.executable, "-m", "guestpull_server.cli", *command)
    done = run(*program, "--work-dir", str(daemon.work_dir), "--json", check=False)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _layer(world: World, digest: str, entry: dict[str, Any]) -> Iterator[str]:
    known = world.layer(digest)
    if known is None:
        yield f"layer {digest} does not belong to this world"
        return
    decoder = next(name for end, name in _DECODERS.items() if known.layer.media_type.endswith(end))
    expected = {
        "compressed_digest": digest,
        "uncompressed_digest": known.layer.diff_id,
        "decoder": decoder,
        "encrypted": False,
    }
    for key, value in expected.items():
        if entry[key] != value:
            yield f"layer {digest}: {key} is {entry[key]!r}"
    directory = Path(entry["store_path"])
    # an entry without a directory is correct: the layer is downloaded again
    if directory.is_dir():
        yield from known.violations(directory)


def _image(world: World, image_id: str, entry: dict[str, Any]) -> Iterator[str]:
    known = world.image(image_id)
    if known is None:
        yield f"image {image_id} does not belong to this world"
        return
    if entry["digest"] != known.image.digest:
        yield f"image {image_id}: digest is {entry['digest']}"
    if entry["image_config"] != json.loads(known.image.config):
        yield f"image {image_id}: image_config is not its config"
    layers = [one["compressed_digest"] for one in entry["layer_metas"]]
    digests = [one.digest for one in known.image.layers]
    # as in image-rs, a layer that occurs twice is listed once, at its topmost position
    if layers != [one for place, one in enumerate(digests) if one not in digests[place + 1 :]]:
        yield f"image {image_id}: its layers are {layers}"


def _strays(daemon: Daemon, known: set[str]) -> Iterator[str]:
    there = {entry.path for entry in os.scandir(daemon.work_dir / "layers")}
    yield from (f"no entry has {path}" for path in sorted(there - known))
    names = {os.path.basename(path) for path in there}
    for record in os.listdir(daemon.work_dir / "records"):
        if record.partition(".")[0] not in names:
            yield f"a record without a layer: {record}"


def _bundles(daemon: Daemon, listed: dict[str, Bundle], world: World, promises: Promises) -> Iterator[str]:
    for path, bundle in list(listed.items()):
        promise = promises.bundle(path)
        # interrupted releases and contested bundles have no owner any more
        if path in promises.contested or promise.state is State.LEAVING:
            if bundle.mounted:
                yield from _rootfs(world, bundle, promise)
            daemon.client.release_bundle(path)
            del listed[path]
            promise.state = State.ABSENT
    for path, promise in promises.bundles.items():
        yield from _bundle(world, path, promise, listed.get(path))
    yield from (f"{path} is listed, and nobody wanted it" for path in listed.keys() - promises.bundles.keys())
    expected = {f"{path}/rootfs" for path in listed}
    yield from (f"mounted, but no bundle: {point}" for point in set(mounts_below(daemon.disk)) - expected)
    overlays = os.listdir(daemon.work_dir / "overlay")
    if len(overlays) != len(listed):
        yield f"{len(overlays)} directories in overlay/ for {len(listed)} bundles"


def _bundle(world: World, path: str, promise: BundlePromise, bundle: Bundle | None) -> Iterator[str]:
    if bundle is not None:
        if promise.state is State.TAKEN:
            yield f"{path} was taken away, and is still a bundle"
            return
        if promise.state is State.ABSENT:
            yield f"{path} is listed, and was released or never made"
        if promise.state is not State.READY:
            promise.state, promise.image_id, promise.written = State.READY, bundle.image_id, {}
        if promise.image_id != bundle.image_id:
            yield f"{path} is listed as image {bundle.image_id}, and is {promise.image_id}"
        if not bundle.mounted:
            yield f"{path} is ready, and not mounted"
            return
        yield from _rootfs(world, bundle, promise)
        return
    if promise.state is State.READY:
        yield f"{path} was ready, and is not a bundle any more"
    if os.path.lexists(path):
        yield f"{path} exists, and is not a bundle"
    promise.state = State.ABSENT


def _rootfs(world: World, bundle: Bundle, promise: BundlePromise) -> Iterator[str]:
    image = world.image(bundle.image_id)
    if image is None:
        yield f"{bundle.bundle_path} is image {bundle.image_id}, which nobody made"
        return
    rootfs = Path(bundle.bundle_path, "rootfs")
    for name, content in promise.written.items():
        if (rootfs / name).read_bytes() != content:
            yield f"{rootfs / name} is not what was written there"
    yield from image.violations(rootfs, besides=frozenset(os.fsencode(name) for name in promise.written))
    try:
        json.loads(Path(bundle.bundle_path, "config.json").read_text())
    except (OSError, ValueError) as error:
        yield f"{bundle.bundle_path}/config.json cannot be read: {error}"
