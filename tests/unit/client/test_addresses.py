"""Where the service may be."""

from __future__ import annotations

import pytest

from guestpull_client.addresses import target_of
from guestpull_client.errors import InvalidArgument


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("unix:///run/g.sock", "unix:/run/g.sock"),
        ("unix:/run/g.sock", "unix:/run/g.sock"),
        ("unix:///run/100%/a#b?\udcff", "unix:/run/100%25/a%23b%3F%FF"),
        ("127.0.0.1:5000", "dns:127.0.0.1:5000"),
        ("tcp://127.0.0.1:5000", "dns:127.0.0.1:5000"),
        ("[::1]:5000", "dns:[::1]:5000"),
        ("guest-7.example.com:443", "dns:guest-7.example.com:443"),
    ],
)
def test_addresses_are_unix_sockets_or_hosts_with_ports(address: str, target: str) -> None:
    assert target_of(address) == target


def test_a_relative_socket_is_below_the_current_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")

    assert target_of("unix:g.sock") == "unix:/usr/g.sock"


@pytest.mark.parametrize(
    "address",
    ["", "unix:", "unix://", "host", "host:", "host:70000", "http://h:1", "a b:1", f"unix:///{'x' * 107}"],
)
def test_an_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument):
        target_of(address)
