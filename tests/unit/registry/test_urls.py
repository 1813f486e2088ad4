"""URLs and hosts that somebody else names."""

from __future__ import annotations

import pytest

from guestpull_server.registry.urls import is_loopback, origin


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.0.0.1", True),
        ("127.8.9.1:5000", True),
        ("[::1]:5000", True),
        ("128.0.0.1", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("[::", False),
    ],
)
def test_what_is_this_machine(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://host/a", "https://host:443/b", True),
        ("http://host/a", "http://host:80/b", True),
        ("http://HOST/a", "http://host/b", True),
        ("http://host/a", "https://host/a", False),
        ("https://host/a", "https://host:444/a", False),
        ("https://host/a", "https://host.example/a", False),
    ],
)
def test_what_is_the_same_place(one: str, other: str, same: bool) -> None:
    assert (origin(one) == origin(other)) is same
