"""What --listen may say: `unix:///absolute/path`, or a TCP address of this machine or, with TLS, of any."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

_TCP: Final = re.compile(r"(?:tcp://)?(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")
_MAX_SOCKET_PATH: Final = 107  # bytes; sun_path of unix(7), without its final NUL


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket in the file system."""

    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, as it was written, and a port; 0 lets the kernel choose one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """Read an address.

    Raises:
        ValueError: it is none; the text says how one is written.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        path = path.removeprefix("//")
        if not path.startswith("/") or "\0" in path or path.endswith("/"):
            raise ValueError("a unix socket is written unix:///absolute/path")
        if len(path.encode()) > _MAX_SOCKET_PATH:
            raise ValueError(f"a socket's path has at most {_MAX_SOCKET_PATH} bytes")
        return UnixAddress(path)
    match = _TCP.fullmatch(text)
    if match is None or int(match[2]) > 0xFFFF:
        raise ValueError("an address is written unix:///path, or HOST:PORT")
    return TcpAddress(match[1], int(match[2]))
