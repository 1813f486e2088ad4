"""Which proxy a request goes through: the configuration's (`image_pull_proxy`), else the environment's.

As with podman and containerd, HTTPS_PROXY, HTTP_PROXY and NO_PROXY of the daemon's own environment count where
the configuration has no `image_pull_proxy`. This machine itself is never reached through a proxy.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from guestpull_server.config import Configuration
from guestpull_server.errors import InvalidConfiguration
from guestpull_server.registry.urls import is_loopback


class Proxies:
    """The proxies, by scheme, and the hosts that need none.

    Raises:
        InvalidConfiguration: a proxy is no http:// or https:// URL.
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
        """The proxy's URL for an URL; None: go there directly."""
        parts = urlsplit(url)
        proxy = self._by_scheme.get(parts.scheme)
        if proxy is None or is_loopback(parts.netloc):
            return None
        name = parts.hostname or ""
        return None if any(_names(entry, name, parts.netloc.lower()) for entry in self._excepted) else proxy


def _checked(proxy: str, scheme: str) -> str:
    url = proxy if "://" in proxy else f"http://{proxy}"  # host:port is what many a proxy variable says
    try:
        usable = urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname)
    except ValueError:
        usable = False
    if not usable:
        # no repr of it: it may hold a password
        raise InvalidConfiguration("the configuration", f"{scheme}_proxy", "it is no http(s):// URL")
    return url


def _names(entry: str, name: str, netloc: str) -> bool:
    """Whether an entry of no_proxy means a host: `*`, a host[:port], a domain, an address or a network."""
    domain = entry.removeprefix("*").removeprefix(".")
    if entry == "*" or domain in (name, netloc) or name.endswith(f".{domain}"):
        return True
    try:
        return ipaddress.ip_address(name) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
