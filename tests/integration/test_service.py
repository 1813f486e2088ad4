"""The daemon as a program: where it listens, who may call, how it starts and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
from support.daemon import Daemon, Tmpfs
from support.faults import Corrupt, Stall, Status
from support.images import OCI_MANIFEST, RawTar, file, files, image, layer, symlink
from support.peers import GrpcError, grpcurl, grpcurl_list, run
from support.samples import runnable
from support.simulator import Basic, RegistrySimulator
from support.waiting import end_of, until

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


def test_a_loopback_port_will_do_as_well(disk: Path) -> None:
    with Daemon(disk, options=("--listen", "127.0.0.1:0")) as daemon:
        address = daemon.await_log(r"127\.0\.0\.1:\d+")

        assert SERVICE in grpcurl_list(address[0])
        with Client(address[0]) as client:
            assert client.images() == ()


def test_other_addresses_need_tls(disk: Path) -> None:
    ended = serve("--work-dir", str(disk / "work"), "--listen", "0.0.0.0:0")

    assert ended.returncode == 1
    assert "TLS with client certificates" in ended.stderr


@pytest.fixture
def open_disk() -> Iterator[Path]:
    """A tmpfs that other users reach; pytest's own directories are closed to them."""
    directory = Path(tempfile.mkdtemp(prefix="guestpull-test-"))
    directory.chmod(0o755)
    with Tmpfs(directory / "disk") as disk:
        disk.chmod(0o755)
        yield disk
    shutil.rmtree(directory)


def test_a_user_who_may_not_call_is_told_so(open_disk: Path) -> None:
    program = (
        "import os, sys\n"
        "from guestpull_client.client import Client\n"
        "from guestpull_client.errors import GuestpullError\n"
        "os.setgroups([]); os.setgid(4242); os.setuid(int(sys.argv[2]))\n"
        "try:\n    print(Client('unix://' + sys.argv[1]).images())\n"
        "except GuestpullError as error:\n    print(error.code, error.reason)\n"
    )
    with Daemon(open_disk, configuration={"allowed_uids": [4242]}) as daemon:
        answers = [run(sys.executable, "-c", program, daemon.socket, uid).stdout for uid in ("4242", "4243")]

    assert answers == ["()\n", "PERMISSION_DENIED CALLER_NOT_ALLOWED\n"]


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
