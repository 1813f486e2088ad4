"""Reading a blob from a registry that fails in every way that it can."""

from __future__ import annotations

import hashlib
import threading
import time

import msgspec
import pytest

from guestpull_server.cancellation import Cancellation
from guestpull_server.errors import (
    BlobNotFound,
    Cancelled,
    DeadlineExceeded,
    DigestMismatch,
    RegistryUnavailable,
    SizeMismatch,
)
from guestpull_server.models import Descriptor, Digest
from guestpull_server.registry import RegistryClient
from guestpull_server.registry.image_source import BlobStream
from support.faults import (
    Corrupt,
    Cut,
    Drip,
    Endless,
    EndlessChunkHeader,
    EndlessTrailers,
    IgnoreRange,
    NoLength,
    Nonsense,
    OtherRange,
    Refuse,
    SlowHeader,
    Stall,
    Status,
    WrongLength,
)
from support.images import files, image, layer
from support.pulling import PATIENT, ClientOf, Pull, descriptor_of, read_blob
from support.simulator import Fault, RegistrySimulator
from support.waiting import end_of

LAYER = layer(*files("srv", count=40, size=20_000))
SHOP = image(LAYER)


@pytest.fixture
def shop(registry: RegistrySimulator) -> str:
    return registry.push("shop:1.0", SHOP)


def statuses(registry: RegistrySimulator) -> list[int]:
    return [request.status for request in registry.requests_for(LAYER)]


# -- nothing goes wrong ------------------------------------------------------------------------------------


def test_a_blob_comes_as_it_is(shop: str, pull: Pull) -> None:
    assert pull.blob(shop, LAYER) == LAYER.blob


def test_received_bytes_are_those_of_the_wire(shop: str, client: RegistryClient) -> None:
    source = Pull(client).source(shop)
    with source.open_blob(descriptor_of(LAYER), Cancellation("pull")) as stream:
        while stream.read(100_000):
            pass
        assert stream.received_bytes == LAYER.size


def test_no_piece_is_longer_than_was_asked_for(shop: str, client: RegistryClient) -> None:
    with Pull(client).source(shop).open_blob(descriptor_of(LAYER), Cancellation("pull")) as stream:
        assert 0 < len(stream.read(1000)) <= 1000


def test_the_end_can_be_told_again(shop: str, client: RegistryClient) -> None:
    with Pull(client).source(shop).open_blob(descriptor_of(LAYER), Cancellation("pull")) as stream:
        while stream.read(100_000):
            pass
        assert stream.read(1) == b""


def test_an_empty_blob_needs_no_request(
    registry: RegistrySimulator, shop: str, client: RegistryClient
) -> None:
    empty = Descriptor("", Digest.of(b""), 0)
    with Pull(client).source(shop).open_blob(empty, Cancellation("pull")) as stream:
        assert stream.read(1) == b""
    assert registry.requests == []


def test_one_connection_serves_one_blob_after_the_other(
    registry: RegistrySimulator, client_of: ClientOf
) -> None:
    layers = [layer(*files(f"srv{number}", count=2)) for number in range(5)]
    shop = registry.push("shop:1.0", image(*layers))
    pull = Pull(client_of())
    for one in layers:
        pull.blob(shop, one)
    ports = {request.client_port for request in registry.requests if "blobs" in request.path}
    assert len(ports) == 1


def test_a_sha512_digest_is_verified_by_sha512(
    registry: RegistrySimulator, shop: str, client: RegistryClient
) -> None:
    digest = Digest(f"sha512:{hashlib.sha512(LAYER.blob).hexdigest()}")
    registry.put_blob(digest, LAYER.blob)
    source = Pull(client).source(shop)
    with source.open_blob(Descriptor("", digest, LAYER.size), Cancellation("pull")) as stream:
        assert b"".join(iter(lambda: stream.read(100_000), b"")) == LAYER.blob


# -- connections that break --------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_download_is_resumed_where_it_broke_off(
    registry: RegistrySimulator, shop: str, pull: Pull, reset: bool
) -> None:
    registry.fault(LAYER, Cut(after=0.5, reset=reset), times=1)

    assert pull.blob(shop, LAYER) == LAYER.blob
    assert statuses(registry) == [200, 206]


def test_what_was_received_is_not_sent_again(registry: RegistrySimulator, shop: str, pull: Pull) -> None:
    for share in (0.1, 0.5, 0.9):
        registry.fault(LAYER, Cut(after=share), times=1)

    assert pull.blob(shop, LAYER) == LAYER.blob
    assert registry.bytes_sent(LAYER) == LAYER.size


