"""A sandbox gets the guest's own pause image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guestpull_client import FailedPrecondition
from guestpull_client.agent.pause import is_sandbox, unpack_pause_image


@pytest.mark.parametrize(
    "metadata",
    [{"io.kubernetes.cri.container-type": "sandbox"}, {"io.kubernetes.cri-o.ContainerType": "sandbox"}],
)
def test_both_runtimes_words_for_a_sandbox_are_known(metadata: dict[str, str]) -> None:
    assert is_sandbox(metadata)


@pytest.mark.parametrize("metadata", [{}, {"io.kubernetes.cri.container-type": "container"}])
def test_anything_else_is_not_a_sandbox(metadata: dict[str, str]) -> None:
    assert not is_sandbox(metadata)


def pause_bundle(at: Path, arguments: list[str]) -> str:
    (at / "rootfs").mkdir(parents=True)
    (at / "rootfs/pause").write_bytes(b"program")
    (at / "config.json").write_text(json.dumps({"process": {"args": arguments}}))
    return str(at)


def test_the_pause_image_is_its_config_and_its_one_program(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"

    rootfs = unpack_pause_image(pause_bundle(tmp_path / "pause", ["/pause"]), str(bundle))

    assert rootfs == str(bundle / "rootfs")
    assert (bundle / "rootfs/pause").read_bytes() == b"program"
    assert json.loads((bundle / "config.json").read_text()) == {"process": {"args": ["/pause"]}}


@pytest.mark.parametrize("arguments", [[], ["../../etc/passwd"], ["/nothing"]])
def test_a_pause_image_that_cannot_be_used_is_named(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(FailedPrecondition, match="pause"):
        unpack_pause_image(pause_bundle(tmp_path / "pause", arguments), str(tmp_path / "bundle"))


def test_a_guest_without_a_pause_image_says_so(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"config\.json"):
        unpack_pause_image(str(tmp_path / "none"), str(tmp_path / "bundle"))
