"""The layers that failed pulls leave in a running daemon, and a disk that they fill."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpull_client.errors import NotFound, ResourceExhausted
from support.daemon import Daemon, Tmpfs
from support.faults import Status
from support.images import Layer, file, image, layer
from support.samples import runnable
from support.simulator import RegistrySimulator
from support.waiting import until

MIB = 1024 * 1024
ONE_BY_ONE = {"max_concurrent_layer_downloads_per_image": 1}


def big(mebibytes: int) -> Layer:
    """A layer that nothing compresses."""
    return layer(file("big", secrets.token_bytes(mebibytes * MIB)))


def fail_after(daemon: Daemon, registry: RegistrySimulator, name: str, whole: Layer) -> str:
    """Pull an image of which one layer is committed and the next one is missing; returns its reference."""
    missing = layer(file(name))
    reference = registry.push(f"{name}:1", image(whole, missing))
    registry.fault(missing, Status(404), times=1)
    with pytest.raises(NotFound):
        daemon.client.pull(reference, str(daemon.bundle("failed")))
    return reference


def layers_of(daemon: Daemon) -> set[str]:
    return {name.replace("_", ":") for name in os.listdir(daemon.work_dir / "layers")}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that three big layers fill."""
    with Tmpfs(tmp_path / "disk", "40m") as disk:
        yield disk


def test_a_retry_after_a_failure_downloads_no_layer_twice(disk: Path, registry: RegistrySimulator) -> None:
    content = big(1)
    with Daemon(disk, configuration=ONE_BY_ONE) as daemon:
        reference = fail_after(daemon, registry, "app", content)

        daemon.client.pull(reference, str(daemon.bundle("one")))

        assert registry.bytes_sent(content) == content.size


def test_layers_that_no_retry_comes_for_are_deleted(disk: Path, registry: RegistrySimulator) -> None:
    used = runnable()
    with Daemon(disk, configuration=ONE_BY_ONE | {"limits": {"unused_layer_seconds": 1}}) as daemon:
        daemon.client.pull(registry.push("used:1", image(used)), str(daemon.bundle("used")))
        fail_after(daemon, registry, "app", big(1))

        until("the unused layer is deleted", lambda: layers_of(daemon) == {used.digest})

        assert (daemon.bundle("used") / "rootfs/etc/passwd").exists()


def test_layers_that_failed_pulls_left_before_a_restart_are_deleted(
    disk: Path, registry: RegistrySimulator
) -> None:
    with Daemon(disk, configuration=ONE_BY_ONE) as daemon:
        fail_after(daemon, registry, "app", big(1))
        daemon.kill()
        (daemon.work_dir / "config.json").write_text('{"limits": {"unused_layer_seconds": 1}}')
        daemon.start()

        until("the unused layer is deleted", lambda: not layers_of(daemon))


def test_failed_pulls_do_not_fill_the_disk(small_disk: Path, registry: RegistrySimulator) -> None:
    with Daemon(small_disk, configuration=ONE_BY_ONE) as daemon:
        for number in range(8):
            fail_after(daemon, registry, f"app{number}", big(12))

        content = big(30)
        reference = registry.push("whole:1", image(content))
        daemon.client.pull(reference, str(daemon.bundle("one")))

        assert layers_of(daemon) == {content.digest}
        assert daemon.staged() == []


def test_a_bundle_finds_room_where_unused_layers_are(small_disk: Path, registry: RegistrySimulator) -> None:
    used = runnable()
    with Daemon(small_disk, configuration=ONE_BY_ONE) as daemon:
        reference = registry.push("used:1", image(used))
        daemon.client.pull(reference, str(daemon.bundle("first")))
        fail_after(daemon, registry, "app", big(12))
        with (small_disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)) == 4096 and os.statvfs(small_disk).f_bavail:
                pass

        daemon.client.pull(reference, str(daemon.bundle("second")))

        assert layers_of(daemon) == {used.digest}


def test_an_image_that_has_no_room_fails_and_what_is_complete_is_kept(
    small_disk: Path, registry: RegistrySimulator
) -> None:
    fits, does_not = big(12), big(40)
    reference = registry.push("large:1", image(fits, does_not))
    with Daemon(small_disk, configuration=ONE_BY_ONE) as daemon:
        with pytest.raises(ResourceExhausted, match="completed layers are reused") as caught:
            daemon.client.pull(reference, str(daemon.bundle("one")))

        assert caught.value.reason == "STORAGE_FULL"
        assert layers_of(daemon) == {fits.digest}
        assert daemon.client.collect_garbage().deleted_layers == (fits.digest,)
        assert layers_of(daemon) == set()
