"""The configuration: image-rs's keys and ours, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from guestpull_server.config import Configuration, load_configuration
from guestpull_server.errors import InvalidConfiguration


def load(directory: Path, content: object) -> tuple[Configuration, list[str]]:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "config.json").write_bytes(os.fsencode(text))
    return load_configuration(None, str(directory))


def test_without_a_file_the_defaults_apply(tmp_path: Path) -> None:
    configuration, warnings = load_configuration(None, str(tmp_path))

    assert configuration == Configuration(work_dir=str(tmp_path))
    assert warnings == []


def test_image_rs_s_keys_are_read_with_their_meanings(tmp_path: Path) -> None:
    configuration, warnings = load(
        tmp_path,
        {
            "work_dir": "/elsewhere",
            "default_snapshot": "overlay",
            "max_concurrent_layer_downloads_per_image": 7,
            "registry_config": {
                "unqualified-search-registries": ["docker.io"],
                "registry": [
                    {"prefix": "a.example", "location": "b.example", "mirror": [{"location": "c.example"}]}
                ],
            },
            "image_pull_proxy": {"https_proxy": "http://proxy:3128", "no_proxy": "localhost"},
            "extra_root_certificates": [],
        },
    )

    assert warnings == []
    assert configuration.work_dir == str(tmp_path), "the command line's wins"
    assert configuration.max_concurrent_layer_downloads_per_image == 7
    assert configuration.registry_config is not None
    assert configuration.registry_config.registry[0].mirror[0].location == "c.example"
    assert configuration.image_pull_proxy is not None


def test_an_unknown_key_at_any_level_is_a_warning_that_names_it(tmp_path: Path) -> None:
    registries = {"registry": [{"prefix": "a.example"}, {"prefix": "b.example", "blokced": True}]}
    content = {"future": 1, "limits": {"max_wishes": 3}, "registry_config": registries}
    _, warnings = load(tmp_path, content)

    assert [warning.split(": ")[1] for warning in warnings] == [
        "unknown key future is ignored",
        "unknown key limits.max_wishes is ignored",
        "unknown key registry_config.registry[1].blokced is ignored",
    ]


def test_a_key_that_changes_nothing_yet_is_a_warning(tmp_path: Path) -> None:
    _, warnings = load(tmp_path, {"sigstore_config_uri": "file:///etc/containers/registries.d"})

    assert warnings == [f"{tmp_path}/config.json: sigstore_config_uri is not used yet"]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"limits": {"max_layers": "many"}}, "limits.max_layers"),
        ({"registry_config": {"registry": [{"insecure": "yes"}]}}, "registry_config.registry"),
        ({"default_snapshot": "devmapper"}, "default_snapshot"),
        ("{", ""),
        ("[]", ""),
        ('{"work_dir": "/\udcff"}', "not JSON"),
        ('{"\udcff": 1}', "not JSON"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
        ({"additional_stores": ["/a\0b"]}, "NUL"),
        ({"work_dir": ""}, "work_dir"),
        ({"additional_stores": ["/a", "b"]}, "additional_stores"),
        ({"bundle_roots": ["bundles"]}, "bundle_roots"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_place(tmp_path: Path, content: object, place: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        load(tmp_path, content)

    assert place in caught.value.explain()


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="does not exist"):
        load_configuration(str(tmp_path / "none.json"), None)


def policy(default: str, **transports: str) -> str:
    document: dict[str, Any] = {"default": [{"type": default}]}
    document["transports"] = {"docker": {scope: [{"type": one}] for scope, one in transports.items()}}
    return json.dumps(document)


def test_a_policy_that_accepts_anything_is_accepted(tmp_path: Path) -> None:
    load(tmp_path, {"image_security_policy": policy("insecureAcceptAnything")})


@pytest.mark.parametrize(
    "demanded", [policy("reject"), policy("insecureAcceptAnything", example="signedBy"), "{"]
)
def test_a_policy_that_cannot_be_enforced_is_refused(tmp_path: Path, demanded: str) -> None:
    file = tmp_path / "policy.json"
    file.write_text(demanded)

    for content in ({"image_security_policy": demanded}, {"image_security_policy_uri": f"file://{file}"}):
        with pytest.raises(InvalidConfiguration):
            load(tmp_path, content)


def test_a_proxy_s_password_is_not_shown(tmp_path: Path) -> None:
    configuration, _ = load(tmp_path, {"image_pull_proxy": {"https_proxy": "http://ann:s3cr3t@proxy:3128"}})

    assert "http://ann:***@proxy:3128" in repr(configuration)


def test_a_policy_of_a_key_broker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="kbs"):
        load(tmp_path, {"image_security_policy_uri": "kbs:///default/policy/1"})


@pytest.mark.parametrize("limit", ["max_attempts", "max_concurrent_pulls", "max_layers", "read_timeout"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_out_of_range_is_refused_with_its_place(tmp_path: Path, limit: str, value: int) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        load(tmp_path, {"limits": {limit: value}})

    assert caught.value.place == f"$.limits.{limit}"


@pytest.mark.parametrize("limit", ["connect_timeout", "read_timeout", "max_retry_delay", "max_pull_seconds"])
def test_a_time_that_is_too_long_is_refused_with_its_place(tmp_path: Path, limit: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        load(tmp_path, {"limits": {limit: 10_000_000_000}})

    assert caught.value.place == f"$.limits.{limit}"


def test_an_image_downloads_one_layer_at_once_at_least(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="max_concurrent_layer_downloads_per_image"):
        load(tmp_path, {"max_concurrent_layer_downloads_per_image": 0})


def test_no_redirects_and_any_speed_can_be_configured(tmp_path: Path) -> None:
    configuration, _ = load(
        tmp_path, {"limits": {"max_redirects": 0, "min_bytes_per_second": 0, "max_retry_delay": 0}}
    )

    assert configuration.limits.max_redirects == 0
