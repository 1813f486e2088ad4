"""The daemon as a program: where it listens, who may call, how it starts and how it ends."""

from __future__ import annotations

import grp
import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from guestpull_client import Client
from guestpull_client.errors import (
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    GuestpullError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from support.daemon import Daemon
from support.faults import Corrupt, Stall, Status
from support.images import OCI_MANIFEST, RawTar, file, files, image, layer, symlink
from support.peers import GrpcError, grpcurl, grpcurl_list, run
from support.samples import runnable
from support.simulator import Basic, RegistrySimulator
from support.waiting import PATIENCE, end_of, until

SERVICE = "guestpull.v1.ImageService"


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    """Run `guestpulld serve` in the expectation that it ends by itself."""
    return run(sys.executable, "-m", "guestpull_server.cli", "serve", *options, check=False)


class WithoutStreams(Daemon):
    """A daemon that is started with its standard streams closed."""

    def launch(self) -> None:
        command = [sys.executable, "-m", "guestpull_server.cli", "serve", "--work-dir", str(self.work_dir)]
        words = shlex.join([*command, "--listen", f"unix://{self.socket}"])
        self._process = subprocess.Popen(["sh", "-c", f"exec {words} <&- >&- 2>&-"])


def test_no_file_of_the_store_takes_the_place_of_a_closed_standard_stream(disk: Path) -> None:
    with WithoutStreams(disk) as daemon:
        streams = {os.readlink(f"/proc/{daemon.pid}/fd/{number}") for number in range(3)}

    assert streams == {"/dev/null"}


# -- listening -------------------------------------------------------------------------------------------------


def test_reflection_and_health_are_always_on(daemon: Daemon) -> None:
    services = grpcurl_list(daemon.socket, "-unix")

    assert SERVICE in services
    assert "grpc.health.v1.Health" in services
    for name in ("", SERVICE):
        assert grpcurl(daemon.socket, "grpc.health.v1.Health/Check", {"service": name}) == [
            {"status": "SERVING"}
        ]


def test_the_socket_is_the_owners_alone(daemon: Daemon) -> None:
    assert stat.S_IMODE(os.stat(daemon.socket).st_mode) == 0o600


def test_a_stale_socket_is_replaced(disk: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(disk / "work.sock"))

    with Daemon(disk) as daemon:
        assert daemon.client.is_healthy()


def test_a_socket_at_which_another_daemon_listens_is_refused_in_one_line(daemon: Daemon, disk: Path) -> None:
    ended = serve("--work-dir", str(disk / "other"), "--listen", f"unix://{daemon.socket}")

    assert ended.returncode == 1
    assert "listens there" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert daemon.client.is_healthy()


def test_a_work_directory_has_one_daemon(daemon: Daemon, disk: Path) -> None:
    ended = serve("--work-dir", str(daemon.work_dir), "--listen", f"unix://{disk}/second.sock")

    assert ended.returncode == 1
    assert f"in use by process {daemon.pid}" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_loopback_port_without_tls_is_refused_and_says_what_to_do(disk: Path) -> None:
    ended = serve("--work-dir", str(disk / "work"), "--listen", "127.0.0.1:0")

    assert ended.returncode == 1
    assert "--insecure-tcp" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_loopback_port_that_is_said_to_be_insecure_is_served_and_warned_of(disk: Path) -> None:
    with Daemon(disk, options=("--insecure-tcp", "--listen", "127.0.0.1:0")) as daemon:
        address = daemon.await_log(r"addresses=.*(127\.0\.0\.1:\d+)")[1]

        assert SERVICE in grpcurl_list(address)
        with Client(address) as client:
            assert client.images() == ()
        warnings = [line for line in daemon.log.read_text().splitlines() if " warning " in line]
        assert any("--insecure-tcp" in line and address in line and "root" in line for line in warnings)


@pytest.mark.parametrize("options", [(), ("--insecure-tcp",)])
def test_other_addresses_need_tls(disk: Path, options: tuple[str, ...]) -> None:
    ended = serve("--work-dir", str(disk / "work"), "--listen", "0.0.0.0:0", *options)

    assert ended.returncode == 1
    assert "--tls-certificate" in ended.stderr
    assert ended.stderr.count("\n") == 1


_CALLER = """
import os, sys
from guestpull_client import Client, GuestpullError

def call(address):
    try:
        with Client(address) as client:
            return client.images()
    except GuestpullError as error:
        return f"{error.code} {error.reason} {error}"

call("unix:///none")  # loads all code: it may lie where the other user cannot read
os.setgroups([int(group) for group in sys.argv[3:]])
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[2]))
print(call(sys.argv[1]))
"""


def answer_to(uid: int, groups: tuple[int, ...], address: str) -> str:
    """What another user gets who calls."""
    return run(sys.executable, "-c", _CALLER, address, str(uid), *map(str, groups)).stdout


def test_without_a_group_the_socket_is_the_owners_alone_and_others_are_told_so(open_disk: Path) -> None:
    with Daemon(open_disk) as daemon:
        status = os.stat(daemon.socket)
        answer = answer_to(4242, (), daemon.client.address)

    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, 0)
    assert answer.startswith("PERMISSION_DENIED CONNECTION_NOT_PERMITTED ")
    assert "only user root may" in answer
    assert "socket_group" in answer


