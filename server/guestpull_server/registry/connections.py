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
from collections.abc import Sequence
from contextlib import suppress
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
    def _begin_wait(self) -> Deadline:
        deadline = Deadline.current()
        self.settimeout(deadline.begin_wait(functools.partial(_shutdown, self)))
        return deadline

    def recv(self, limit: int = 1024, flags: int = 0) -> bytes:
        deadline = self._begin_wait()
        try:
            return super().recv(limit, flags)
        finally:
            deadline.end_wait()

    def recv_into(self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0) -> int:
        deadline = self._begin_wait()
        try:
            return super().recv_into(buffer, nbytes or 0, flags)
        finally:
            deadline.end_wait()

    def sendall(self, data: ReadableBuffer, flags: int = 0) -> None:
        deadline = self._begin_wait()
        try:
            super().sendall(data, flags)
        finally:
            deadline.end_wait()

    def connect_within(self, timeout: float, address: object) -> None:
        deadline = self._begin_wait()
        try:
            self.settimeout(min(timeout, self.gettimeout() or timeout))
            self.connect(address)  # type: ignore[arg-type]
        finally:
            deadline.end_wait()


class TlsSocket(_Socket, ssl.SSLSocket):
    """A TLS connection."""

    def do_handshake(self, block: bool = False) -> None:
        """See ssl.SSLSocket."""
        deadline = self._begin_wait()
        try:
            super().do_handshake(block)
        finally:
            deadline.end_wait()


def _shutdown(connected: socket.socket) -> None:
    # not SSLSocket.shutdown, which takes the TLS state away from the thread that reads
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
    deadline = Deadline.current()
    try:
        seconds = deadline.begin_wait(lambda: outcome.put(TimeoutError()))
        addresses = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    finally:
        deadline.end_wait()
    if isinstance(addresses, OSError):
        raise addresses
    return addresses