def test_a_connection_that_always_breaks_at_once_is_given_up(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.fault(LAYER, Cut(after=0))

    with pytest.raises(RegistryUnavailable, match="4 attempts"):
        pull.blob(shop, LAYER)
    assert len(statuses(registry)) == PATIENT.max_attempts


def test_progress_earns_new_attempts(registry: RegistrySimulator, client_of: ClientOf) -> None:
    big = layer(*files("srv", count=10, size=500_000))
    shop = registry.push("big:1.0", image(big))
    cuts = 2 * PATIENT.max_attempts
    for left in range(cuts, 0, -1):
        registry.fault(big, Cut(after=1 / (left + 1)), times=1)

    assert Pull(client_of()).blob(shop, big) == big.blob
    assert len(registry.requests_for(big)) == cuts + 1


@pytest.mark.parametrize(
    "fault", [Refuse(), Refuse(reset=True), Nonsense(), Status(500), Status(503), Status(429)]
)
def test_a_request_that_fails_is_made_again(
    registry: RegistrySimulator, shop: str, pull: Pull, fault: Fault
) -> None:
    registry.fault(LAYER, fault, times=2)

    assert pull.blob(shop, LAYER) == LAYER.blob


def test_a_stalled_connection_is_left_for_another(
    registry: RegistrySimulator, shop: str, impatient_pull: Pull
) -> None:
    registry.fault(LAYER, Stall(after=0.5), times=1)

    assert impatient_pull.blob(shop, LAYER) == LAYER.blob
    assert statuses(registry)[:2] == [200, 206]


def test_a_connection_slower_than_the_minimum_is_left_for_another(
    registry: RegistrySimulator, shop: str, impatient_pull: Pull
) -> None:
    registry.fault(LAYER, Drip(after=0.5, bytes_per_second=100), times=1)

    assert impatient_pull.blob(shop, LAYER) == LAYER.blob


def test_a_registry_that_is_always_too_slow_is_named_so(
    registry: RegistrySimulator, shop: str, client_of: ClientOf
) -> None:
    registry.fault(LAYER, Drip(after=0, bytes_per_second=100))
    limits = msgspec.structs.replace(PATIENT, max_attempts=2, read_timeout=1.0, min_bytes_per_second=10_000)

    with pytest.raises(RegistryUnavailable, match="min_bytes_per_second"):
        Pull(client_of(limits=limits)).blob(shop, LAYER)


def test_a_reader_that_takes_its_time_is_not_held_against_the_registry(
    registry: RegistrySimulator, shop: str, client_of: ClientOf
) -> None:
    limits = msgspec.structs.replace(PATIENT, read_timeout=1.0, min_bytes_per_second=10_000)
    source = Pull(client_of(limits=limits)).source(shop)
    with source.open_blob(descriptor_of(LAYER), Cancellation("pull")) as stream:
        stream.read(100)
        time.sleep(1.1 * limits.read_timeout)
        stream.read(100)
        while stream.read(100_000):
            pass
    assert statuses(registry) == [200]


def test_a_header_that_never_ends_is_not_waited_for(
    registry: RegistrySimulator, shop: str, impatient_pull: Pull
) -> None:
    registry.fault(LAYER, SlowHeader(seconds=10), times=1)  # each byte comes well within read_timeout

    assert impatient_pull.blob(shop, LAYER) == LAYER.blob


def test_a_chunk_header_that_never_ends_is_left_for_another_connection(
    registry: RegistrySimulator, shop: str, impatient_pull: Pull
) -> None:
    registry.fault(LAYER, EndlessChunkHeader(after=0.5, seconds=0.02), times=1)

    assert impatient_pull.blob(shop, LAYER) == LAYER.blob
    assert statuses(registry)[:2] == [200, 206]


def test_chunk_headers_that_never_end_make_a_registry_unavailable(
    registry: RegistrySimulator, shop: str, impatient_pull: Pull
) -> None:
    registry.fault(LAYER, EndlessChunkHeader(after=0, seconds=0.02))

    with pytest.raises(RegistryUnavailable, match="read timed out"):
        impatient_pull.blob(shop, LAYER)


def test_what_trails_a_blob_without_end_is_not_waited_for(
    registry: RegistrySimulator, shop: str, client_of: ClientOf
) -> None:
    registry.fault(LAYER, EndlessTrailers(seconds=0.02))
    limits = msgspec.structs.replace(PATIENT, read_timeout=1.0)

    assert Pull(client_of(limits=limits)).blob(shop, LAYER) == LAYER.blob
    assert statuses(registry) == [200]


# -- ranges ------------------------------------------------------------------------------------------------


def test_a_registry_that_ignores_range_sends_the_start_in_vain(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.fault(LAYER, Cut(after=0.5), times=1)
    registry.fault(LAYER, IgnoreRange())

    assert pull.blob(shop, LAYER) == LAYER.blob
    assert statuses(registry) == [200, 200]


def test_a_part_that_begins_too_early_is_skipped_into(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.fault(LAYER, Cut(after=0.5), times=1)
    registry.fault(LAYER, OtherRange(at=0.25))

    assert pull.blob(shop, LAYER) == LAYER.blob


@pytest.mark.parametrize("fault", [OtherRange(at=0.75), Status(416)])
def test_where_a_part_is_answered_wrongly_the_whole_is_asked_for(
    registry: RegistrySimulator, shop: str, pull: Pull, fault: Fault
) -> None:
    registry.fault(LAYER, Cut(after=0.5), times=1)
    registry.fault(LAYER, fault, times=1)

    assert pull.blob(shop, LAYER) == LAYER.blob
    assert "range" not in registry.requests_for(LAYER)[-1].headers


# -- lies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 0.5, 1])
def test_altered_bytes_are_a_digest_mismatch(
    registry: RegistrySimulator, shop: str, pull: Pull, at: float
) -> None:
    registry.fault(LAYER, Corrupt(at=at))

    with pytest.raises(DigestMismatch) as raised:
        pull.blob(shop, LAYER)
    assert raised.value.expected == LAYER.digest


@pytest.mark.parametrize("by", [-1, 1])
def test_a_content_length_that_is_not_the_descriptors_is_refused_before_a_byte_is_read(
    registry: RegistrySimulator, shop: str, client: RegistryClient, by: int
) -> None:
    registry.fault(LAYER, WrongLength(by=by))

    with Pull(client).source(shop).open_blob(descriptor_of(LAYER), Cancellation("pull")) as stream:
        with pytest.raises(SizeMismatch) as raised:
            stream.read(1)
        assert stream.received_bytes == 0
    assert raised.value.actual_bytes == LAYER.size + by


def test_a_body_without_a_length_is_read_to_its_end(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.fault(LAYER, NoLength())

    assert pull.blob(shop, LAYER) == LAYER.blob


def test_a_body_that_is_one_byte_too_long_is_a_size_mismatch(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.fault(LAYER, NoLength(more=b"!"))

    with pytest.raises(SizeMismatch):
        pull.blob(shop, LAYER)


def test_an_endless_body_is_left_at_once(registry: RegistrySimulator, shop: str, pull: Pull) -> None:
    registry.fault(LAYER, Endless())

    with pytest.raises(SizeMismatch):
        pull.blob(shop, LAYER)


def test_a_blob_that_the_registry_does_not_have_is_named(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.forget(LAYER)

    with pytest.raises(BlobNotFound, match=LAYER.digest):
        pull.blob(shop, LAYER)


# -- callers that leave ------------------------------------------------------------------------------------


def reading(stream: BlobStream) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def read() -> None:
        try:
            while stream.read(100_000):
                pass
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            raised.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, raised


@pytest.mark.parametrize("fault", [Stall(after=0.5), Stall(after=0), SlowHeader(seconds=60)])
def test_cancelling_ends_a_read_that_waits(
    registry: RegistrySimulator, shop: str, client: RegistryClient, fault: Fault
) -> None:
    registry.fault(LAYER, fault)
    cancellation = Cancellation("pull")
    with Pull(client).source(shop).open_blob(descriptor_of(LAYER), cancellation) as stream:
        thread, raised = reading(stream)
        registry.await_request(LAYER)
        cancellation.cancel()
        end_of(thread)

    assert isinstance(raised[0], Cancelled)


def test_a_deadline_ends_a_read_that_waits(
    registry: RegistrySimulator, shop: str, client: RegistryClient
) -> None:
    registry.fault(LAYER, Stall(after=0.5))
    soon = Cancellation("pull", time.monotonic() + 0.3)

    with pytest.raises(DeadlineExceeded):
        read_blob(Pull(client).source(shop), LAYER, soon)


def test_a_caller_that_left_waits_for_no_further_attempt(
    registry: RegistrySimulator, shop: str, client_of: ClientOf
) -> None:
    registry.fault(LAYER, Cut(after=0))
    patient = msgspec.structs.replace(PATIENT, max_retry_delay=60, max_attempts=100)
    soon = Cancellation("pull", time.monotonic() + 0.3)

    with pytest.raises(DeadlineExceeded):
        read_blob(Pull(client_of(limits=patient)).source(shop), LAYER, soon)
