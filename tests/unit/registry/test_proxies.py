"""Which proxy a request goes through."""

from __future__ import annotations

import pytest

from guestpull_server.config import Configuration, ProxyConfig
from guestpull_server.errors import InvalidConfiguration
from guestpull_server.registry.proxies import Proxies

PROXY = "http://proxy.example:3128"


def proxies(**settings: str) -> Proxies:
    return Proxies(Configuration(image_pull_proxy=ProxyConfig(**settings)))


def test_each_scheme_has_its_own() -> None:
    both = proxies(https_proxy=PROXY, http_proxy="http://other:1")
    assert both.for_url("https://quay.io/v2/") == PROXY
    assert both.for_url("http://quay.io/v2/") == "http://other:1"


@pytest.mark.parametrize("url", ["https://localhost/v2/", "https://127.0.0.1:5000/v2/", "https://[::1]/v2/"])
def test_this_machine_is_reached_directly(url: str) -> None:
    assert proxies(https_proxy=PROXY).for_url(url) is None


@pytest.mark.parametrize(
    ("no_proxy", "host", "direct"),
    [
        ("quay.io", "quay.io", True),
        ("quay.io", "cdn.quay.io", True),
        (".quay.io", "cdn.quay.io", True),
        ("*.quay.io", "cdn.quay.io", True),
        ("quay.io", "notquay.io", False),
        ("quay.io:5000", "quay.io:5000", True),
        ("quay.io:5000", "quay.io", False),
        ("a.example, QUAY.io ,b.example", "quay.io", True),
        ("*", "quay.io", True),
        ("10.0.0.0/8", "10.1.2.3:5000", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("fd00::/8", "[fd00::1]:5000", True),
        ("", "quay.io", False),
    ],
)
def test_what_no_proxy_means(no_proxy: str, host: str, direct: bool) -> None:
    found = proxies(https_proxy=PROXY, no_proxy=no_proxy).for_url(f"https://{host}/v2/")
    assert found == (None if direct else PROXY)


def test_the_environments_count_where_the_configuration_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", "quay.io")
    environment = Proxies(Configuration())
    assert environment.for_url("https://ghcr.io/v2/") == PROXY
    assert environment.for_url("https://quay.io/v2/") is None


def test_the_configuration_replaces_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    assert proxies(http_proxy=PROXY).for_url("https://quay.io/v2/") is None


def test_a_proxy_without_a_scheme_is_a_plain_one() -> None:
    assert proxies(https_proxy="proxy.example:3128").for_url("https://quay.io/v2/") == PROXY


@pytest.mark.parametrize("proxy", ["socks5://user:hunter2@proxy:1", "http://", "http://[::hunter2"])
def test_another_kind_of_proxy_is_an_error_that_keeps_its_password(proxy: str) -> None:
    with pytest.raises(InvalidConfiguration, match="https_proxy") as raised:
        proxies(https_proxy=proxy)
    assert "hunter2" not in str(raised.value)
