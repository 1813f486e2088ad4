"""Kata's CreateContainerRequest, in the spellings that occur."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_client import InvalidArgument
from guestpull_client.agent.request import check_container_id, container_of_request
from guestpull_client.agent.spec import JsonObject

STORAGE: JsonObject = {
    "driver": "image_guest_pull",
    "driver_options": ['image_guest_pull={"metadata":{"io.kubernetes.cri.image-name":"shop"}}'],
    "source": "registry.example.com/shop:1.0",
    "fstype": "overlay",
    "options": [],
    "mount_point": "/run/kata-containers/c1/rootfs",
}


def request(**changes: object) -> str:
    return json.dumps(
        {"container_id": "c1", "storages": [STORAGE], "OCI": {"Process": {"Args": ["x"]}}} | changes
    )


def test_the_image_is_the_source_of_the_guest_pull_storage() -> None:
    container, warnings = container_of_request(request())

    assert container.container_id == "c1"
    assert container.image == "registry.example.com/shop:1.0"
    assert container.metadata == {"io.kubernetes.cri.image-name": "shop"}
    assert container.specification == {"process": {"args": ["x"]}}
    assert warnings == ()


def test_protobuf_s_camel_case_is_read_as_well() -> None:
    storage = {
        "driver": "image_guest_pull",
        "driverOptions": ['image_guest_pull={"metadata":{}}'],
        "source": "shop",
        "mountPoint": "/x",
    }

    container, _ = container_of_request(json.dumps({"containerId": "c2", "storages": [storage], "OCI": {}}))

    assert (container.container_id, container.image) == ("c2", "shop")


def test_other_storages_are_skipped_with_a_warning() -> None:
    other: JsonObject = {"driver": "local", "mount_point": "/run/kata-containers/sandbox/emptydir"}

    _, warnings = container_of_request(request(storages=[other, STORAGE]))

    assert warnings == (
        "skipped storage '/run/kata-containers/sandbox/emptydir': driver 'local' is not supported",
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"OCI":' + '{"a":' * 900 + "1" + "}" * 901, "not JSON"),
        ("[]", "not a JSON object"),
        (request(storages=[]), "0 storages of driver image_guest_pull"),
        (request(storages=[STORAGE, STORAGE]), "2 storages of driver image_guest_pull"),
        (request(storages=["x"]), "a storage is not a JSON object"),
        (request(storages=[{**STORAGE, "source": ""}]), "no source"),
        (request(storages=[{**STORAGE, "driver_options": []}]), "no driver option"),
        (request(storages=[{**STORAGE, "driver_options": ["image_guest_pull={"]}]), "driver option"),
        (request(storages=[{**STORAGE, "driver_options": ["image_guest_pull=[]"]}]), "no driver option"),
    ],
)
def test_an_invalid_request_is_refused_with_the_reason(text: str, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        container_of_request(text)


@pytest.mark.parametrize("container_id", ["", "a", "../x", ".x", "-x", "a/b", "a b", "a\n", "x" * 201])
def test_a_container_id_that_could_lead_elsewhere_is_refused(container_id: str) -> None:
    with pytest.raises(InvalidArgument):
        check_container_id(container_id)


@pytest.mark.parametrize("container_id", ["c1", "0a", "a.b_c-d", "f" * 64])
def test_kata_s_container_ids_are_taken(container_id: str) -> None:
    assert check_container_id(container_id) == container_id


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)
FIELDS = st.sampled_from(["container_id", "storages", "OCI", "driver", "driver_options", "source"])


@given(st.dictionaries(FIELDS, JSON | st.lists(st.dictionaries(FIELDS, JSON, max_size=4), max_size=2)))
def test_any_json_is_a_container_or_an_error_that_says_why(document: dict[str, object]) -> None:
    try:
        container, _ = container_of_request(json.dumps(document))
    except InvalidArgument as error:
        assert error.reason in {"INVALID_CONTAINER_REQUEST", "INVALID_CONTAINER_ID"}  # noqa: PT017
    else:
        assert container.image
