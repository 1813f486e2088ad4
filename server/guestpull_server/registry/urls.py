"""What may be said of an URL, or of a host, that somebody else names."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit


def is_loopback(host: str) -> bool:
    """Whether `host[:port]` is this machine: localhost, 127.0.0.0/8 or ::1."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_usable(url: SplitResult) -> bool:
    """Whether an URL can be asked: http or https, a host, and no credentials in it.

    Raises:
        ValueError: its host or its port is none.
    """
    return url.scheme in ("http", "https") and bool(url.hostname) and url.username is None and url.port != 0


def origin(url: str) -> tuple[str, str | None, int]:
    """Scheme, host and port: the one place that what authenticates us may be sent to."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (80 if parts.scheme == "http" else 443)
