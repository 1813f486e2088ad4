"""Many callers, and callers that do not read: none of them takes from the others what these need."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from guestpull_client import Client, PullPolicy
from guestpull_client.errors import GuestpullError, ResourceExhausted
from guestpull_protos import image_service_pb2 as pb
from support.daemon import Daemon
from support.faults import Stall
from support.http2 import call_and_read_nothing, connected
from support.images import files, image, layer
from support.samples import runnable
from support.simulator import RegistrySimulator
from support.waiting import PATIENCE, end_of, until

_STREAMS = 300


def is_served(daemon: Daemon, reference: str, name: str) -> None:
    """A caller of its own gets what it asks for."""
    with Client(f"unix://{daemon.socket}", timeout=PATIENCE) as client:
        assert client.is_healthy()
        client.images()
        client.pull(reference, str(daemon.bundle(name)))


def threads_of(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/task").iterdir()))


def test_streams_of_one_caller_that_only_wait_keep_nobody_from_being_served(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    reference = registry.push("one:1", image(runnable()))
    is_served(daemon, reference, "before")
    threads = threads_of(daemon)
    done = threading.Event()

    def asks_once_and_waits() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        done.wait(PATIENCE)

    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        streams = [
            *(reflection.ServerReflectionInfo(asks_once_and_waits()) for _ in range(_STREAMS)),
            *(health.Watch(health_pb2.HealthCheckRequest()) for _ in range(_STREAMS)),
        ]
        for stream in streams:
            next(stream)

        is_served(daemon, reference, "meanwhile")
        assert threads_of(daemon) <= threads + 4
        done.set()


def test_pulls_that_wait_keep_nobody_from_lists_and_health_and_one_too_many_is_refused(
    disk: Path, registry: RegistrySimulator
) -> None:
    stalled = layer(*files("stalled", count=3))
    reference = registry.push("stalled:1", image(stalled))
    registry.fault(stalled, Stall(after=0.5))
    most = 40
    limits = {"max_concurrent_pulls": 4, "max_queued_pulls": most}
    with Daemon(disk, configuration={"limits": limits}) as daemon, ExitStack() as stack:
        client = stack.enter_context(Client(f"unix://{daemon.socket}"))
        pulls = [
            threading.Thread(target=fails_to_pull, args=(client, reference, str(daemon.bundle(str(number)))))
            for number in range(most)
        ]
        for pull in pulls:
            pull.start()
        registry.await_request(stalled)
        refused = str(daemon.bundle("refused"))

        def is_refused() -> bool:
            try:
                daemon.client.pull("127.0.0.1:9/none:1", refused, policy=PullPolicy.NEVER, timeout=1)
            except ResourceExhausted as error:
                return error.reason == "TOO_MANY_PULLS"
            except GuestpullError:
                return False
            return False

        until("all of the queue is taken", is_refused)
        assert daemon.client.is_healthy()
        assert daemon.client.bundles() == ()
        client.close()
        for pull in pulls:
            end_of(pull)


def fails_to_pull(client: Client, reference: str, bundle: str) -> None:
    with pytest.raises((GuestpullError, ValueError)):  # gRPC's, of a channel that is closed
        client.pull(reference, bundle)


def test_a_caller_that_reads_no_progress_delays_neither_its_pull_nor_others_nor_the_end(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    reference = registry.push("unread:1", image(*(layer(*files(f"l{n}", count=3)) for n in range(5))))
    other = registry.push("other:1", image(runnable()))
    with connected(daemon.socket) as caller:
        request = pb.PullImageRequest(image_url=reference, bundle_path=str(daemon.bundle("unread")))
        call_and_read_nothing(caller, "/guestpull.v1.ImageService/PullImageWithProgress", request)

        until("the pull is done", daemon.client.bundles)
        is_served(daemon, other, "other")
        for bundle in daemon.client.bundles():
            daemon.client.release_bundle(bundle.bundle_path)
        assert daemon.stop() == 0


def test_a_watcher_of_health_that_does_not_read_keeps_no_other_waiting(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    request = health_pb2.HealthCheckRequest()
    with connected(daemon.socket) as caller, grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        call_and_read_nothing(caller, "/grpc.health.v1.Health/Watch", request)
        watching = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=PATIENCE)

        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        stopping = threading.Thread(target=daemon.stop)
        stopping.start()
        assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING
        end_of(stopping)


def test_more_connections_than_the_limit_are_refused_and_the_daemon_serves_on(
    disk: Path, registry: RegistrySimulator
) -> None:
    reference = registry.push("one:1", image(runnable()))
    with Daemon(disk, configuration={"limits": {"max_connections": 8}}) as daemon:
        with ExitStack() as stack:
            callers = [stack.enter_context(connected(daemon.socket)) for _ in range(20)]
            closed = [caller for caller in callers if not caller.recv(9)]
            assert len(callers) - len(closed) <= 8
        until("there is room again", lambda: answers(daemon))
        is_served(daemon, reference, "after")


def answers(daemon: Daemon) -> bool:
    with Client(f"unix://{daemon.socket}", timeout=PATIENCE) as client:
        try:
            return client.is_healthy()
        except GuestpullError:
            return False
