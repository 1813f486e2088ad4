"""Checks of URLs and hosts from untrusted input."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit


def is_loopback(host: str) -> bool:
    """Whether `host[:port]` is loopback: localhost, 127.0.0.0/8 or ::1."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_usable(url: SplitResult) -> bool:
    """Whether a URL can be requested: http or https, with a host, without credentials.

    Raises:
        ValueError: the host or the port is invalid.
    """
    return url.scheme in ("http", "https") and bool(url.hostname) and url.username is None and url.port != 0


def origin(url: str) -> tuple[str, str | None, int]:
    """Return scheme, host and port. Credentials may be sent to the same origin only."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (80 if parts.scheme == "http" else 443)
