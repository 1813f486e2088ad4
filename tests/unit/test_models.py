"""The nouns: how they are read, and what is not shown of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.errors import InvalidRequest
from guestpull_server.models import Credentials, without_password

DIGEST = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ann:pw@host/x:1", "https://ann:***@host/x:1"),
        ("ann:pw@host:5000/x:1", "ann:***@host:5000/x:1"),
        ("ann:p@ss/w:rd@host/x", "ann:***@host/x"),
        ("https://token@host/x", "https://***@host/x"),
        (f"ann:pw@host/x@{DIGEST}", f"ann:***@host/x@{DIGEST}"),
        ("ann:p\nw@host", "ann:***@host"),
    ],
)
def test_a_password_in_a_name_is_not_shown(text: str, shown: str) -> None:
    assert without_password(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "busybox",
        "host:5000/x:1",
        f"host:5000/x:1@{DIGEST}",
        f"x@{DIGEST}",
        "x:1@sha256-bad",
        "a@b",
        "oci:/p:1",
    ],
)
def test_text_without_a_password_is_unchanged(text: str) -> None:
    assert without_password(text) == text


@given(st.text(), st.text())
def test_a_password_with_an_at_sign_is_hidden_completely(before: str, after: str) -> None:
    assert "s3cr3t" not in without_password(f"https://ann:{before}s3cr3t{after}@host/x")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("ann:pw", Credentials("ann", "pw")),
        ("ann:p:w", Credentials("ann", "p:w")),
        ("ann:", Credentials("ann", "")),
        ("", None),
    ],
)
def test_credentials_are_a_user_and_a_password_with_a_colon_between(
    text: str, read: Credentials | None
) -> None:
    assert Credentials.parse(text, "auth_info") == read


@pytest.mark.parametrize("text", ["s3cr3t", ":s3cr3t"])
def test_credentials_without_a_user_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InvalidRequest, match="no user") as caught:
        Credentials.parse(text, "--auth")
    assert "s3cr3t" not in caught.value.explain()
