"""Connections of urllib3 whose blocking calls are bounded by the Deadline of the current thread.

What urllib3 has for the purpose is used: `pool_classes_by_scheme`, `ConnectionCls`, and `_new_conn`, which
urllib3.contrib.socks overrides as well. The ssl module has `SSLContext.sslsocket_class`.
"""

from __future__ import annotations

import functools
import queue
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from guestpull_server.registry.deadlines import Deadline

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_Address: TypeAlias = tuple[
    socket.AddressFamily,
    socket.SocketKind,
    int,
    str,
    tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes],
]
"""As returned by socket.getaddrinfo."""


class _Socket(socket.socket):
    @contextmanager
    def _bounded(self) -> Iterator[None]:
        # not SSLSocket.shutdown, which takes the TLS state away from the thread that reads
        wake = functools.partial(_shutdown, self)
        with Deadline.current().waiting(wake) as seconds:
            self.settimeout(seconds)
            yield

    def recv(self, limit: int = 1024, flags: int = 0) -> bytes:
        with self._bounded():
            return super().recv(limit, flags)

    def recv_into(self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0) -> int:
        with self._bounded():
            return super().recv_into(buffer, nbytes or 0, flags)

    def sendall(self, data: ReadableBuffer, flags: int = 0) -> None:
        with self._bounded():
            super().sendall(data, flags)

    def connect_within(self, timeout: float, address: object) -> None:
        with self._bounded():
            self.settimeout(min(timeout, self.gettimeout() or timeout))
            self.connect(address)  # type: ignore[arg-type]


class TlsSocket(_Socket, ssl.SSLSocket):
    """A TLS connection."""

    def do_handshake(self, block: bool = False) -> None:
        """See ssl.SSLSocket."""
        with self._bounded():
            super().do_handshake(block)


def _shutdown(connected: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


class _Connection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        assert isinstance(self.timeout, int | float), "Transport sets it"
        try:
            failure = OSError("the host name has no address")
            for family, kind, protocol, _, address in _resolve(self.host.strip("[]"), self.port):
                made = _Socket(family, kind, protocol)
                try:
                    for option in self.socket_options or ():
                        made.setsockopt(*option)
                    made.connect_within(self.timeout, address)
                except OSError as error:
                    made.close()
                    failure = error
                else:
                    return made
            raise failure
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        except TimeoutError as error:
            raise ConnectTimeoutError(self, "connection timed out") from error
        except OSError as error:
            raise NewConnectionError(self, error.strerror or str(error)) from error


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class Pool(HTTPConnectionPool):
    """A pool of plain connections."""

    ConnectionCls = _Connection


class TlsPool(HTTPSConnectionPool):
    """A pool of TLS connections; their SSLContext must make TlsSockets."""

    ConnectionCls = _TlsConnection


def _resolve(host: str, port: int) -> Sequence[_Address]:
    """Resolve a name. getaddrinfo cannot be interrupted, so its thread is abandoned if the time is up."""
    with suppress(socket.gaierror, UnicodeError):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    outcome: queue.SimpleQueue[Sequence[_Address] | OSError] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            outcome.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            outcome.put(error)
        except UnicodeError as error:  # a label is longer than DNS allows
            outcome.put(socket.gaierror(socket.EAI_NONAME, str(error)))

    threading.Thread(target=resolve, name=f"resolve {host}", daemon=True).start()
    try:
        with Deadline.current().waiting(lambda: outcome.put(TimeoutError())) as seconds:
            addresses = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(addresses, OSError):
        raise addresses
    return addresses
