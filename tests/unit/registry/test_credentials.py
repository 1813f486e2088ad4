"""containers-auth.json: who we are at which registry."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from guestpull_server.config import Configuration
from guestpull_server.errors import InvalidConfiguration
from guestpull_server.models import Credentials
from guestpull_server.registry.credentials import CredentialsFile
from guestpull_server.registry.endpoints import Endpoint


def auth(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


def find(tmp_path: Path, auths: object, name: str) -> Credentials | None:
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"auths": auths, "credsStore": "secretservice"}))
    configuration = Configuration(authenticated_registry_credentials_uri=f"file://{file}")
    host, _, repository = name.partition("/")
    return CredentialsFile(configuration).find(Endpoint(name, host, repository))


@pytest.mark.parametrize(
    ("key", "name", "found"),
    [
        ("quay.io", "quay.io/org/img", True),
        ("quay.io/org", "quay.io/org/img", True),
        ("quay.io/org/img", "quay.io/org/img", True),
        ("quay.io/or", "quay.io/org/img", False),
        ("quay.io:443", "quay.io/img", False),
        ("https://quay.io", "quay.io/img", True),
        ("https://quay.io/v2/", "quay.io/img", True),
        ("https://index.docker.io/v1/", "docker.io/library/busybox", True),
        ("docker.io", "docker.io/library/busybox", True),
        ("host:5000", "host:5000/img", True),
        ("quay.io/org", "QUAY.io/org/img", True),
        ("https://Quay.io", "quay.io/img", True),
    ],
)
def test_what_an_entry_is_for(tmp_path: Path, key: str, name: str, found: bool) -> None:
    assert (find(tmp_path, {key: auth("alice:secret")}, name) is not None) is found


def test_the_longest_name_wins(tmp_path: Path) -> None:
    auths = {"quay.io": auth("a:1"), "quay.io/org/img": auth("c:3"), "quay.io/org": auth("b:2")}
    assert find(tmp_path, auths, "quay.io/org/img") == Credentials("c", "3")
    assert find(tmp_path, auths, "quay.io/org/other") == Credentials("b", "2")


def test_a_password_may_have_colons(tmp_path: Path) -> None:
    assert find(tmp_path, {"quay.io": auth("alice:a:b")}, "quay.io/img") == Credentials("alice", "a:b")


def test_an_entry_whose_secret_is_elsewhere_is_none(tmp_path: Path) -> None:
    assert find(tmp_path, {"quay.io": {}}, "quay.io/img") is None


def test_without_a_file_there_are_no_credentials() -> None:
    assert CredentialsFile(Configuration()).find(Endpoint("quay.io/img", "quay.io", "img")) is None


@pytest.mark.parametrize("secret", ["hunter2", "!!hunter2", base64.b64encode(b"hunter2").decode()])
def test_an_entry_that_cannot_be_read_is_an_error_that_keeps_the_secret(tmp_path: Path, secret: str) -> None:
    with pytest.raises(InvalidConfiguration) as raised:
        find(tmp_path, {"quay.io": {"auth": secret}}, "quay.io/img")
    assert secret not in str(raised.value)


def test_a_file_that_cannot_be_read_is_an_error_that_keeps_the_secret(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration) as raised:
        find(tmp_path, {"quay.io": "hunter2"}, "quay.io/img")
    assert "hunter2" not in str(raised.value)
