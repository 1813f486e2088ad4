"""Removing images and releasing bundles: what is used stays, what is not goes, also after a restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from guestpull_client import LayerDone
from guestpull_client.errors import AlreadyExists, FailedPrecondition, NotFound
from support.daemon import Daemon, mounts_below
from support.faults import Stall
from support.images import file, files, image, layer
from support.peers import GrpcError, grpcurl
from support.samples import runnable
from support.simulator import RegistrySimulator
from support.waiting import until


def layer_directories(daemon: Daemon) -> set[str]:
    return {name.replace("_", ":") for name in os.listdir(daemon.work_dir / "layers")}


@pytest.mark.parametrize("restarted", [False, True], ids=["at once", "after a restart"])
def test_an_image_that_a_bundle_uses_stays(
    daemon: Daemon, registry: RegistrySimulator, restarted: bool
) -> None:
    reference = registry.push("used:1", image(runnable()))
    bundle = str(daemon.bundle("one"))
    pulled = daemon.client.pull(reference, bundle)
    if restarted:
        daemon.stop()
        daemon.start()

    with pytest.raises(FailedPrecondition, match=bundle) as caught:
        daemon.client.remove_image(reference)

    assert caught.value.reason == "IMAGE_IN_USE"
    (listed,) = daemon.client.images()
    assert listed.bundles == (bundle,)
    assert daemon.client.layers()[0].bundles == 1
    assert daemon.client.bundles()[0].mounted
    assert (Path(pulled.rootfs_path) / "etc/passwd").exists()


@pytest.mark.parametrize("restarted", [False, True], ids=["at once", "after a restart"])
def test_by_force_an_image_is_forgotten_at_once_and_its_layers_go_with_the_last_bundle(
    daemon: Daemon, registry: RegistrySimulator, restarted: bool
) -> None:
    content = runnable()
    reference = registry.push("forced:1", image(content))
    one, two = str(daemon.bundle("one")), str(daemon.bundle("two"))
    daemon.client.pull(reference, one)
    daemon.client.pull(reference, two)

    removed = daemon.client.remove_image(reference, force=True)
    assert removed.deleted_layers == ()
    assert daemon.client.images() == ()
    if restarted:
        daemon.stop()
        daemon.start()
    assert daemon.client.release_bundle(one).deleted_layers == ()
    assert (daemon.bundle("two") / "rootfs/etc/passwd").exists()
    last = daemon.client.release_bundle(two)

    assert last.deleted_layers == (content.digest,)
    assert last.freed_bytes > 0
    assert layer_directories(daemon) == set()
    assert daemon.meta_store()["layer_db"] == {}


def test_a_layer_stays_as_long_as_another_image_has_it(daemon: Daemon, registry: RegistrySimulator) -> None:
    shared, own = runnable(), layer(file("own", b"x"))
    one = registry.push("one:1", image(shared))
    two = registry.push("two:1", image(shared, own))
    for number, reference in enumerate((one, two)):
        daemon.client.pull(reference, str(daemon.bundle(str(number))))
        daemon.client.release_bundle(str(daemon.bundle(str(number))))

    removed = daemon.client.remove_image(two)
    assert removed.deleted_layers == (own.digest,)
    assert layer_directories(daemon) == {shared.digest}

    removed = daemon.client.remove_image(one)
    assert removed.deleted_layers == (shared.digest,)
    assert layer_directories(daemon) == set()


def test_one_of_several_names_is_untagged_and_the_last_one_takes_the_image_along(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    pushed = image(runnable())
    first, second = registry.push("name:1", pushed), registry.push("name:2", pushed)
    for number, reference in enumerate((first, second)):
        daemon.client.pull(reference, str(daemon.bundle(str(number))))
        daemon.client.release_bundle(str(daemon.bundle(str(number))))
    assert daemon.client.images()[0].references == (first, second)

    removed = daemon.client.remove_image(first)
    assert (removed.image_ids, removed.references) == ((), (first,))
    assert daemon.client.images()[0].references == (second,)

    removed = daemon.client.remove_image(second)
    assert removed.image_ids == (pushed.image_id,)
    assert daemon.client.images() == ()


def test_a_tag_that_moved_names_the_new_image_and_the_old_one_keeps_its_digest(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    old, new = image(layer(file("v", b"1"))), image(layer(file("v", b"2")))
    reference = registry.push("moved:1", old)
    daemon.client.pull(reference, str(daemon.bundle("one")))
    registry.push("moved:1", new)

    daemon.client.pull(reference, str(daemon.bundle("two")))

    names = {one.id: one.references for one in daemon.client.images()}
    assert names == {
        new.image_id: (reference,),
        old.image_id: (f"{reference.rpartition(':')[0]}@{old.digest}",),
    }


@pytest.mark.parametrize("length", [12, 64])
def test_an_image_is_removed_by_its_id_or_the_beginning_of_it(
    daemon: Daemon, registry: RegistrySimulator, length: int
) -> None:
    pushed = image(runnable())
    daemon.client.pull(registry.push("id:1", pushed), str(daemon.bundle("one")))
    daemon.client.release_bundle(str(daemon.bundle("one")))

    removed = daemon.client.remove_image(pushed.image_id.removeprefix("sha256:")[:length])

    assert removed.image_ids == (pushed.image_id,)


def test_releasing_leaves_nothing_of_ours_and_everything_of_others(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    reference = registry.push("clean:1", image(runnable()))
    made, found = daemon.bundle("made"), daemon.bundle("found")
    found.mkdir(parents=True)
    (found / "notes").write_text("the caller's")
    for bundle in (made, found):
        daemon.client.pull(reference, str(bundle))
        (bundle / "rootfs/written").write_text("into the upper directory")

        daemon.client.release_bundle(str(bundle))

    assert not made.exists()
    assert os.listdir(found) == ["notes"]
    assert os.listdir(daemon.work_dir / "overlay") == []
    assert daemon.staged() == []
    assert mounts_below(daemon.disk) == []
    with pytest.raises(NotFound):
        daemon.client.release_bundle(str(made))


def test_a_bundle_that_is_in_use_is_not_released(daemon: Daemon, registry: RegistrySimulator) -> None:
    reference = registry.push("busy:1", image(runnable()))
    pulled = daemon.client.pull(reference, str(daemon.bundle("one")))
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], cwd=pulled.rootfs_path, stdin=subprocess.PIPE
    ) as user:
        with pytest.raises(FailedPrecondition) as caught:
            daemon.client.release_bundle(str(daemon.bundle("one")))
        user.communicate(b"\n")

    assert caught.value.reason == "BUNDLE_BUSY"
    assert daemon.client.bundles()[0].mounted
    daemon.client.release_bundle(str(daemon.bundle("one")))


@pytest.mark.parametrize("found", ["config.json", "a file in rootfs", "a link for rootfs"])
def test_a_directory_that_is_in_use_is_no_place_for_a_bundle(
    daemon: Daemon, registry: RegistrySimulator, found: str
) -> None:
    bundle = daemon.bundle("one")
    bundle.mkdir(parents=True)
    match found:
        case "config.json":
            (bundle / "config.json").write_text("{}")
        case "a file in rootfs":
            (bundle / "rootfs").mkdir()
            (bundle / "rootfs/precious").write_text("x")
        case _:
            (bundle / "rootfs").symlink_to("/")
    before = sorted(os.walk(bundle))

    with pytest.raises(AlreadyExists):
        daemon.client.pull(registry.push("clash:1", image(runnable())), str(bundle))

    assert sorted(os.walk(bundle)) == before
    assert mounts_below(daemon.disk) == []


def test_bundles_stay_below_the_roots_that_are_configured(disk: Path, registry: RegistrySimulator) -> None:
    root = disk / "allowed"
    outside = disk / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    reference = registry.push("roots:1", image(runnable()))
    with Daemon(disk, configuration={"bundle_roots": [str(root)]}) as daemon:
        daemon.client.pull(reference, str(root / "deep/one"))
        for path in (
            "relative",
            str(outside / "two"),
            str(root / "link/three"),
            f"{root}/../outside/four",
            str(root),
        ):
            # the client would make a relative path absolute
            request = {"image_url": reference, "bundle_path": path}
            with pytest.raises(GrpcError) as caught:
                grpcurl(daemon.socket, "guestpull.v1.ImageService/PullImage", request)
            assert (caught.value.code, caught.value.reason) == ("InvalidArgument", "INVALID_BUNDLE_PATH")
        assert os.listdir(outside) == []


def test_unknown_keys_of_the_meta_store_survive(daemon: Daemon, registry: RegistrySimulator) -> None:
    reference = registry.push("keys:1", image(runnable()))
    pulled = daemon.client.pull(reference, str(daemon.bundle("one")))
    daemon.client.release_bundle(str(daemon.bundle("one")))
    daemon.stop()
    meta = daemon.meta_store()
    meta["from_the_future"] = {"a": [1, 2.50, None]}
    meta["snapshot_db"] = {"kept": 7}
    meta["image_db"][pulled.image_id]["note"] = "kept"
    meta["layer_db"][pulled.layers[0].compressed_digest]["note"] = "kept too"
    (daemon.work_dir / "meta_store.json").write_text(json.dumps(meta))
    daemon.start()

    other = registry.push("keys:2", image(layer(file("x", b"y"))))
    daemon.client.pull(other, str(daemon.bundle("two")))

    after = daemon.meta_store()
    assert after["from_the_future"] == meta["from_the_future"]
    assert after["snapshot_db"] == {"kept": 7}
    assert after["image_db"][pulled.image_id] == meta["image_db"][pulled.image_id]
    assert after["layer_db"][pulled.layers[0].compressed_digest]["note"] == "kept too"


def test_a_damaged_meta_store_is_set_aside_and_what_is_certain_is_kept(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    reference = registry.push("damaged:1", image(runnable()))
    daemon.client.pull(reference, str(daemon.bundle("one")))
    daemon.client.release_bundle(str(daemon.bundle("one")))
    daemon.stop()
    path = daemon.work_dir / "meta_store.json"
    damaged = path.read_bytes()[:-40]
    path.write_bytes(damaged)

    daemon.start()

    (aside,) = daemon.work_dir.glob("meta_store.json.corrupt-*")
    assert aside.read_bytes() == damaged
    assert "was damaged" in daemon.log.read_text()
    assert not daemon.client.is_healthy("guestpull.store")
    assert [one.present for one in daemon.client.layers()] == [True]
    pulled = daemon.client.pull(reference, str(daemon.bundle("two")))
    assert pulled.downloaded_bytes == 0


def test_garbage_of_a_running_daemon_is_reported_and_collected(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    used, left, stalled = runnable(), layer(*files("left", count=3)), layer(*files("stalled", count=3))
    daemon.client.pull(registry.push("kept:1", image(used)), str(daemon.bundle("kept")))
    registry.fault(stalled, Stall(after=0.5))
    pulling = daemon.client.pull_with_progress(
        registry.push("left:1", image(left, stalled)), str(daemon.bundle("left"))
    )
    until("one layer is done", lambda: isinstance(next(pulling), LayerDone))
    pulling.close()
    until("the pull has ended", lambda: not daemon.bundle("left").exists())

    expected = daemon.client.collect_garbage(dry_run=True)
    assert expected.deleted_layers == (left.digest,)
    assert layer_directories(daemon) == {used.digest, left.digest}
    collected = daemon.client.collect_garbage()

    assert collected.deleted_layers == expected.deleted_layers
    assert 0 < expected.freed_bytes <= collected.freed_bytes  # what is kept beside the layer goes with it
    assert layer_directories(daemon) == {used.digest}
    assert daemon.client.collect_garbage().deleted_layers == ()