def test_with_a_group_its_members_may_call_and_others_are_told_its_name(open_disk: Path) -> None:
    group = grp.getgrnam("daemon")
    with Daemon(open_disk, configuration={"socket_group": group.gr_name}) as daemon:
        status = os.stat(daemon.socket)
        members = answer_to(4242, (group.gr_gid,), daemon.client.address)
        others = answer_to(4243, (), daemon.client.address)

    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, group.gr_gid)
    assert members == "()\n"
    assert others.startswith("PERMISSION_DENIED CONNECTION_NOT_PERMITTED ")
    assert "members of group daemon may" in others


def test_a_socket_in_a_directory_that_is_closed_to_the_caller_is_told_apart(open_disk: Path) -> None:
    closed = open_disk / "closed"
    closed.mkdir(mode=0o700)
    with Daemon(closed) as daemon:
        answer = answer_to(4242, (), daemon.client.address)

    assert answer.startswith("PERMISSION_DENIED CONNECTION_NOT_PERMITTED ")
    assert "you may not search its directory" in answer


def test_a_group_that_the_machine_does_not_have_is_an_error_of_one_line(disk: Path) -> None:
    configuration = disk / "config.json"
    configuration.write_text('{"socket_group": "no-such-group"}')

    ended = serve(
        *(
            "--work-dir",
            str(disk / "work"),
            "--listen",
            f"unix://{disk}/a.sock",
            "--config",
            str(configuration),
        )
    )

    assert ended.returncode == 1
    assert "'no-such-group'" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "a.sock" not in os.listdir(disk)


# -- ending ----------------------------------------------------------------------------------------------------


def test_sigterm_ends_it_and_it_says_so(disk: Path) -> None:
    with Daemon(disk) as daemon:
        assert daemon.stop() == 0

        log = daemon.log.read_text()
        assert "ending pulls_under_way=0" in log
        assert "ended pulls_finished=0 pulls_cancelled=0" in log
        assert not os.path.exists(daemon.socket)


def test_sigterm_lets_a_pull_finish_within_the_grace_time(disk: Path, registry: RegistrySimulator) -> None:
    content = runnable()
    reference = registry.push("slow:1", image(content))
    registry.fault(content, Stall(after=0.5), times=1)
    configuration = {"limits": {"read_timeout": 1.0}}
    with Daemon(disk, configuration=configuration, options=("--grace", "20")) as daemon:
        pulled: list[str] = []
        client = daemon.client
        puller = threading.Thread(
            target=lambda: pulled.append(client.pull(reference, str(daemon.bundle("one"))).rootfs_path)
        )
        puller.start()
        registry.await_request(content)
        os.kill(daemon.pid, signal.SIGTERM)
        end_of(puller)
        assert daemon.stop() == 0

        assert pulled == [str(daemon.bundle("one") / "rootfs")]
        assert "pulls_finished=1 pulls_cancelled=0" in daemon.log.read_text()
        daemon.start()


