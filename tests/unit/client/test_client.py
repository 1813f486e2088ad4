"""The typed client: what it sends, what it makes of the answers, what it raises."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

import guestpull_client
from guestpull_client import (
    Bundle,
    Client,
    Collection,
    Image,
    InvalidArgument,
    Layer,
    LayerDone,
    LayerProgress,
    Mounted,
    NotFound,
    PulledImage,
    PulledLayer,
    PullPolicy,
    Release,
    Removal,
    Resolved,
    ResolvedLayer,
    TlsFiles,
    Unavailable,
    errors,
)
from guestpull_protos import image_service_pb2 as pb
from support.scripted_service import ScriptedService, refusal
from support.waiting import PATIENCE, until

PULLED = pb.PullImageResponse(
    image_id="sha256:i",
    manifest_digest="sha256:m",
    reference="docker.io/library/busybox:latest",
    rootfs_path="/b/rootfs",
    downloaded_bytes=7,
    layers=[
        pb.PulledLayer(compressed_digest="sha256:c", uncompressed_digest="sha256:u", downloaded_bytes=7),
        pb.PulledLayer(compressed_digest="sha256:d", uncompressed_digest="sha256:v", reused=True),
    ],
)
AS_PULLED = PulledImage(
    "sha256:i",
    "sha256:m",
    "docker.io/library/busybox:latest",
    "/b/rootfs",
    7,
    (PulledLayer("sha256:c", "sha256:u", False, 7), PulledLayer("sha256:d", "sha256:v", True, 0)),
)
EVENTS = [
    pb.PullImageEvent(
        resolved=pb.Resolved(
            reference="r",
            image_id="sha256:i",
            manifest_digest="sha256:m",
            layers=[pb.ResolvedLayer(compressed_digest="sha256:c", size_bytes=7)],
        )
    ),
    pb.PullImageEvent(
        layer_progress=pb.LayerProgress(compressed_digest="sha256:c", done_bytes=3, total_bytes=7)
    ),
    pb.PullImageEvent(),  # of a later version of the service
    pb.PullImageEvent(layer_done=pb.LayerDone(compressed_digest="sha256:c", downloaded_bytes=7)),
    pb.PullImageEvent(mounted=pb.Mounted(rootfs_path="/b/rootfs")),
    pb.PullImageEvent(result=PULLED),
]


def test_a_pull_sends_all_its_arguments(service: ScriptedService, client: Client) -> None:
    client.pull("busybox", "/b", auth="user:password", policy=PullPolicy.NEVER, platform="linux/arm64/v8")

    assert service.requests == [
        pb.PullImageRequest(
            image_url="busybox",
            bundle_path="/b",
            auth_info="user:password",
            pull_policy=pb.PULL_POLICY_NEVER,
            platform="linux/arm64/v8",
        )
    ]


@pytest.mark.parametrize("policy", PullPolicy)
def test_policies_are_those_of_the_proto(policy: PullPolicy) -> None:
    assert pb.PullPolicy.Name(pb.PullPolicy.ValueType(policy.value)) == f"PULL_POLICY_{policy.name}"


def test_a_pull_returns_what_was_pulled(service: ScriptedService, client: Client) -> None:
    service.answers["PullImage"] = PULLED

    assert client.pull("busybox", "/b") == AS_PULLED


def test_progress_events_arrive_in_order_and_end_with_the_result(
    service: ScriptedService, client: Client
) -> None:
    service.answers["PullImageWithProgress"] = EVENTS

    assert list(client.pull_with_progress("busybox", "/b")) == [
        Resolved("r", "sha256:i", "sha256:m", (ResolvedLayer("sha256:c", 7),)),
        LayerProgress("sha256:c", 3, 7),
        LayerDone("sha256:c", False, 7),
        Mounted("/b/rootfs"),
        AS_PULLED,
    ]


def test_giving_up_the_events_cancels_the_pull(service: ScriptedService, client: Client) -> None:
    service.answers["PullImageWithProgress"] = EVENTS * 10_000
    events = client.pull_with_progress("busybox", "/b")
    next(events)

    events.close()

    assert service.caller_left.wait(PATIENCE)


def main_thread_waits_for_a_result() -> bool:
    ident = threading.main_thread().ident
    assert ident is not None
    return any(
        frame.f_code.co_name == "result" for frame, _ in traceback.walk_stack(sys._current_frames()[ident])
    )


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A Ctrl-C counts, though the suite was started in the background, where a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupting_a_pull_cancels_it_while_the_client_stays_open(
    service: ScriptedService, client: Client, interruptible: None
) -> None:
    def interrupt(context: grpc.ServicerContext) -> pb.PullImageResponse:
        until("the pull waits for its answer", main_thread_waits_for_a_result)
        os.kill(os.getpid(), signal.SIGINT)
        return service.wait_until_caller_leaves(context)

    service.answers["PullImage"] = interrupt

    with pytest.raises(KeyboardInterrupt):
        client.pull("busybox", "/b")

    assert service.caller_left.wait(PATIENCE)


@pytest.mark.parametrize("bundle", ["/b/../c", "", "/b/"])
def test_absolute_bundle_paths_are_sent_as_they_are(
    service: ScriptedService, client: Client, bundle: str
) -> None:
    client.release_bundle(bundle)

    assert service.requests == [pb.ReleaseBundleRequest(bundle_path=bundle)]


def test_relative_bundle_paths_are_made_absolute(
    service: ScriptedService, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    client.pull("busybox", "../one")
    client.release_bundle("two")

    assert service.requests == [
        pb.PullImageRequest(image_url="busybox", bundle_path=str(tmp_path / "one")),
        pb.ReleaseBundleRequest(bundle_path=str(tmp_path / "here/two")),
    ]


def test_images_layers_and_bundles_are_lists_of_data_classes(
    service: ScriptedService, client: Client
) -> None:
    service.answers["ListImages"] = pb.ListImagesResponse(
        images=[
            pb.Image(
                id="i",
                digest="m",
                reference="r",
                references=["r", "s"],
                layers=["c"],
                size_bytes=9,
                platform="linux/amd64",
                bundles=["/b"],
                read_only_store="/ro",
            )
        ]
    )
    service.answers["ListLayers"] = pb.ListLayersResponse(
        layers=[
            pb.Layer(
                compressed_digest="c",
                uncompressed_digest="u",
                decoder="Zstd",
                encrypted=True,
                store_path="/w/layers/sha256_c",
                size_bytes=9,
                images=["i"],
                bundles=2,
                present=True,
                read_only=True,
            )
        ]
    )
    service.answers["ListBundles"] = pb.ListBundlesResponse(
        bundles=[pb.Bundle(bundle_path="/b", image_id="i", reference="r", mounted=True)]
    )

    assert client.images("r") == (Image("i", "m", "r", ("r", "s"), ("c",), 9, "linux/amd64", ("/b",), "/ro"),)
    assert client.layers("i") == (
        Layer("c", "u", "Zstd", True, "/w/layers/sha256_c", 9, ("i",), 2, True, True),
    )
    assert client.bundles() == (Bundle("/b", "i", "r", True),)
    assert service.requests[:2] == [pb.ListImagesRequest(reference="r"), pb.ListLayersRequest(image="i")]


def test_removing_and_releasing_return_what_was_deleted(service: ScriptedService, client: Client) -> None:
    service.answers["RemoveImage"] = pb.RemoveImageResponse(
        image_ids=["i"], references=["r"], deleted_layers=["c"], freed_bytes=5
    )
    service.answers["ReleaseBundle"] = pb.ReleaseBundleResponse(deleted_layers=["d"], freed_bytes=6)

    assert client.remove_image("r", force=True) == Removal(("i",), ("r",), ("c",), 5)
    assert client.release_bundle("/b") == Release(("d",), 6)
    assert service.requests[0] == pb.RemoveImageRequest(image="r", force=True)


def test_collecting_garbage_returns_what_was_deleted(service: ScriptedService, client: Client) -> None:
    service.answers["CollectGarbage"] = pb.CollectGarbageResponse(deleted_layers=["c"], freed_bytes=5)

    assert client.collect_garbage(dry_run=True) == Collection(("c",), 5)
    assert service.requests == [pb.CollectGarbageRequest(dry_run=True)]


def test_each_field_of_the_proto_has_its_field_in_the_data_classes() -> None:
    """A field that is added to the contract must not be forgotten here."""
    of: dict[type[Message], type] = {
        pb.PullImageResponse: PulledImage,
        pb.PulledLayer: PulledLayer,
        pb.Resolved: Resolved,
        pb.ResolvedLayer: ResolvedLayer,
        pb.LayerProgress: LayerProgress,
        pb.LayerDone: LayerDone,
        pb.Mounted: Mounted,
        pb.Image: Image,
        pb.Layer: Layer,
        pb.Bundle: Bundle,
        pb.RemoveImageResponse: Removal,
        pb.ReleaseBundleResponse: Release,
        pb.CollectGarbageResponse: Collection,
    }
    for message, data_class in of.items():
        named = {field.name for field in message.DESCRIPTOR.fields}
        assert named == set(data_class.__dataclass_fields__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("error_class", errors.BY_CODE.values())
def test_each_status_has_its_exception(
    service: ScriptedService, client: Client, error_class: type[errors.GuestpullError]
) -> None:
    service.answers["PullImage"] = refusal(
        error_class.code, "SOME_REASON", "what happened. What to do.", {"host": "h", "request_id": "7f"}
    )

    with pytest.raises(error_class) as raised:
        client.pull("busybox", "/b")

    error = raised.value
    assert type(error) is error_class
    assert str(error) == error.message == "what happened. What to do."
    assert (error.reason, error.facts, error.request_id) == ("SOME_REASON", {"host": "h"}, "7f")


def test_errors_of_streams_are_the_same_exceptions(service: ScriptedService, client: Client) -> None:
    service.answers["PullImageWithProgress"] = refusal("NOT_FOUND", "IMAGE_NOT_FOUND", "no such image")

    with pytest.raises(NotFound, match="no such image"):
        list(client.pull_with_progress("busybox", "/b"))


def test_details_of_another_domain_are_not_taken_for_ours(service: ScriptedService, client: Client) -> None:
    service.answers["ListImages"] = refusal("INTERNAL", "THEIRS", "of a proxy", domain="example.com")

    with pytest.raises(errors.Internal) as raised:
        client.images()

    assert raised.value.reason == "INTERNAL"


def test_every_exception_is_exported() -> None:
    assert {one.__name__ for one in errors.BY_CODE.values()} < set(guestpull_client.__all__)


def test_a_call_that_takes_longer_than_its_timeout_fails(service: ScriptedService, client: Client) -> None:
    service.answers["PullImage"] = service.wait_until_caller_leaves

    def fails() -> object:
        with pytest.raises(errors.DeadlineExceeded):
            client.pull("busybox", "/b", timeout=0.1)
        return service.requests

    until("a call comes to the service before its time is over", fails)
    assert service.caller_left.wait(PATIENCE)


def test_the_client_s_timeout_applies_to_calls_without_one(service: ScriptedService) -> None:
    service.answers["PullImage"] = service.wait_until_caller_leaves

    with Client(service.address, timeout=0.1) as client, pytest.raises(errors.DeadlineExceeded):
        client.pull("busybox", "/b")


@pytest.mark.parametrize("seconds", [float("inf"), 1e10])
def test_a_timeout_beyond_the_longest_wait_means_no_timeout(
    service: ScriptedService, client: Client, seconds: float
) -> None:
    service.answers["PullImage"] = PULLED

    assert client.pull("busybox", "/b", timeout=seconds) == AS_PULLED


def test_a_service_that_does_not_answer_in_time_is_reported(service: ScriptedService) -> None:
    service.answers["PullImage"] = service.wait_until_caller_leaves

    with Client(service.address, timeout=0.1) as client, pytest.raises(errors.DeadlineExceeded) as raised:
        client.pull("busybox", "/b")

    assert str(raised.value).endswith("did not answer in time. Allow more time (--timeout).")


def test_arguments_are_sent_as_their_bytes_in_any_locale(service: ScriptedService, client: Client) -> None:
    in_an_ascii_locale = os.fsencode("/b\u00fc").decode("ascii", "surrogateescape")

    client.release_bundle(in_an_ascii_locale)

    assert service.requests == [pb.ReleaseBundleRequest(bundle_path="/b\u00fc")]


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("image", lambda client: client.pull("\udcff", "/b")),
        ("bundle", lambda client: client.pull("busybox", "/\udcff")),
        ("auth", lambda client: client.pull("busybox", "/b", auth="user:hunter2\udcff")),
        ("platform", lambda client: client.pull("busybox", "/b", platform="\udcff")),
        ("reference", lambda client: client.images("\udcff")),
        ("image", lambda client: client.layers("\udcff")),
        ("image", lambda client: client.remove_image("\udcff")),
        ("bundle", lambda client: client.release_bundle("/\udcff")),
    ],
)
def test_an_argument_that_is_not_utf8_is_refused_and_not_repeated(
    client: Client, field: str, call: Callable[[Client], object]
) -> None:
    with pytest.raises(InvalidArgument, match=f"^Invalid {field}: not UTF-8") as raised:
        call(client)

    assert "hunter2" not in str(raised.value)


def test_the_error_for_a_missing_service_says_how_to_start_it(tmp_path: Path) -> None:
    address = f"unix://{tmp_path}/none"

    with Client(address) as client, pytest.raises(Unavailable) as raised:
        client.images()

    assert raised.value.reason == "SERVICE_UNAVAILABLE"
    assert f"guestpulld serve --listen {address}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_another_service_is_not_mistaken_for_guestpulld() -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()

    with Client(f"127.0.0.1:{port}") as client, pytest.raises(errors.GuestpullError) as raised:
        client.images()

    other.stop(None)
    assert f"127.0.0.1:{port} is not guestpulld" in str(raised.value)


def test_a_registry_that_is_not_there_is_not_mistaken_for_the_service(
    service: ScriptedService, client: Client
) -> None:
    service.answers["PullImage"] = refusal("UNAVAILABLE", "REGISTRY_UNAVAILABLE", "the registry is away")

    with pytest.raises(Unavailable) as raised:
        client.pull("busybox", "/b")

    assert str(raised.value) == "the registry is away"


def test_health_is_that_of_the_service(service: ScriptedService, client: Client) -> None:
    from grpc_health.v1 import health_pb2

    assert client.is_healthy()
    service.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert not client.is_healthy()


def test_the_address_comes_from_the_environment(
    service: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUESTPULL_ADDRESS", service.address)

    with Client() as client:
        assert client.bundles() == ()


def test_a_tls_file_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"Cannot read /none/ca\.pem"):
        Client("127.0.0.1:1", tls=TlsFiles("/none/ca.pem", "/none/cert.pem", "/none/key.pem"))


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Clientt"):
        guestpull_client.Clientt  # type: ignore[attr-defined]  # noqa: B018
