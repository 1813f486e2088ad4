"""A registry's slowness is the loss of its own pulls, and of nobody else's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from guestpull_client import LayerProgress, PulledImage, PullPolicy
from guestpull_client.errors import NotFound, ResourceExhausted
from guestpull_protos import image_service_pb2 as pb
from guestpull_protos import image_service_pb2_grpc as pb_grpc
from support.daemon import Daemon
from support.faults import Pause, Stall
from support.images import file, image, layer
from support.samples import runnable
from support.simulator import RegistrySimulator
from support.waiting import until

HOURS = 10_000.0  # seconds; longer than any test
PATIENT = {"read_timeout": HOURS}


@pytest.fixture
def slow() -> Iterator[RegistrySimulator]:
    """Another registry, at a port of its own."""
    with RegistrySimulator() as simulator:
        yield simulator


@contextmanager
def pulls_under_way(daemon: Daemon, references: list[str]) -> Iterator[None]:
    """Pulls that are under way while the block runs, and are cancelled at its end."""
    with grpc.insecure_channel(f"unix://{daemon.socket}") as channel:
        stub = pb_grpc.ImageServiceStub(channel)
        requests = [
            pb.PullImageRequest(image_url=reference, bundle_path=str(daemon.bundle(f"slow-{number}")))
            for number, reference in enumerate(references)
        ]
        calls = [stub.PullImage.future(request) for request in requests]
        try:
            yield
        finally:
            for call in calls:
                call.cancel()  # type: ignore[no-untyped-call] # grpc-stubs


def test_a_layer_does_not_wait_for_those_of_a_slow_registry(
    disk: Path, registry: RegistrySimulator, slow: RegistrySimulator
) -> None:
    layers = [layer(file(f"{number}", random.Random(number).randbytes(1000))) for number in range(18)]
    stuck = [slow.push(f"stuck{first}:1", image(*layers[first : first + 3])) for first in range(0, 18, 3)]
    for one in layers:
        slow.fault(one, Stall(after=0.5))
    quick = registry.push("quick:1", image(runnable()))
    with Daemon(disk, configuration={"limits": PATIENT}) as daemon, pulls_under_way(daemon, stuck):
        until("8 layers are being sent", lambda: sum(len(slow.requests_for(one)) for one in layers) >= 8)

        daemon.client.pull(quick, str(daemon.bundle("quick")))

        assert [one.bundle_path for one in daemon.client.bundles()] == [str(daemon.bundle("quick"))]


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("tag", PullPolicy.NEVER),
        ("tag", PullPolicy.IF_NOT_PRESENT),
        ("digest", PullPolicy.UNSPECIFIED),
    ],
)
def test_an_image_that_is_present_does_not_wait_for_a_slow_registry(
    disk: Path, slow: RegistrySimulator, name: str, policy: PullPolicy
) -> None:
    pushed = image(runnable())
    tag = slow.push("present:1", pushed)
    names = {"tag": tag, "digest": f"{tag.rpartition(':')[0]}@{pushed.digest}"}
    with Daemon(disk, configuration={"limits": PATIENT | {"max_concurrent_pulls": 2}}) as daemon:
        daemon.client.pull(tag, str(daemon.bundle("first")))
        stuck = slow.push("stuck:2", image(layer(file("stuck"))))
        slow.fault("manifests/2", Pause(HOURS))
        with pulls_under_way(daemon, [stuck] * 3):
            slow.await_request("manifests/2", 2)

            pulled = daemon.client.pull(names[name], str(daemon.bundle("warm")), policy=policy)

            assert pulled.image_id == pushed.image_id
            assert [one.status for one in slow.requests_for("manifests/2")] == [0, 0]


def test_a_pull_does_not_wait_for_those_that_ask_another_registry(
    disk: Path, registry: RegistrySimulator, slow: RegistrySimulator
) -> None:
    quick = registry.push("quick:1", image(runnable()))
    stuck = slow.push("stuck:2", image(layer(file("stuck"))))
    slow.fault("manifests/2", Pause(HOURS))
    with (
        Daemon(disk, configuration={"limits": PATIENT | {"max_concurrent_pulls": 2}}) as daemon,
        pulls_under_way(daemon, [stuck] * 3),
    ):
        slow.await_request("manifests/2", 2)

        daemon.client.pull(quick, str(daemon.bundle("quick")))

        assert [one.status for one in slow.requests_for("manifests/2")] == [0, 0]


def test_a_registry_that_does_not_answer_leaves_room_in_the_queue(
    disk: Path, registry: RegistrySimulator, slow: RegistrySimulator
) -> None:
    quick = registry.push("quick:1", image(runnable()))
    stuck = slow.push("stuck:2", image(layer(file("stuck"))))
    slow.fault("manifests/2", Pause(HOURS))
    limits = PATIENT | {"max_queued_pulls": 3, "max_queued_pulls_per_registry": 2}
    with Daemon(disk, configuration={"limits": limits}) as daemon, pulls_under_way(daemon, [stuck] * 2):
        slow.await_request("manifests/2", 2)

        with pytest.raises(ResourceExhausted) as refused:
            daemon.client.pull(stuck, str(daemon.bundle("third")))
        daemon.client.pull(quick, str(daemon.bundle("quick")))

        assert refused.value.reason == "TOO_MANY_PULLS"


def test_a_layer_comes_from_whichever_registry_sends_it_first(
    disk: Path, registry: RegistrySimulator, slow: RegistrySimulator
) -> None:
    pushed = image(layer(file("shared", random.Random(1).randbytes(10_000))))
    (shared,) = pushed.layers
    at_slow, at_quick = slow.push("shared:1", pushed), registry.push("shared:1", pushed)
    slow.fault(shared, Stall(after=0.5))
    with Daemon(disk, configuration={"limits": PATIENT}) as daemon:
        waiting = daemon.client.pull_with_progress(at_slow, str(daemon.bundle("slow")))
        assert any(isinstance(event, LayerProgress) for event in waiting)

        quick = daemon.client.pull(at_quick, str(daemon.bundle("quick")))

        (served,) = [event for event in waiting if isinstance(event, PulledImage)]
        assert quick.downloaded_bytes == shared.size
        assert served.downloaded_bytes == 0
        assert [one.reused for one in served.layers] == [True]
        assert Path(served.rootfs_path, "shared").stat().st_size == 10_000
        assert len(slow.requests_for(shared)) == 1
        assert daemon.staged() == []


def test_a_layer_that_one_registry_does_not_have_comes_from_the_other(
    disk: Path, registry: RegistrySimulator, slow: RegistrySimulator
) -> None:
    pushed = image(layer(file("shared", random.Random(1).randbytes(10_000))))
    (shared,) = pushed.layers
    at_slow, at_broken = slow.push("shared:1", pushed), registry.push("shared:1", pushed)
    registry.forget(shared)
    slow.fault(shared, Pause(0.2))
    with Daemon(disk) as daemon:
        waiting = daemon.client.pull_with_progress(at_slow, str(daemon.bundle("slow")))
        next(waiting)

        with pytest.raises(NotFound):
            daemon.client.pull(at_broken, str(daemon.bundle("broken")))

        assert [event for event in waiting if isinstance(event, PulledImage)]
