"""Addresses of the service: `unix:///path`, `unix:path` or `host:port`. Does not load gRPC, so --help is fast."""

from __future__ import annotations

import os
import re
from typing import Final
from urllib.parse import quote_from_bytes

from guestpull_client.errors import InvalidArgument

DEFAULT_ADDRESS: Final = "unix:///run/guestpull/guestpull.sock"
ADDRESS_VARIABLE: Final = "GUESTPULL_ADDRESS"

_MAX_SOCKET_PATH: Final = 107  # bytes; sun_path of unix(7), without its final NUL
_TCP: Final = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


def address_or_default(address: str | None) -> str:
    """The given address, or else the environment's, or else the daemon's default."""
    return address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS


def target_of(address: str) -> str:
    """Translate an address to a gRPC target.

    Raises:
        InvalidArgument: the address is invalid.
    """
    if address.startswith("unix:"):
        path = address.removeprefix("unix:").removeprefix("//")
        if len(os.fsencode(os.path.abspath(path))) > _MAX_SOCKET_PATH:
            raise InvalidArgument(
                f"Invalid address {address!r}: a socket path has at most {_MAX_SOCKET_PATH} bytes. "
                "Use a shorter path.",
                "INVALID_ADDRESS",
                {"address": address},
            )
        if path and "\0" not in path:
            # gRPC parses a target as a URI, where %, # and ? are special
            return f"unix:{quote_from_bytes(os.fsencode(os.path.abspath(path)))}"
    elif (match := _TCP.fullmatch(address.removeprefix("tcp://"))) and int(match[1]) <= 0xFFFF:
        return f"dns:{match[0]}"
    raise InvalidArgument(
        f"Invalid address {address!r}: expected unix:///path or HOST:PORT.",
        "INVALID_ADDRESS",
        {"address": address},
    )
