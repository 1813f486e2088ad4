"""The addresses of --listen: `unix:///absolute/path` or `HOST:PORT`."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

_TCP: Final = re.compile(r"(?:tcp://)?(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")
_MAX_SOCKET_PATH: Final = 107  # bytes; sun_path of unix(7), without its final NUL


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket in the file system."""

    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host as the user wrote it, and a port. With port 0 the kernel chooses one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect to it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """Parse an address.

    Raises:
        ValueError: the text is not an address; the message gives the expected form.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        path = path.removeprefix("//")
        if not path.startswith("/") or "\0" in path or path.endswith("/"):
            raise ValueError("expected unix:///absolute/path")
        if len(path.encode()) > _MAX_SOCKET_PATH:
            raise ValueError(f"the path of a unix socket is at most {_MAX_SOCKET_PATH} bytes long")
        return UnixAddress(path)
    match = _TCP.fullmatch(text)
    if match is None or int(match[2]) > 0xFFFF:
        raise ValueError("expected unix:///absolute/path or HOST:PORT")
    return TcpAddress(match[1], int(match[2]))
