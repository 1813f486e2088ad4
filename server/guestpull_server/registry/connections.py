"""Connections that a Watch can end at any point of their lives: urllib3's, with an own way to connect."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from guestpull_server.registry.patience import Watch

if TYPE_CHECKING:
    from urllib3._base_connection import BaseHTTPConnection

_Address: TypeAlias = tuple[
    socket.AddressFamily,
    socket.SocketKind,
    int,
    str,
    tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes],
]
"""As socket.getaddrinfo gives it."""


class _Watched(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        watch = Watch.current()
        assert watch is not None, "all exchanges are watched"
        timeout = self.timeout if isinstance(self.timeout, int | float) else None
        try:
            return _connect(
                _addresses(self._dns_host, self.port, watch), timeout, self.socket_options or (), watch
            )
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(self, "no connection in time") from error
        except OSError as error:
            raise NewConnectionError(self, error.strerror or str(error)) from error

    def putrequest(
        self, method: str, url: str, skip_host: bool = False, skip_accept_encoding: bool = False
    ) -> None:
        watch = Watch.current()
        if watch is not None and self.sock is not None:  # a connection that is used again
            watch.attach(self.sock)
        super().putrequest(method, url, skip_host, skip_accept_encoding)


class _WatchedTls(_Watched, HTTPSConnection):
    pass


class WatchedPool(HTTPConnectionPool):
    """A pool of plain connections."""

    ConnectionCls = _Watched


class WatchedTlsPool(HTTPSConnectionPool):
    """A pool of TLS connections."""

    ConnectionCls = _WatchedTls

    def _validate_conn(self, conn: BaseHTTPConnection) -> None:
        # without the base's warning about certificates that are not verified: the configuration says `insecure`
        if conn.is_closed:
            conn.connect()


def _addresses(host: str, port: int, watch: Watch) -> Sequence[_Address]:
    """Resolve a name. No resolver can be interrupted, so it is left behind when the watch ends."""
    host = host.strip("[]")
    with suppress(socket.gaierror, UnicodeError):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    outcome: queue.SimpleQueue[Sequence[_Address] | OSError] = queue.SimpleQueue()
    finished = threading.Event()

    def resolve() -> None:
        try:
            outcome.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            outcome.put(error)
        except UnicodeError as error:  # a label that is longer than a name may have
            outcome.put(socket.gaierror(socket.EAI_NONAME, str(error)))
        finished.set()

    threading.Thread(target=resolve, name=f"resolve {host}", daemon=True).start()
    if not watch.wait_for(finished):
        raise TimeoutError
    addresses = outcome.get()
    if isinstance(addresses, OSError):
        raise addresses
    return addresses


def _connect(
    addresses: Sequence[_Address],
    timeout: float | None,
    options: Iterable[tuple[int, int, int | bytes]],
    watch: Watch,
) -> socket.socket:
    """A connection to the first of these addresses that takes it."""
    failure: OSError = OSError("its name has no address")
    for family, kind, protocol, _, address in addresses:
        made = socket.socket(family, kind, protocol)
        try:
            for option in options:
                made.setsockopt(*option)
            made.settimeout(timeout)
            watch.attach(made)
            made.connect(address)
        except OSError as error:
            made.close()
            failure = error
        else:
            return made
    raise failure
