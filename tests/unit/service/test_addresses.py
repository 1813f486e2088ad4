"""Parsing the addresses of --listen."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.service.addresses import TcpAddress, UnixAddress, parse_address


@pytest.mark.parametrize("text", ["unix:///run/a.sock", "unix:/run/a.sock"])
def test_a_unix_socket_is_an_absolute_path(text: str) -> None:
    assert parse_address(text) == UnixAddress("/run/a.sock")


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("127.0.0.1:50051", True),
        ("tcp://127.8.9.1:1", True),
        ("localhost:0", True),
        ("[::1]:80", True),
        ("0.0.0.0:80", False),
        ("[::]:80", False),
        ("192.0.2.1:80", False),
        ("example.com:80", False),
    ],
)
def test_only_loopback_addresses_are_local(text: str, loopback: bool) -> None:
    address = parse_address(text)
    assert isinstance(address, TcpAddress)
    assert address.is_loopback is loopback


@pytest.mark.parametrize(
    "text", ["", "unix:", "unix://relative", "unix:///run/", "/run/a.sock", "127.0.0.1", "host:99999", ":80"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_address(text)


def test_a_path_that_is_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(ValueError, match="107"):
        parse_address("unix:///" + "a" * 107)


@given(st.text())
def test_any_text_is_parsed_or_raises_valueerror(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_address(text)
