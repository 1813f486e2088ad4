"""Where the service listens: `unix:///path`, `unix:path` or `host:port`. Loads no gRPC, for --help's sake."""

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
    """An address that was given, else the environment's, else the daemon's default."""
    return address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS


def target_of(address: str) -> str:
    """An address as gRPC writes it.

    Raises:
        InvalidArgument: it is none.
    """
    if address.startswith("unix:"):
        path = address.removeprefix("unix:").removeprefix("//")
        if len(os.fsencode(os.path.abspath(path))) > _MAX_SOCKET_PATH:
            raise InvalidArgument(
                f"{address!r}: a socket's path has at most {_MAX_SOCKET_PATH} bytes. Have a shorter one.",
                "INVALID_ADDRESS",
                {"address": address},
            )
        if path and "\0" not in path:
            # to gRPC it is an URI, in which %, # and ? mean something
            return f"unix:{quote_from_bytes(os.fsencode(os.path.abspath(path)))}"
    elif (match := _TCP.fullmatch(address.removeprefix("tcp://"))) and int(match[1]) <= 0xFFFF:
        return f"dns:{match[0]}"
    raise InvalidArgument(
        f"{address!r} is no address of a service. Write it as unix:///path or HOST:PORT.",
        "INVALID_ADDRESS",
        {"address": address},
    )
