"""HTTP proxies from the configuration (`image_pull_proxy`) or the environment.

As in podman and containerd, HTTPS_PROXY, HTTP_PROXY and NO_PROXY of the daemon's environment apply if the
configuration has no `image_pull_proxy`. Loopback is never reached through a proxy.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from guestpull_server.config import Configuration
from guestpull_server.errors import InvalidConfiguration
from guestpull_server.registry.urls import is_loopback


class Proxies:
    """The proxies by scheme, and the hosts to connect to directly.

    Raises:
        InvalidConfiguration: a proxy is not an http:// or https:// URL.
    """

    def __init__(self, configuration: Configuration) -> None:
        configured = configuration.image_pull_proxy
        if configured is None:
            environment = getproxies_environment()
            found = {scheme: environment.get(scheme) for scheme in ("https", "http")}
            no_proxy = environment.get("no", "")
        else:
            found = {"https": configured.https_proxy, "http": configured.http_proxy}
            no_proxy = configured.no_proxy or ""
        self._by_scheme = {scheme: _checked(proxy, scheme) for scheme, proxy in found.items() if proxy}
        self._excepted = [name.strip().lower() for name in no_proxy.split(",") if name.strip()]

    def for_url(self, url: str) -> str | None:
        """Return the proxy for a URL; None to connect directly."""
        parts = urlsplit(url)
        proxy = self._by_scheme.get(parts.scheme)
        if proxy is None or is_loopback(parts.netloc):
            return None
        name = parts.hostname or ""
        return None if any(_names(entry, name, parts.netloc.lower()) for entry in self._excepted) else proxy


def _checked(proxy: str, scheme: str) -> str:
    url = proxy if "://" in proxy else f"http://{proxy}"  # variables often have host:port only
    try:
        usable = urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname)
    except ValueError:
        usable = False
    if not usable:
        # do not show the value, which can contain a password
        raise InvalidConfiguration(
            "the configuration", f"{scheme}_proxy", "expected an http:// or https:// URL"
        )
    return url


def _names(entry: str, name: str, netloc: str) -> bool:
    """Whether an entry of no_proxy (`*`, host[:port], domain, address or network) matches a host."""
    domain = entry.removeprefix("*").removeprefix(".")
    if entry == "*" or domain in (name, netloc) or name.endswith(f".{domain}"):
        return True
    try:
        return ipaddress.ip_address(name) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
