"""Kata's spelling of a runtime spec -> the runtime specification's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_client.agent.spec import JsonObject, camel, normalised

GO_SPELLING = {
    "Args": "args",
    "UID": "uid",
    "AdditionalGids": "additionalGids",
    "OOMScoreAdj": "oomScoreAdj",
    "NoNewPrivileges": "noNewPrivileges",
    "UIDMappings": "uidMappings",
    "HostID": "hostID",
    "CPU": "cpu",
    "BlockIO": "blockIO",
    "IntelRdt": "intelRdt",
}


@pytest.mark.parametrize(("spelled", "name"), GO_SPELLING.items())
def test_go_s_names_become_the_specification_s(spelled: str, name: str) -> None:
    assert camel(spelled) == name


@pytest.mark.parametrize(
    ("spelled", "name"),
    [("container_id", "containerId"), ("no_new_privileges", "noNewPrivileges"), ("type_", "type")],
)
def test_snake_case_becomes_camel_case(spelled: str, name: str) -> None:
    assert camel(spelled) == name


@pytest.mark.parametrize("name", [*GO_SPELLING.values(), "containerId", "driverOptions", "ociVersion"])
def test_right_names_stay(name: str) -> None:
    assert camel(name) == name


@given(st.text(max_size=30))
def test_spelling_is_done_once(name: str) -> None:
    assert camel(camel(name)) == camel(name)


def test_keys_that_users_chose_stay_as_they_are() -> None:
    chosen: JsonObject = {"io.kubernetes.cri.container_type": "1", "Upper_Case": "2"}

    assert normalised({"Annotations": chosen, "Linux": {"Sysctl": chosen}}) == {
        "annotations": chosen,
        "linux": {"sysctl": chosen},
    }


def test_absent_parts_are_left_out_at_any_depth() -> None:
    assert normalised(
        {"Hooks": None, "Linux": {"Seccomp": None, "Devices": [{"Path": "/dev/x", "GID": None}]}}
    ) == {"linux": {"devices": [{"path": "/dev/x"}]}}


def test_protobuf_s_64_bit_numbers_become_numbers_where_numbers_belong() -> None:
    document: JsonObject = {
        "Process": {"Args": ["5"], "Rlimits": [{"Type": "RLIMIT_NOFILE", "Hard": "1024", "Soft": "512"}]},
        "Linux": {"Resources": {"Memory": {"Limit": "-1"}, "CPU": {"Cpus": "0", "Quota": "5"}}},
    }

    assert normalised(document) == {
        "process": {"args": ["5"], "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}]},
        "linux": {"resources": {"memory": {"limit": -1}, "cpu": {"cpus": "0", "quota": 5}}},
    }
