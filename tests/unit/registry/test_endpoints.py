"""containers-registries.conf: where a reference's image is fetched from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from guestpull_server.config import Configuration, RegistryConfig
from guestpull_server.errors import InvalidConfiguration, InvalidReference, RegistryBlocked
from guestpull_server.registry import Reference
from guestpull_server.registry.endpoints import Endpoint, Endpoints

DIGEST = "sha256:" + "0" * 64


def endpoints(entries: Sequence[Mapping[str, object]], reference: str) -> list[Endpoint]:
    config = msgspec.convert({"registry": entries}, type=RegistryConfig)
    return list(Endpoints(Configuration(registry_config=config)).of(Reference.parse(reference)))


def names(entries: Sequence[Mapping[str, object]], reference: str) -> list[str]:
    return [one.name for one in endpoints(entries, reference)]


def test_without_configuration_the_reference_says_where() -> None:
    assert endpoints([], "quay.io/org/img") == [Endpoint("quay.io/org/img", "quay.io", "org/img")]


def test_docker_hub_has_an_api_of_another_name() -> None:
    assert endpoints([], "busybox") == [
        Endpoint("docker.io/library/busybox", "registry-1.docker.io", "library/busybox")
    ]


def test_a_location_replaces_the_prefix() -> None:
    entry = {"prefix": "quay.io/org", "location": "internal.example:5000/copies"}
    assert names([entry], "quay.io/org/team/img") == ["internal.example:5000/copies/team/img"]


def test_a_prefix_alone_leaves_the_name() -> None:
    assert endpoints([{"prefix": "quay.io", "insecure": True}], "quay.io/img")[0].insecure


def test_a_location_alone_is_the_prefix() -> None:
    assert endpoints([{"location": "quay.io", "insecure": True}], "quay.io/img")[0].insecure


@pytest.mark.parametrize(
    ("prefix", "reference", "matches"),
    [
        ("quay.io", "quay.io/img", True),
        ("quay.io", "quay.io:443/img", True),
        ("quay.io", "quay.iox/img", False),
        ("quay.io/org", "quay.io/org/img", True),
        ("quay.io/org", "quay.io/organisation/img", False),
        ("quay.io/org/img", "quay.io/org/img:1.0", True),
        ("*.example.com", "a.b.example.com/img", True),
        ("*.example.com", "a.example.com:5000/img", True),
        ("*.example.com", "example.com/img", False),
        ("*.example.com", "badexample.com/img", False),
        ("docker.io", "busybox", True),
        ("quay.io", "QUAY.io/img", True),
        ("Quay.io/org", "quay.IO:443/org/img", False),
        ("Quay.io/org", "quay.IO/org/img", True),
        ("*.Example.com", "A.EXAMPLE.com/img", True),
    ],
)
def test_what_a_prefix_matches(prefix: str, reference: str, matches: bool) -> None:
    found = endpoints([{"prefix": prefix, "insecure": True}], reference)
    assert found[0].insecure is matches


def test_the_longest_prefix_wins() -> None:
    entries: list[dict[str, object]] = [
        {"prefix": "quay.io", "location": "short.example"},
        {"prefix": "quay.io/org", "location": "long.example"},
        {"prefix": "*.io", "location": "wild.example"},
    ]
    assert names(entries, "quay.io/org/img") == ["long.example/img"]
    assert names(entries, "quay.io/img") == ["short.example/img"]
    assert names(entries, "gcr.io/img") == ["wild.example/img"]


def test_mirrors_come_first_in_their_order() -> None:
    entry: dict[str, object] = {
        "prefix": "docker.io",
        "location": "docker.io",
        "mirror": [{"location": "one.example/hub", "insecure": True}, {"location": "two.example"}],
    }
    assert endpoints([entry], "busybox") == [
        Endpoint("one.example/hub/library/busybox", "one.example", "hub/library/busybox", True, True),
        Endpoint("two.example/library/busybox", "two.example", "library/busybox", False, True),
        Endpoint("docker.io/library/busybox", "registry-1.docker.io", "library/busybox"),
    ]


@pytest.mark.parametrize(
    ("entry", "mirror", "by_tag", "by_digest"),
    [
        ({}, {}, True, True),
        ({"mirror-by-digest-only": True}, {}, False, True),
        ({}, {"pull-from-mirror": "digest-only"}, False, True),
        ({}, {"pull-from-mirror": "tag-only"}, True, False),
    ],
)
def test_a_mirror_is_asked_only_for_what_it_is_meant_for(
    entry: dict[str, object], mirror: dict[str, object], by_tag: bool, by_digest: bool
) -> None:
    config = [{"location": "quay.io", "mirror": [{"location": "m.example"} | mirror]} | entry]
    assert len(endpoints(config, "quay.io/img:1.0")) == 1 + by_tag
    assert len(endpoints(config, f"quay.io/img@{DIGEST}")) == 1 + by_digest


def test_a_blocked_registry_is_refused_with_what_blocks_it() -> None:
    with pytest.raises(RegistryBlocked) as raised:
        endpoints([{"prefix": "quay.io/bad", "blocked": True}], "quay.io/bad/img")
    assert raised.value.prefix == "quay.io/bad"


def test_a_slash_at_the_end_of_a_name_is_left_out() -> None:
    with pytest.raises(RegistryBlocked):
        endpoints([{"prefix": "quay.io/", "blocked": True}], "quay.io/img")
    entry = {"location": "quay.io", "mirror": [{"location": "m.example/copies/"}]}
    assert names([entry], "quay.io/img") == ["m.example/copies/img", "quay.io/img"]


@pytest.mark.parametrize(
    "entry",
    [
        {"blocked": True},
        {"prefix": "https://quay.io", "blocked": True},
        {"location": "http://quay.io"},
        {"location": "quay.io", "mirror": [{"location": "https://m.example"}]},
    ],
)
def test_an_entry_that_is_for_nothing_is_refused(entry: dict[str, object]) -> None:
    with pytest.raises(InvalidConfiguration) as raised:
        endpoints([{"prefix": "fine.example"}, entry], "busybox")
    assert raised.value.place == "registry_config.registry[1]"


def test_a_blocked_registry_is_refused_however_its_name_is_written() -> None:
    with pytest.raises(RegistryBlocked):
        endpoints([{"prefix": "quay.io", "blocked": True}], "QUAY.IO/img")


@pytest.mark.parametrize("location", ["no-registry", "UPPER.example/Path", "[::/x", "host:99999", "/"])
def test_a_location_that_makes_no_reference_is_refused(location: str) -> None:
    with pytest.raises(InvalidReference, match="location"):
        endpoints([{"prefix": "quay.io", "location": location}], "quay.io/img")


def test_a_registries_conf_file_counts_the_same(tmp_path: Path) -> None:
    file = tmp_path / "registries.conf"
    file.write_text(
        """
        unqualified-search-registries = ["docker.io"]
        short-name-mode = "enforcing"

        [[registry]]
        prefix = "quay.io"
        location = "internal.example"
        [[registry.mirror]]
        location = "mirror.example"
        pull-from-mirror = "digest-only"
        """
    )
    found = Endpoints(Configuration(registry_configuration_uri=f"file://{file}"))
    assert [one.name for one in found.of(Reference.parse(f"quay.io/img@{DIGEST}"))] == [
        "mirror.example/img",
        "internal.example/img",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("registry = 1", "array"),
        ("[[registry]", "invalid TOML"),
        ("[[registry]]\ninsecure = 'yes'", "bool"),
        ("\x00", "TOML"),
    ],
)
def test_a_registries_conf_file_that_is_wrong_is_named(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "registries.conf"
    file.write_text(text)
    with pytest.raises(InvalidConfiguration, match=problem) as raised:
        Endpoints(Configuration(registry_configuration_uri=f"file://{file}"))
    assert raised.value.path == str(file)


@pytest.mark.parametrize(
    "uri",
    ["kbs:///default/registries/conf", "file://host/etc/x", "/etc/x", "file:", "http://[::", "file:///%00"],
)
def test_only_files_are_read(uri: str) -> None:
    with pytest.raises(InvalidConfiguration, match="registry_configuration_uri"):
        Endpoints(Configuration(registry_configuration_uri=uri))


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidConfiguration, match="No such file"):
        Endpoints(Configuration(registry_configuration_uri="file:///nonexistent/registries.conf"))
