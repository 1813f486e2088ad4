"""Mirrors: asked first, trusted in nothing, and never told a password that is not theirs."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import RegistryConfig
from guestpull_server.errors import DigestMismatch, ImageNotFound
from guestpull_server.models import Credentials
from guestpull_server.registry import fetch_image
from support.faults import Corrupt, Cut, Status, WrongLength
from support.images import files, image, layer
from support.pulling import AMD64, ClientOf, Pull, read_blob
from support.simulator import Basic, Fault, RegistrySimulator

LAYER = layer(*files("srv", count=10, size=20_000))
SHOP = image(LAYER)


@pytest.fixture
def mirror() -> Iterator[RegistrySimulator]:
    with RegistrySimulator() as simulator:
        yield simulator


@pytest.fixture
def pull(registry: RegistrySimulator, mirror: RegistrySimulator, client_of: ClientOf) -> Pull:
    return Pull(client_of(registry_config=mirrored(registry, mirror)))


def mirrored(registry: RegistrySimulator, mirror: RegistrySimulator) -> RegistryConfig:
    entry = {"location": registry.host, "mirror": [{"location": f"{mirror.host}/copies"}]}
    return msgspec.convert({"registry": [entry]}, type=RegistryConfig)


def push_to_both(registry: RegistrySimulator, mirror: RegistrySimulator) -> str:
    mirror.push("copies/shop:1.0", SHOP)
    return registry.push("shop:1.0", SHOP)


def test_a_mirror_that_has_the_image_is_all_that_is_asked(
    registry: RegistrySimulator, mirror: RegistrySimulator, pull: Pull
) -> None:
    reference = push_to_both(registry, mirror)

    assert pull.resolve(reference).reference == reference
    assert pull.blob(reference, LAYER) == LAYER.blob
    assert registry.requests == []


@pytest.mark.parametrize("fault", [Status(500), Status(403), Status(401), Status(404), Corrupt()])
def test_where_a_mirror_fails_the_registry_is_asked(
    registry: RegistrySimulator, mirror: RegistrySimulator, pull: Pull, fault: Fault
) -> None:
    reference = push_to_both(registry, mirror)
    mirror.fault("manifests/1.0", fault)
    mirror.fault(LAYER, Status(404))

    assert pull.resolve(reference).image_id == SHOP.image_id
    assert pull.blob(reference, LAYER) == LAYER.blob


def test_a_mirror_that_is_gone_does_no_harm(registry: RegistrySimulator, client_of: ClientOf) -> None:
    with RegistrySimulator() as gone:
        config = mirrored(registry, gone)
    reference = registry.push("shop:1.0", SHOP)
    pull = Pull(client_of(registry_config=config))

    assert pull.resolve(reference).image_id == SHOP.image_id
    assert pull.blob(reference, LAYER) == LAYER.blob


def test_a_mirror_that_is_down_is_not_waited_for_as_a_registry_is(
    registry: RegistrySimulator, mirror: RegistrySimulator, pull: Pull
) -> None:
    reference = push_to_both(registry, mirror)
    mirror.fault("manifests/1.0", Status(503))

    assert pull.resolve(reference).image_id == SHOP.image_id
    assert len(mirror.requests_for("manifests/1.0")) == 2


def test_a_mirror_that_does_not_have_the_image_is_not_asked_for_its_blobs(
    registry: RegistrySimulator, mirror: RegistrySimulator, pull: Pull
) -> None:
    source = pull.source(push_to_both(registry, mirror))
    mirror.fault("manifests/1.0", Status(503))

    fetch_image(source, AMD64, Cancellation("pull"))
    assert read_blob(source, LAYER) == LAYER.blob
    assert mirror.requests_for(LAYER) == []


def test_a_mirror_without_the_config_does_no_harm(
    registry: RegistrySimulator, mirror: RegistrySimulator, pull: Pull
) -> None:
    reference = push_to_both(registry, mirror)
    mirror.fault(SHOP.image_id, Status(404))

    assert pull.resolve(reference).image_id == SHOP.image_id
    assert len(registry.requests_for("manifests/1.0")) == 1


def test_a_mirror_whose_tag_is_another_image_does_no_harm_without_its_config(
    registry: RegistrySimulator, mirror: RegistrySimulator, pull: Pull
) -> None:
    old = image(LAYER, process={"Env": ["AGE=old"]})
    mirror.push("copies/shop:1.0", old)
    mirror.fault(old.image_id, Status(404))

    assert pull.resolve(registry.push("shop:1.0", SHOP)).image_id == SHOP.image_id


def test_where_all_fail_the_error_is_the_registrys(
    registry: RegistrySimulator, mirror: RegistrySimulator, pull: Pull
) -> None:
    with pytest.raises(ImageNotFound) as raised:
        pull.resolve(f"{registry.host}/none")
    assert raised.value.host == registry.host


def test_the_registry_goes_on_where_a_mirror_broke_off(
    registry: RegistrySimulator, mirror: RegistrySimulator, pull: Pull
) -> None:
    reference = push_to_both(registry, mirror)
    mirror.fault(LAYER, Cut(after=0.5), times=1)
    mirror.fault(LAYER, Status(404))

    assert pull.blob(reference, LAYER) == LAYER.blob
    assert [request.status for request in registry.requests_for(LAYER)] == [206]


def test_a_mirror_of_another_length_is_passed_over(
    registry: RegistrySimulator, mirror: RegistrySimulator, pull: Pull
) -> None:
    reference = push_to_both(registry, mirror)
    mirror.fault(LAYER, WrongLength(by=1))

    assert pull.blob(reference, LAYER) == LAYER.blob


def test_a_mirror_that_alters_a_blob_is_not_asked_for_it_again(
    registry: RegistrySimulator, mirror: RegistrySimulator, pull: Pull
) -> None:
    source = pull.source(push_to_both(registry, mirror))
    mirror.fault(LAYER, Corrupt())

    with pytest.raises(DigestMismatch):
        read_blob(source, LAYER)
    assert read_blob(source, LAYER) == LAYER.blob


def test_the_callers_password_is_for_the_registry_alone(
    registry: RegistrySimulator, mirror: RegistrySimulator, pull: Pull
) -> None:
    registry.authentication = mirror.authentication = Basic("alice", "wonderland")
    reference = push_to_both(registry, mirror)

    resolved = pull.resolve(reference, credentials=Credentials("alice", "wonderland"))
    assert resolved.image_id == SHOP.image_id
    assert {request.authorization for request in mirror.requests} == {""}


def test_a_mirror_has_its_own_entry_in_the_credentials_file(
    registry: RegistrySimulator, mirror: RegistrySimulator, client_of: ClientOf, tmp_path: Path
) -> None:
    mirror.authentication = Basic("bob", "builder")
    auth = {mirror.host: {"auth": base64.b64encode(b"bob:builder").decode()}}
    (tmp_path / "auth.json").write_text(json.dumps({"auths": auth}))
    client = client_of(
        registry_config=mirrored(registry, mirror),
        authenticated_registry_credentials_uri=f"file://{tmp_path}/auth.json",
    )

    assert Pull(client).resolve(push_to_both(registry, mirror)).image_id == SHOP.image_id
    assert registry.requests == []