def test_sigterm_cancels_what_does_not_finish_in_time(disk: Path, registry: RegistrySimulator) -> None:
    content = runnable()
    reference = registry.push("stuck:1", image(content))
    registry.fault(content, Stall(after=0.5))
    with Daemon(disk, options=("--grace", "0.3")) as daemon:
        failures: list[GuestpullError] = []
        client = daemon.client

        def pull() -> None:
            try:
                client.pull(reference, str(daemon.bundle("one")))
            except GuestpullError as error:
                failures.append(error)

        puller = threading.Thread(target=pull)
        puller.start()
        registry.await_request(content)
        assert daemon.stop() == 0
        end_of(puller)

        assert len(failures) == 1
        assert "pulls_finished=0 pulls_cancelled=1" in daemon.log.read_text()
        assert daemon.staged() == []
        assert not daemon.bundle("one").exists()


class Patched(Daemon):
    """A daemon in which a method of the puller never returns."""

    def __init__(self, disk: Path, method: str) -> None:
        super().__init__(disk, options=("--grace", "0.3"))
        self._method = method

    def launch(self) -> None:
        program = (
            "import time\n"
            "from guestpull_server.cli import main\n"
            "from guestpull_server.puller import Puller\n"
            f"Puller.{self._method} = lambda *_, **__: (print('stuck', flush=True), time.sleep(3600))\n"
            "main()\n"
        )
        command = [sys.executable, "-c", program, "serve", "--work-dir", str(self.work_dir)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--listen", f"unix://{self.socket}", *self._options], stdout=log, stderr=log
            )


def test_a_pull_that_observes_nothing_is_named_and_the_daemon_ends_all_the_same(disk: Path) -> None:
    with Patched(disk, "pull") as daemon:
        client = daemon.client
        pulling = threading.Thread(target=lambda: fails(client, daemon.bundle("one")))
        pulling.start()
        daemon.await_log("stuck")

        assert daemon.stop() == 1
        end_of(pulling)

        log = daemon.log.read_text()
        assert "does not end" in log
        assert "rpc=PullImage image=stuck.example/img:1" in log


def fails(client: Client, bundle: Path) -> None:
    with pytest.raises(GuestpullError):
        client.pull("stuck.example/img:1", str(bundle))


def test_a_daemon_that_cannot_close_its_store_ends_and_says_where_it_was(disk: Path) -> None:
    with Patched(disk, "close") as daemon:
        assert daemon.stop() == 1

        assert "Timeout" in daemon.log.read_text()


def test_sighup_is_ignored(daemon: Daemon) -> None:
    os.kill(daemon.pid, signal.SIGHUP)

    assert daemon.client.bundles() == ()
    assert daemon.stop() == 0
    assert not os.path.exists(daemon.socket)


def test_streams_that_wait_for_their_client_do_not_delay_the_end(disk: Path) -> None:
    """With a grace time of an hour."""
    with (
        Daemon(disk, options=("--grace", "3600")) as daemon,
        grpc.insecure_channel(f"unix:{daemon.socket}") as channel,
    ):
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watching)
        questions: SimpleQueue[reflection_pb2.ServerReflectionRequest | None] = SimpleQueue()
        questions.put(reflection_pb2.ServerReflectionRequest(list_services=""))
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = reflection.ServerReflectionInfo(iter(questions.get, None))
        next(answers)

        assert daemon.stop() == 0
        questions.put(None)


# -- starting --------------------------------------------------------------------------------------------------


