"""A short campaign of torture; and proof that one would see what it looks for."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.daemon import Daemon
from support.images import image, layer_of_tar
from support.peers import DockerRegistry, run, unpacked_by_umoci
from support.simulator import RegistrySimulator
from torture import inspection
from torture.campaign import Campaign
from torture.promises import Promises, State
from torture.world import KnownImage, World, make_world


def test_nothing_is_lost_and_nothing_untrue_believed_however_often_the_daemon_is_killed(
    tmp_path: Path,
) -> None:
    with Campaign(seed=20, directory=tmp_path) as campaign:
        campaign.run(kills=8, seconds=300)

        assert campaign.report.kills >= 8


@pytest.mark.parametrize("seed", range(3))
def test_the_world_s_images_are_what_umoci_unpacks(
    docker_registry: DockerRegistry, tmp_path: Path, seed: int
) -> None:
    tallest = make_world(random.Random(seed)).images[2]
    # umoci knows no zstd
    gzip = image(*(layer_of_tar(one.layer.tar) for one in tallest.layers))
    reference = docker_registry.push("world", str(seed), gzip)

    assert tallest.violations(unpacked_by_umoci(reference, tmp_path / "umoci")) == []


class Scenery:
    """A daemon with one bundle of an image of many layers, and what was promised of it."""

    def __init__(self, daemon: Daemon, registry: RegistrySimulator) -> None:
        self.daemon = daemon
        self.world: World = make_world(random.Random(5), layers=4, images_=3)
        self.image: KnownImage = self.world.images[2]
        self.promises = Promises()
        self.bundle = str(daemon.bundle("one"))
        self.client = daemon.client
        pulled = self.client.pull(registry.push("tall:1", self.image.image), self.bundle)
        self.promises.pulled(pulled.image_id, {})
        promise = self.promises.bundle(self.bundle)
        promise.state, promise.image_id = State.READY, pulled.image_id

    def look(self) -> list[str]:
        """What is wrong."""
        return inspection.after_start(self.daemon, self.world, self.promises)

    def a_file(self) -> Path:
        """A file of a layer."""
        known = self.image.layers[0]
        directory = self.daemon.work_dir / "layers" / known.layer.digest.replace(":", "_")
        path = next(
            path for path, node in known.nodes.items() if node.content and not node.content.startswith("0 ")
        )
        return directory / os.fsdecode(path)


@pytest.fixture
def scenery(daemon: Daemon, registry: RegistrySimulator) -> Scenery:
    """Where nothing is wrong yet."""
    made = Scenery(daemon, registry)
    assert made.look() == []
    return made


def alter_a_byte(scenery: Scenery) -> None:
    path = scenery.a_file()
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncate_the_meta_store(scenery: Scenery) -> None:
    path = scenery.daemon.work_dir / "meta_store.json"
    path.write_bytes(path.read_bytes()[:-1])


def mount_something(scenery: Scenery) -> None:
    directory = scenery.daemon.disk / "bundles/other"
    directory.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", str(directory))


def expect_it_taken_away(scenery: Scenery) -> None:
    scenery.promises.bundle(scenery.bundle).state = State.TAKEN


@pytest.mark.parametrize(
    ("plant", "seen"),
    [
        (alter_a_byte, "content is"),
        (lambda scenery: scenery.a_file().chmod(0o7777), "mode is"),
        (lambda scenery: scenery.a_file().with_name("more").touch(), "only in ours"),
        (truncate_the_meta_store, "cannot be read"),
        (lambda scenery: (scenery.daemon.work_dir / "staging/left").mkdir(), "left in staging"),
        (lambda scenery: (scenery.daemon.work_dir / "layers/stray").mkdir(), "no entry has"),
        (lambda scenery: (scenery.daemon.work_dir / "overlay/stray").mkdir(), "directories in overlay/"),
        (lambda scenery: scenery.client.release_bundle(scenery.bundle), "not a bundle any more"),
        (lambda scenery: scenery.client.remove_image(scenery.image.image.image_id, force=True), "is gone"),
        (lambda scenery: run("umount", f"{scenery.bundle}/rootfs"), "not mounted"),
        (mount_something, "mounted, but no bundle"),
        (expect_it_taken_away, "is still a bundle"),
    ],
    ids=[
        "an altered byte",
        "another mode",
        "a file too many",
        "a meta store cut short",
        "something in staging",
        "a layer that nobody knows",
        "an overlay that nobody knows",
        "a bundle that was lost",
        "an image that was lost",
        "a rootfs that is not mounted",
        "a mount that nobody knows",
        "a bundle that was taken away and not released",
    ],
)
def test_torture_sees(scenery: Scenery, plant: Callable[[Scenery], object], seen: str) -> None:
    plant(scenery)
    try:
        assert [one for one in scenery.look() if seen in one]
    finally:
        run("umount", str(scenery.daemon.disk / "bundles/other"), check=False)


def test_torture_sees_what_verify_finds(scenery: Scenery) -> None:
    assert inspection.verified(scenery.daemon) == []
    alter_a_byte(scenery)

    assert [one for one in inspection.verified(scenery.daemon) if "verify finds" in one]


def test_torture_sees_a_process_that_outlives_its_daemon(scenery: Scenery) -> None:
    scenery.client.release_bundle(scenery.bundle)
    scenery.daemon.stop()
    with scenery.daemon.log.open("ab") as log:
        process = subprocess.Popen(["sleep", "1000"], stderr=log)
    try:
        assert f"left running: process {process.pid}" in inspection.after_cleaning(scenery.daemon)
    finally:
        process.kill()
        process.wait()
