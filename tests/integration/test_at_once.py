"""Many callers at once: one download for each layer, and nobody's failure is another's."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from guestpull_client import LayerProgress, PulledImage
from guestpull_client.errors import (
    AlreadyExists,
    GuestpullError,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
)
from support.daemon import Daemon
from support.faults import Corrupt, Drip, Pause, Stall
from support.images import files, image, layer
from support.samples import runnable
from support.simulator import Basic, RegistrySimulator
from support.waiting import end_of


def in_threads(*calls: Callable[[], object]) -> list[object]:
    """Make calls at once; returns their results, or the errors that they raised."""

    def outcome(call: Callable[[], object]) -> object:
        try:
            return call()
        except GuestpullError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def test_callers_of_the_same_layers_share_their_downloads(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    shared = layer(*files("shared", count=200, size=5000))
    tops = [layer(*files(f"top{number}", count=5)) for number in range(8)]
    references = [registry.push(f"app{number}:1", image(shared, top)) for number, top in enumerate(tops)]
    registry.fault(shared, Pause(seconds=0.3), times=1)

    pulls = in_threads(
        *(
            lambda reference=reference, number=number: daemon.client.pull(
                reference, str(daemon.bundle(str(number)))
            )
            for number, reference in enumerate(references)
        )
    )

    assert not [one for one in pulls if isinstance(one, Exception)]
    assert len(registry.requests_for(shared)) == 1
    assert [len(registry.requests_for(top)) for top in tops] == [1] * 8
    for number in range(8):
        assert len(os.listdir(daemon.bundle(str(number)) / "rootfs/shared")) == 200


def test_a_caller_that_leaves_does_not_hurt_the_one_that_stays(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    content = layer(*files("srv", count=50, size=2000))
    reference = registry.push("shared:1", image(content))
    has_left = threading.Event()
    registry.fault(content, Drip(after=0.5, bytes_per_second=100, until=has_left), times=1)
    leaver = daemon.client.pull_with_progress(reference, str(daemon.bundle("leaver")))
    next(leaver)
    registry.await_request(content)
    stayer = daemon.client.pull_with_progress(reference, str(daemon.bundle("stayer")))
    assert any(isinstance(event, LayerProgress) for event in stayer)  # both are told of the one download

    leaver.close()
    daemon.await_log("reason=CANCELLED")
    has_left.set()
    assert [event for event in stayer if isinstance(event, PulledImage)]

    assert len(os.listdir(daemon.bundle("stayer") / "rootfs/srv")) == 50
    assert len(registry.requests_for(content)) == 1
    assert [one.bundle_path for one in daemon.client.bundles()] == [str(daemon.bundle("stayer"))]


def test_a_caller_without_the_right_password_fails_alone(disk: Path) -> None:
    with RegistrySimulator(authentication=Basic("ann", "right")) as registry, Daemon(disk) as daemon:
        content = runnable()
        reference = registry.push("private:1", image(content))

        def pull(name: str, auth: str) -> Callable[[], object]:
            return lambda: daemon.client.pull(reference, str(daemon.bundle(name)), auth=auth)

        outcomes = in_threads(
            *(pull(f"{number}", "ann:right" if number % 2 else "ann:wrong") for number in range(8))
        )

        assert [isinstance(one, Unauthenticated) for one in outcomes] == [True, False] * 4
        assert len(daemon.client.bundles()) == 4


def test_two_pulls_into_one_bundle_make_one_bundle(daemon: Daemon, registry: RegistrySimulator) -> None:
    content = runnable()
    reference = registry.push("race:1", image(content))
    registry.fault(content, Pause(seconds=0.3), times=1)

    outcomes = in_threads(*[lambda: daemon.client.pull(reference, str(daemon.bundle("one")))] * 4)

    assert sum(isinstance(one, AlreadyExists) for one in outcomes) == 3
    assert (daemon.bundle("one") / "rootfs/etc/passwd").exists()


def test_a_queue_that_is_full_refuses_more(disk: Path, registry: RegistrySimulator) -> None:
    content = runnable()
    reference = registry.push("queue:1", image(content))
    registry.fault(content, Stall(after=0.1))
    limits = {"max_concurrent_pulls": 1, "max_queued_pulls": 2}
    with Daemon(disk, configuration={"limits": limits}) as daemon:
        under_way = daemon.client.pull_with_progress(reference, str(daemon.bundle("first")))
        next(under_way)

        def pull(bundle: str, timeout: float) -> object:
            return daemon.client.pull(reference, str(daemon.bundle(bundle)), timeout=timeout)

        def stand_in_the_queue() -> None:
            while isinstance(in_threads(lambda: pull("second", 30))[0], ResourceExhausted):
                pass  # the third one stood there, for a moment

        second = threading.Thread(target=stand_in_the_queue)
        second.start()
        for _ in range(100):  # until the second one stands in the queue
            outcome = in_threads(lambda: pull("third", 0.3))[0]
            if isinstance(outcome, ResourceExhausted):
                break
        under_way.close()
        daemon.kill()
        end_of(second)

        assert isinstance(outcome, ResourceExhausted)
        assert outcome.reason == "TOO_MANY_PULLS"


def test_a_corrupt_layer_fails_for_all_who_want_it(daemon: Daemon, registry: RegistrySimulator) -> None:
    content = runnable()
    reference = registry.push("bad:1", image(content))
    registry.fault(content, Corrupt(at=0.9))

    outcomes = in_threads(
        *(lambda n=n: daemon.client.pull(reference, str(daemon.bundle(f"{n}"))) for n in range(4))
    )

    assert {getattr(one, "reason", "") for one in outcomes} == {"DIGEST_MISMATCH"}
    assert daemon.staged() == []
    assert daemon.client.layers() == ()


@pytest.mark.parametrize("seed", range(3))
def test_pulls_removals_and_releases_at_once_end_as_if_one_after_the_other(
    daemon: Daemon, registry: RegistrySimulator, seed: int
) -> None:
    base = layer(*files("base", count=30))
    contents = [layer(*files(f"own{number}", count=10)) for number in range(4)]
    references = [registry.push(f"mix{number}:1", image(base, own)) for number, own in enumerate(contents)]

    def caller(number: int) -> None:
        choices = random.Random(seed * 100 + number)
        bundle = str(daemon.bundle(f"{number}"))
        for _ in range(8):
            which = choices.randrange(4)
            daemon.client.pull(references[which], bundle)
            assert len(os.listdir(f"{bundle}/rootfs/base")) == 30
            assert len(os.listdir(f"{bundle}/rootfs/own{which}")) == 10
            if choices.random() < 0.5:
                # another caller may have removed it already
                with contextlib.suppress(NotFound):
                    daemon.client.remove_image(references[which], force=True)
            daemon.client.release_bundle(bundle)

    failures = [one for one in in_threads(*(lambda n=n: caller(n) for n in range(6))) if one is not None]
    assert failures == []
    for one in daemon.client.images():
        daemon.client.remove_image(one.id)
    assert daemon.client.bundles() == ()
    assert os.listdir(daemon.work_dir / "overlay") == []
    assert daemon.staged() == []
    assert os.listdir(daemon.work_dir / "layers") == [], daemon.client.layers()