def test_a_service_manager_is_told_of_the_start_and_the_end(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"@guestpull-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE)
        manager.bind(f"\0{name[1:]}")
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        with Daemon(disk) as daemon:
            assert manager.recv(100) == b"READY=1"
            assert os.path.exists(daemon.socket)
            daemon.stop()
            assert manager.recv(100) == b"STOPPING=1"


def test_without_the_capability_to_mount_it_says_so_once_and_does_not_serve(disk: Path) -> None:
    ended = without_cap_sys_admin(
        "serve", "--work-dir", str(disk / "work"), "--listen", f"unix://{disk}/a.sock"
    )

    assert ended.returncode == 1
    assert "CAP_SYS_ADMIN" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert os.listdir(disk) == []


def test_without_the_capability_to_mount_a_store_can_be_baked_verified_and_collected(
    disk: Path, registry: RegistrySimulator
) -> None:
    reference = registry.push("baked:1", image(runnable()))

    for command in (("bake", reference), ("verify", "--deep"), ("gc",)):
        ended = without_cap_sys_admin(*command, "--work-dir", str(disk / "work"))
        assert (ended.returncode, ended.stderr) == (0, "")


def without_cap_sys_admin(*command: str) -> subprocess.CompletedProcess[str]:
    without = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    return run(*without, sys.executable, "-m", "guestpull_server.cli", *command, check=False)


# -- errors ----------------------------------------------------------------------------------------------------


def test_every_error_has_its_code_its_reason_and_says_what_to_do(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    corrupt = layer(*files("a", count=3))
    unreadable = layer(RawTar(b"\xff" * 1024))
    artifact = image(config_media_type="application/vnd.example.chart+json")
    registry.push("good:1", image(runnable()))
    registry.push("corrupt:1", image(corrupt))
    registry.push("unreadable:1", image(unreadable))
    registry.push("artifact:1", artifact)
    registry.push("windows:1", image(config={"os": "windows"}))
    registry.push("forbidden:1", image())
    lost, resized = layer(file("lost", b"x")), layer(file("resized", b"x"))
    registry.push("lost:1", image(lost))
    registry.forget(lost)
    registry.push("resized:1", image(resized, manifest={"layers": [resized.descriptor | {"size": 7}]}))
    registry.put_manifest("malformed:1", OCI_MANIFEST, b'{"schemaVersion": 2, "layers": 7}')
    registry.push("traitor:1", image(layer(symlink("evil", "/"), file("evil/../../x", b""), file(".", b""))))
    registry.fault(corrupt, Corrupt(at=0.5))
    registry.fault("forbidden/manifests/1", Status(403))
    host = registry.host
    taken = daemon.bundle("taken")
    daemon.client.pull(f"{host}/good:1", str(taken))
    file_in_the_way = daemon.disk / "file"
    file_in_the_way.write_text("")

    expected: list[tuple[str, str, type[GuestpullError], str]] = [
        ("Not A Reference", "b", InvalidArgument, "INVALID_REFERENCE"),
        (f"{host}/good@sha256:12", "b", InvalidArgument, "INVALID_REFERENCE"),
        (f"{host}/none:1", "b", NotFound, "IMAGE_NOT_FOUND"),
        (f"{host}/good:2", "b", NotFound, "IMAGE_NOT_FOUND"),
        (f"{host}/good:1", "taken", AlreadyExists, "BUNDLE_EXISTS"),
        (f"{host}/good:1", "../file/b", InvalidArgument, "INVALID_BUNDLE_PATH"),
        (f"{host}/corrupt:1", "b", DataLoss, "DIGEST_MISMATCH"),
        (f"{host}/unreadable:1", "b", DataLoss, "CORRUPT_LAYER"),
        (f"{host}/traitor:1", "b", DataLoss, "CORRUPT_LAYER"),
        (f"{host}/lost:1", "b", NotFound, "BLOB_NOT_FOUND"),
        (f"{host}/resized:1", "b", DataLoss, "SIZE_MISMATCH"),
        (f"{host}/malformed:1", "b", DataLoss, "INVALID_MANIFEST"),
        (f"{host}/forbidden:1", "b", PermissionDenied, "ACCESS_DENIED"),
        (f"{host}/artifact:1", "b", FailedPrecondition, "UNSUPPORTED_IMAGE"),
        (f"{host}/windows:1", "b", FailedPrecondition, "UNSUPPORTED_IMAGE"),
    ]
    for reference, bundle, error_class, reason in expected:
        path = str(daemon.disk / "file" / "b") if bundle.startswith("..") else str(daemon.bundle(bundle))
        with pytest.raises(error_class) as caught:
            daemon.client.pull(reference, path)
        assert caught.value.reason == reason, caught.value.message
        assert re.search(r"\. .+\. ?.*\[request [0-9a-f]{8}\]$", caught.value.message), caught.value.message
        assert "Traceback" not in caught.value.message
    assert os.listdir(daemon.bundle("taken").parent) == ["taken"]
    assert daemon.staged() == []


def test_requests_that_cannot_be_understood_or_fulfilled_say_why(daemon: Daemon) -> None:
    client, bundle = daemon.client, str(daemon.bundle("b"))
    expected: list[tuple[Callable[[], object], type[GuestpullError], str]] = [
        (lambda: client.pull("img", bundle, platform="linux"), InvalidArgument, "INVALID_PLATFORM"),
        (lambda: client.pull("img", "", timeout=5), InvalidArgument, "INVALID_BUNDLE_PATH"),
        (lambda: client.pull("", bundle), InvalidArgument, "INVALID_REFERENCE"),
        (lambda: client.images("Not A Reference"), InvalidArgument, "INVALID_REFERENCE"),
        (lambda: client.layers("absent:1"), NotFound, "IMAGE_NOT_PRESENT"),
        (lambda: client.remove_image(""), InvalidArgument, "INVALID_REQUEST"),
        (lambda: client.remove_image("sha256:" + "0" * 64), NotFound, "IMAGE_NOT_PRESENT"),
        (lambda: client.release_bundle(bundle), NotFound, "BUNDLE_NOT_FOUND"),
    ]
    for call, error_class, reason in expected:
        with pytest.raises(error_class) as caught:
            call()
        assert caught.value.reason == reason, caught.value.message
    assert not daemon.bundle("b").exists()


def test_a_registry_that_wants_us_to_wait_for_too_long_is_unavailable(
    disk: Path, registry: RegistrySimulator
) -> None:
    reference = registry.push("busy:1", image())
    registry.fault("manifests/1", Status(429, retry_after="0"))
    with Daemon(disk, configuration={"limits": {"max_attempts": 2}}) as daemon:
        with pytest.raises(Unavailable) as caught:
            daemon.client.pull(reference, str(daemon.bundle("one")))

        assert caught.value.reason == "RATE_LIMITED"


def test_a_registry_that_is_down_is_unavailable(disk: Path) -> None:
    with Daemon(disk, configuration={"limits": {"max_attempts": 2}}) as daemon:
        with pytest.raises(Unavailable) as caught:
            daemon.client.pull("127.0.0.1:9/img", str(daemon.bundle("one")))

        assert caught.value.reason == "REGISTRY_UNAVAILABLE"
        assert not daemon.bundle("one").exists()


def test_credentials_that_are_missing_or_wrong_are_told_apart_and_never_repeated(
    disk: Path,
) -> None:
    with (
        RegistrySimulator(authentication=Basic("ann", "open sesame")) as registry,
        Daemon(disk) as daemon,
    ):
        reference = registry.push("private:1", image(runnable()))

        for auth, said in (("", "requires credentials"), ("ann:s3cr3t-wrong", "rejected the credentials")):
            with pytest.raises(Unauthenticated, match=said) as caught:
                daemon.client.pull(reference, str(daemon.bundle("one")), auth=auth)
            assert "s3cr3t" not in caught.value.message
        with pytest.raises(InvalidArgument) as malformed:
            daemon.client.pull(reference, str(daemon.bundle("one")), auth="s3cr3t-without-colon")
        assert "s3cr3t" not in str(malformed.value) + str(malformed.value.facts)
        for named in (
            "https://ann:s3cr3t@127.0.0.1/a",
            "ann:s3cr3t@127.0.0.1:1/a:1",
            "https://s3cr3t@127.0.0.1/a",
        ):
            with pytest.raises(InvalidArgument) as misplaced:
                daemon.client.pull(named, str(daemon.bundle("one")))
            with pytest.raises(NotFound) as missing:
                daemon.client.remove_image(named)
            for error in (misplaced.value, missing.value):
                assert "s3cr3t" not in str(error) + str(error.facts)
        daemon.client.pull(reference, str(daemon.bundle("one")), auth="ann:open sesame")

        written = daemon.log.read_text() + json.dumps(daemon.meta_store())
        assert "s3cr3t" not in written
        assert "sesame" not in written


def test_a_blocked_registry_is_denied(disk: Path) -> None:
    blocked = {"registry_config": {"registry": [{"prefix": "blocked.example", "blocked": True}]}}
    with Daemon(disk, configuration=blocked) as daemon, pytest.raises(PermissionDenied) as caught:
        daemon.client.pull("blocked.example/img", str(daemon.bundle("one")))

    assert caught.value.reason == "REGISTRY_BLOCKED"


def test_a_limit_that_is_exceeded_is_named(disk: Path, registry: RegistrySimulator) -> None:
    reference = registry.push("big:1", image(layer(*files("a", count=20, size=1000))))
    with Daemon(disk, configuration={"limits": {"max_layer_bytes": 10_000}}) as daemon:
        with pytest.raises(ResourceExhausted, match=r"limits\.max_layer_bytes") as caught:
            daemon.client.pull(reference, str(daemon.bundle("one")))

        assert caught.value.reason == "LIMIT_EXCEEDED"
        assert daemon.staged() == []


def test_a_deadline_that_passes_ends_the_pull(daemon: Daemon, registry: RegistrySimulator) -> None:
    content = runnable()
    reference = registry.push("late:1", image(content))
    registry.fault(content, Stall(after=0.5))

    def fails() -> object:
        with pytest.raises(DeadlineExceeded):
            daemon.client.pull(reference, str(daemon.bundle("one")), timeout=0.5)
        await_quiet(daemon)
        return registry.requests_for(content)

    until("a pull downloads before its time is over", fails)


def test_a_caller_that_leaves_cancels_its_pull(daemon: Daemon, registry: RegistrySimulator) -> None:
    content = runnable()
    reference = registry.push("left:1", image(content))
    registry.fault(content, Stall(after=0.5))
    events = daemon.client.pull_with_progress(reference, str(daemon.bundle("one")))
    next(events)
    registry.await_request(content)

    events.close()

    await_quiet(daemon)


def await_quiet(daemon: Daemon) -> None:
    """Wait until nothing of a pull is left."""
    until("nothing is in staging", lambda: not daemon.staged())
    until("there is no bundle", lambda: not daemon.bundle("one").exists())
    until("no worker is left but the fork server", lambda: len(daemon.workers()) <= 1)
    assert daemon.client.images() == ()


def test_grpcurl_shows_an_error_with_its_info(daemon: Daemon) -> None:
    with pytest.raises(GrpcError) as caught:
        grpcurl(daemon.socket, f"{SERVICE}/ReleaseBundle", {"bundle_path": "/none"})

    assert (caught.value.code, caught.value.reason) == ("NotFound", "BUNDLE_NOT_FOUND")


def test_a_configuration_that_cannot_be_used_is_one_line(disk: Path) -> None:
    work_dir = disk / "work"
    work_dir.mkdir()
    (work_dir / "config.json").write_text('{"limits": {"max_layers": "many"}}')

    ended = serve("--work-dir", str(work_dir), "--listen", f"unix://{disk}/a.sock")

    assert ended.returncode == 1
    assert "limits.max_layers" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_an_unknown_key_of_the_configuration_is_a_warning(disk: Path) -> None:
    with Daemon(disk, configuration={"from_the_future": 1}) as daemon:
        assert "unknown key from_the_future is ignored" in daemon.log.read_text()


# -- the log -----------------------------------------------------------------------------------------------------


def test_a_pull_s_events_say_whose_they_are_how_much_they_were_and_how_long_they_took(
    disk: Path, registry: RegistrySimulator
) -> None:
    part = layer(*files("srv", count=3))
    reference = registry.push("shop:1.0", image(part))
    with Daemon(disk, options=("--log-format", "json")) as daemon:
        daemon.client.pull(reference, str(daemon.bundle("one")))
        with pytest.raises(AlreadyExists) as raised:
            daemon.client.pull(reference, str(daemon.bundle("one")))
        events = [json.loads(line) for line in daemon.log.read_text().splitlines()]

    fetched = next(event for event in events if event["event"] == "layer")
    pulled = next(event for event in events if event["event"] == "PullImage")
    failed = next(event for event in events if event["event"] == "PullImage failed")
    assert fetched["request"] == pulled["request"]
    assert (fetched["layer"], fetched["bytes"], pulled["bytes"]) == (part.digest, part.size, part.size)
    assert failed["request"] == raised.value.request_id
    assert {event["image"] for event in (fetched, pulled, failed)} == {reference}
    assert all(event["seconds"] >= 0 for event in (fetched, pulled, failed))
