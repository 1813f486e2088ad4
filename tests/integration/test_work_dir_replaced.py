"""A work directory that is deleted while the daemon runs, as kata-agent does it at CreateSandbox."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from guestpull_client.errors import NotFound, Unavailable
from support.daemon import Daemon, Tmpfs
from support.faults import Drip
from support.images import file, files, image, layer
from support.peers import run
from support.samples import runnable
from support.simulator import RegistrySimulator
from support.waiting import PATIENCE, until


@pytest.fixture
def daemon(disk: Path) -> Iterator[Daemon]:
    """A guestpulld whose work directory lies in a directory that others may delete."""
    with Daemon(disk, work_dir=disk / "kata-containers/image") as running:
        yield running


def delete(directory: Path) -> None:
    run("rm", "-rf", str(directory))


def empty(directory: Path) -> None:
    """Delete what is in a directory, as where it is a mount point."""
    for path in directory.iterdir():
        delete(path)


def replace(directory: Path) -> None:
    """Rename a directory, and have an empty one in its place."""
    directory.rename(directory.with_name("old"))
    directory.mkdir()


def pull_and_release(daemon: Daemon, reference: str) -> None:
    """Have an image in the store."""
    daemon.client.pull(reference, str(daemon.bundle("first")))
    daemon.client.release_bundle(str(daemon.bundle("first")))


def test_pulls_go_on_after_the_work_directory_was_deleted(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    content = runnable()
    reference = registry.push("app:1", image(content))
    pull_and_release(daemon, reference)
    delete(daemon.work_dir.parent)

    assert daemon.client.images() == ()
    pulled = daemon.client.pull(reference, str(daemon.bundle("one")))

    assert pulled.downloaded_bytes == content.size
    assert (daemon.bundle("one") / "rootfs/etc/passwd").exists()
    assert [one.references for one in daemon.client.images()] == [(reference,)]
    daemon.client.release_bundle(str(daemon.bundle("one")))
    assert not daemon.bundle("one").exists()
    assert daemon.staged() == []


@pytest.mark.parametrize("remove", [delete, empty, replace])
def test_a_pull_is_the_first_to_notice(
    daemon: Daemon, registry: RegistrySimulator, remove: Callable[[Path], None]
) -> None:
    reference = registry.push("app:1", image(runnable()))
    pull_and_release(daemon, reference)
    remove(daemon.work_dir)

    daemon.client.pull(reference, str(daemon.bundle("one")))

    assert (daemon.bundle("one") / "rootfs/etc/passwd").exists()
    assert set(daemon.meta_store()["image_db"]) == {daemon.client.images()[0].id}


@pytest.mark.parametrize("room", ["layers", "records", "images", "overlay", "staging"])
def test_a_room_that_was_deleted_is_there_again(
    daemon: Daemon, registry: RegistrySimulator, room: str
) -> None:
    reference = registry.push("app:1", image(runnable()))
    pull_and_release(daemon, reference)
    delete(daemon.work_dir / room)

    daemon.client.pull(reference, str(daemon.bundle("one")))

    assert (daemon.bundle("one") / "rootfs/etc/passwd").exists()


def test_what_was_made_in_a_replaced_work_directory_is_known_after_a_restart(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    reference = registry.push("app:1", image(runnable()))
    pull_and_release(daemon, reference)
    delete(daemon.work_dir.parent)
    daemon.client.pull(reference, str(daemon.bundle("one")))

    daemon.stop()
    daemon.start()

    assert daemon.client.pull(reference, str(daemon.bundle("two"))).downloaded_bytes == 0
    assert [one.bundle_path for one in daemon.client.bundles()] == [
        str(daemon.bundle(name)) for name in ("one", "two")
    ]


def test_a_pull_that_is_under_way_fails_with_a_reason_of_its_own_and_leaves_nothing(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    content = layer(*files("slow", count=50))
    reference = registry.push("slow:1", image(content))
    go_on = threading.Event()
    registry.fault(content, Drip(after=0.5, bytes_per_second=20, until=go_on), times=1)
    other = registry.push("other:1", image(runnable()))
    client = daemon.client
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(client.pull, reference, str(daemon.bundle("slow")))
        until("the layer is being unpacked", lambda: daemon.staged() and registry.bytes_sent(content))
        delete(daemon.work_dir.parent)
        client.pull(other, str(daemon.bundle("other")))
        go_on.set()

        with pytest.raises(Unavailable) as caught:
            pulling.result(PATIENCE)

    assert caught.value.reason == "WORK_DIR_REPLACED"
    assert not daemon.bundle("slow").exists()
    assert [one.references for one in client.images()] == [(other,)]
    assert daemon.staged() == []
    assert client.pull(reference, str(daemon.bundle("slow"))).downloaded_bytes == content.size


def test_all_who_notice_at_once_are_served_by_one_store(daemon: Daemon, registry: RegistrySimulator) -> None:
    references = [
        registry.push(f"app{number}:1", image(layer(file(f"f{number}")), runnable())) for number in range(16)
    ]
    client = daemon.client
    pull_and_release(daemon, references[0])
    delete(daemon.work_dir.parent)

    with ThreadPoolExecutor(16) as pool:
        bundles = [str(daemon.bundle(str(number))) for number in range(16)]
        list(pool.map(client.pull, references, bundles))

    assert {one.references for one in client.images()} == {(reference,) for reference in references}
    assert len(client.bundles()) == 16


def test_a_bundle_of_the_deleted_work_directory_is_left_to_its_user(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    reference = registry.push("app:1", image(runnable()))
    bundle = daemon.bundle("old")
    daemon.client.pull(reference, str(bundle))
    delete(daemon.work_dir.parent)

    with pytest.raises(NotFound):
        daemon.client.release_bundle(str(bundle))

    assert os.path.ismount(bundle / "rootfs")
    run("umount", str(bundle / "rootfs"))


def test_a_file_system_may_be_mounted_on_the_work_directory(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    below, above = (registry.push(f"{name}:1", image(layer(file(name)))) for name in ("below", "above"))
    pull_and_release(daemon, below)
    with Tmpfs(daemon.work_dir):
        pull_and_release(daemon, above)
        assert [one.references for one in daemon.client.images()] == [(above,)]

    assert [one.references for one in daemon.client.images()] == [(below,)]
