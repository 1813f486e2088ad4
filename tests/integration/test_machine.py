"""A machine that fails: a disk that is full or read-only, too few descriptors, workers that are killed."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from guestpull_client.errors import GuestpullError, ResourceExhausted
from support.daemon import Daemon, Tmpfs
from support.faults import Drip, Stall
from support.images import files, image, layer
from support.peers import run
from support.samples import runnable
from support.simulator import RegistrySimulator
from support.waiting import PATIENCE, end_of, until


def is_true(daemon: Daemon) -> None:
    """The store holds what it says, and nothing is half-done."""
    assert daemon.staged() == []
    assert os.listdir(daemon.work_dir / "overlay") == []
    for one in daemon.client.layers():
        assert one.present
    verified = run(
        sys.executable,
        "-m",
        "guestpull_server.cli",
        "verify",
        "--work-dir",
        str(daemon.work_dir),
        check=False,
    )
    assert verified.returncode == 0, verified.stdout


def test_a_full_disk_fails_a_pull_by_name_wherever_it_becomes_full(
    tmp_path: Path, registry: RegistrySimulator
) -> None:
    contents = [layer(*files(f"part{number}", count=40, size=3000)) for number in range(3)]
    reference = registry.push("full:1", image(*contents))
    outcomes: list[str] = []
    for kib in range(64, 1200, 96):
        with (
            Tmpfs(tmp_path / f"disk{kib}", f"{kib}k") as small,
            Tmpfs(tmp_path / f"rest{kib}") as rest,
            Daemon(rest, work_dir=small / "work") as daemon,
        ):
            try:
                daemon.client.pull(reference, str(daemon.bundle("one")))
            except ResourceExhausted as error:
                outcomes.append(error.reason)
                assert not daemon.bundle("one").exists()
                is_true(daemon)
            else:
                outcomes.append("PULLED")
                daemon.client.release_bundle(str(daemon.bundle("one")))
                daemon.client.remove_image(reference)
                assert daemon.client.layers() == ()

    assert set(outcomes) == {"STORAGE_FULL", "PULLED"}
    assert outcomes == sorted(outcomes, reverse=True), "with more room it never went worse"


def test_space_comes_back_by_removing_and_the_daemon_goes_on(
    tmp_path: Path, registry: RegistrySimulator
) -> None:
    big, other = layer(*files("big", count=50, size=9000)), layer(*files("other", count=50, size=9000))
    first, second = registry.push("big:1", image(big)), registry.push("other:1", image(other))
    with (
        Tmpfs(tmp_path / "disk", "1000k") as disk,
        Tmpfs(tmp_path / "rest") as rest,
        Daemon(rest, work_dir=disk / "work") as daemon,
    ):
        daemon.client.pull(first, str(daemon.bundle("one")))
        daemon.client.release_bundle(str(daemon.bundle("one")))
        with pytest.raises(ResourceExhausted):
            daemon.client.pull(second, str(daemon.bundle("two")))

        daemon.client.remove_image(first)
        daemon.client.pull(second, str(daemon.bundle("two")))


def test_an_image_that_frees_nothing_can_be_removed_from_a_full_disk(
    tmp_path: Path, registry: RegistrySimulator
) -> None:
    shared = layer(*files("shared", count=5))
    references = [
        registry.push(f"shared:{number}", image(shared, process={"Cmd": [str(number)]}))
        for number in range(3)
    ]
    with (
        Tmpfs(tmp_path / "disk", "2m") as disk,
        Tmpfs(tmp_path / "rest") as rest,
        Daemon(rest, work_dir=disk / "work") as daemon,
    ):
        for number, reference in enumerate(references):
            daemon.client.pull(reference, str(daemon.bundle(str(number))))
            daemon.client.release_bundle(str(daemon.bundle(str(number))))
        for reference in references[:2]:
            _fill(disk)
            removed = daemon.client.remove_image(reference)
            assert removed.deleted_layers == ()
        assert [one.references for one in daemon.client.images()] == [(references[2],)]


def test_a_daemon_ends_well_on_a_full_disk_and_the_next_knows_what_was_committed(
    tmp_path: Path, registry: RegistrySimulator
) -> None:
    small, large = layer(*files("small", count=5)), layer(*files("large", count=50, size=50_000))
    reference = registry.push("partly:1", image(small, large))
    with Tmpfs(tmp_path / "disk", "1m") as disk, Tmpfs(tmp_path / "rest") as rest:
        with Daemon(rest, work_dir=disk / "work") as daemon:
            with pytest.raises(ResourceExhausted):
                daemon.client.pull(reference, str(daemon.bundle("one")))
            committed = daemon.client.layers()
            _fill(disk)
            assert daemon.stop() == 0
        (disk / "filler").unlink()
        with Daemon(rest, work_dir=disk / "work") as daemon:
            assert daemon.client.layers() == committed


def _fill(disk: Path) -> None:
    """Leave no page of a file system free."""
    with (disk / "filler").open("ab", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


def test_a_read_only_work_directory_is_refused_in_one_line(disk: Path) -> None:
    work_dir = disk / "frozen"
    work_dir.mkdir()
    run("mount", "--bind", str(work_dir), str(work_dir))
    run("mount", "-o", "remount,bind,ro", str(work_dir))
    command = [sys.executable, "-m", "guestpull_server.cli", "serve", "--work-dir", str(work_dir)]

    ended = run(*command, "--listen", f"unix://{disk}/a.sock", check=False)
    run("umount", str(work_dir))

    assert ended.returncode == 1
    assert "ead-only" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_too_few_descriptors_fail_pulls_by_name_and_the_daemon_recovers(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    contents = [layer(*files(f"fd{number}", count=5)) for number in range(6)]
    references = [registry.push(f"fd{number}:1", image(one)) for number, one in enumerate(contents)]
    daemon.client.images()
    in_use = len(os.listdir(f"/proc/{daemon.pid}/fd"))
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (in_use + 4, before[1]))
    failures: list[GuestpullError] = []

    def pull(number: int) -> None:
        try:
            daemon.client.pull(references[number], str(daemon.bundle(str(number))), timeout=30)
        except GuestpullError as error:
            failures.append(error)

    threads = [threading.Thread(target=pull, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        end_of(thread)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)

    assert failures
    assert all("Traceback" not in error.message for error in failures)
    assert "INTERNAL" not in {error.reason for error in failures}
    for one in daemon.client.bundles():
        daemon.client.release_bundle(one.bundle_path)
    daemon.client.pull(references[0], str(daemon.bundle("after")))
    daemon.client.release_bundle(str(daemon.bundle("after")))
    # what could not even be cleaned up for want of descriptors goes with the next start
    daemon.stop()
    daemon.start()
    is_true(daemon)


@pytest.mark.parametrize("victim", ["a worker", "the fork server"])
def test_a_worker_that_is_killed_fails_its_pull_alone(
    disk: Path, registry: RegistrySimulator, victim: str
) -> None:
    with Daemon(disk, configuration={"limits": {"min_bytes_per_second": 0}}) as daemon:
        kill_in_the_middle_of_a_pull(daemon, registry, victim)


def kill_in_the_middle_of_a_pull(daemon: Daemon, registry: RegistrySimulator, victim: str) -> None:
    content = runnable()
    reference = registry.push("killed:1", image(content))
    registry.fault(content, Drip(after=0.5, bytes_per_second=10), times=1)
    failures: list[GuestpullError] = []

    def pull() -> None:
        try:
            daemon.client.pull(reference, str(daemon.bundle("one")))
        except GuestpullError as error:
            failures.append(error)

    puller = threading.Thread(target=pull)
    puller.start()
    registry.await_request(content)
    until("a worker is at work", lambda: len(daemon.workers()) >= 2)
    fork_server, *workers = daemon.workers()
    for pid in workers if victim == "a worker" else [fork_server]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end_of(puller)

    assert [error.reason for error in failures] == ["WORKER_FAILED"]
    assert daemon.staged() == []
    daemon.client.pull(reference, str(daemon.bundle("one")))


def test_kill_9_in_the_middle_of_a_pull_leaves_a_store_that_is_true(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    kept, lost = runnable(), layer(*files("lost", count=100))
    ready = registry.push("ready:1", image(kept))
    stuck = registry.push("stuck:1", image(kept, lost))
    registry.fault(lost, Stall(after=0.5), times=1)
    daemon.client.pull(ready, str(daemon.bundle("ready")))
    client = daemon.client
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "guestpull_client.cli", "--address", client.address),
            *("pull", stuck, "--bundle", str(daemon.bundle("stuck"))),
        ],
        stderr=subprocess.DEVNULL,
    ) as puller:
        registry.await_request(lost)
        daemon.kill()
        puller.wait(PATIENCE)
    assert daemon.staged() != []

    daemon.start()

    assert daemon.staged() == []
    assert not daemon.bundle("stuck").exists()
    (bundle,) = daemon.client.bundles()
    assert bundle.mounted
    assert (daemon.bundle("ready") / "rootfs/etc/passwd").exists()
    assert [one.compressed_digest for one in daemon.client.layers()] == [kept.digest]
    daemon.client.release_bundle(str(daemon.bundle("ready")))
    is_true(daemon)
    pulled = daemon.client.pull(stuck, str(daemon.bundle("stuck")))
    assert [one.reused for one in pulled.layers] == [True, False]
