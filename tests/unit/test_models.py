"""The nouns: what is not shown of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.models import without_password

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
def test_what_has_no_password_is_shown_as_it_is(text: str) -> None:
    assert without_password(text) == text


@given(st.text(), st.text())
def test_no_password_is_shown_wherever_it_has_an_at_sign(before: str, after: str) -> None:
    assert "s3cr3t" not in without_password(f"https://ann:{before}s3cr3t{after}@host/x")
