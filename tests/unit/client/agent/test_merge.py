"""The pod's specification and the image's: who wins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_client.agent.merge import merged_specification
from guestpull_client.agent.spec import JsonObject, part, texts

IMAGE: JsonObject = {
    "ociVersion": "1.0.2",
    "process": {
        "args": ["/bin/serve"],
        "env": ["PATH=/usr/bin", "MODE=image"],
        "cwd": "/srv",
        "user": {"uid": 1000, "gid": 1000, "additionalGids": [7]},
        "capabilities": {"bounding": ["CAP_CHOWN"]},
        "terminal": False,
    },
    "root": {"path": "rootfs", "readonly": False},
    "hostname": "guestpull",
    "mounts": [{"destination": "/proc"}],
    "linux": {"namespaces": [{"type": "pid"}], "maskedPaths": ["/proc/kcore"]},
}


def process_of(pod: JsonObject) -> JsonObject:
    return part(merged_specification({"process": pod}, IMAGE, "/b/rootfs"), "process")


def test_the_pod_s_arguments_win() -> None:
    assert process_of({"args": ["echo", "x"]})["args"] == ["echo", "x"]


@pytest.mark.parametrize("pod", [{}, {"args": []}])
def test_the_image_s_arguments_are_used_where_the_pod_has_none(pod: JsonObject) -> None:
    assert process_of(pod)["args"] == ["/bin/serve"]


@pytest.mark.parametrize(
    ("pod", "merged"),
    [({}, "/srv"), ({"cwd": "/"}, "/srv"), ({"cwd": ""}, "/srv"), ({"cwd": "/pod"}, "/pod")],
)
def test_the_pod_s_directory_wins_unless_it_is_the_root(pod: JsonObject, merged: str) -> None:
    assert process_of(pod)["cwd"] == merged


def test_the_image_s_variables_come_after_the_pod_s_and_never_replace_them() -> None:
    assert process_of({"env": ["MODE=pod", "B=1"]})["env"] == ["MODE=pod", "B=1", "PATH=/usr/bin"]


def test_a_variable_whose_name_contains_another_s_does_not_hide_it() -> None:
    assert "PATH=/usr/bin" in texts(process_of({"env": ["LD_LIBRARY_PATH=/lib"]}), "env")


variables = st.lists(st.tuples(st.sampled_from("ABC"), st.text("xyz", max_size=2)).map("=".join), max_size=5)


@given(variables, variables)
def test_every_variable_is_set_and_the_pod_s_are_as_the_pod_says(pod: list[str], image: list[str]) -> None:
    merged = texts(
        part(
            merged_specification({"process": {"env": [*pod]}}, {"process": {"env": [*image]}}, "/r"),
            "process",
        ),
        "env",
    )

    assert merged[: len(pod)] == pod
    assert {one[0] for one in merged} == {one[0] for one in [*pod, *image]}
    assert not {one[0] for one in merged[len(pod) :]} & {one[0] for one in pod}


def test_the_pod_s_user_is_the_container_s() -> None:
    assert process_of({"user": {"uid": 5, "gid": 6}})["user"] == {"uid": 5, "gid": 6}


def test_a_user_whose_zeros_protobuf_left_out_is_root() -> None:
    assert process_of({"user": {}})["user"] == {"uid": 0, "gid": 0}


def test_a_pod_without_a_user_gets_the_image_s() -> None:
    assert process_of({})["user"] == {"uid": 1000, "gid": 1000, "additionalGids": [7]}


def test_the_root_is_the_pulled_one_wherever_the_pod_says() -> None:
    merged = merged_specification({"root": {"path": "/elsewhere", "readonly": True}}, IMAGE, "/b/rootfs")

    assert merged["root"] == {"path": "/b/rootfs", "readonly": True}


def test_parts_in_the_pod_s_specification_replace_the_service_s() -> None:
    pod: JsonObject = {
        "hostname": "pod",
        "mounts": [{"destination": "/sys"}],
        "linux": {"namespaces": [{"type": "mount"}], "cgroupsPath": "/pod"},
        "version": "9",
    }

    merged = merged_specification(pod, IMAGE, "/b/rootfs")

    assert (merged["hostname"], merged["mounts"]) == ("pod", [{"destination": "/sys"}])
    assert merged["linux"] == {
        "namespaces": [{"type": "mount"}],
        "cgroupsPath": "/pod",
        "maskedPaths": ["/proc/kcore"],
    }
    assert merged["ociVersion"] == "1.0.2"


def test_merging_changes_neither_side() -> None:
    pod: JsonObject = {"process": {"args": ["x"]}}

    merged_specification(pod, IMAGE, "/b/rootfs")

    assert pod == {"process": {"args": ["x"]}}
    assert part(IMAGE, "process")["args"] == ["/bin/serve"]
