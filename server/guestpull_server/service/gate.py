"""The unix socket's door: who connects is asked for its credentials before gRPC sees a byte.

gRPC neither tells a servicer who is at the other end of a unix socket, nor takes over a socket that others
made. So the daemon listens itself, asks the kernel (SO_PEERCRED, unix(7)), and passes bytes on to the socket
that gRPC listens at: to the service for those who may, to a server that answers PERMISSION_DENIED to every
call for those who may not. gRPC's own sockets have no name in any file system once they are bound: they are
reached by a descriptor of this process alone.

A connection costs two threads and three descriptors. What users who may not call can have of them is little, and
bounded in time; what a user has who may call is bounded, too; root and the daemon's own user are not.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from guestpull_server.errors import AddressInUse
from guestpull_server.service.sockets import HiddenSocket, listen

_log = logging.getLogger(__name__)

_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_BUFFER_BYTES: Final = 64 * 1024
# connections of all who may not call, at once; any more are closed without an answer
_MOST_REFUSED: Final = 16
_SECONDS_FOR_REFUSAL: Final = 5.0  # until such a connection is cut
_MOST_OF_A_USER: Final = 128  # connections of one of allowed_uids at once
_SECONDS_BETWEEN_COMPLAINTS: Final = 10.0


@dataclass(eq=False, slots=True)
class _Connection:
    """A caller, and what it is passed on to."""

    uid: int
    allowed: bool
    caller: socket.socket
    served: socket.socket
    until: float | None
    """When it is cut, whatever goes on (time.monotonic); None: never."""
    directions: int = 2
    """In how many of them bytes may still pass."""

    def cut(self) -> None:
        for end in (self.caller, self.served):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.caller.close()
        self.served.close()


@dataclass(slots=True)
class _Complaints:
    """Tells what callers can bring about, but not as often as they can: a log has an end, too."""

    next_at: float = 0.0
    untold: int = 0

    def tell(self, level: int, text: str, *arguments: object) -> None:
        now = time.monotonic()
        if now < self.next_at:
            self.untold += 1
            return
        more = f" ({self.untold} more such lines were left out before it)" if self.untold else ""
        self.next_at, self.untold = now + _SECONDS_BETWEEN_COMPLAINTS, 0
        _log.log(level, text + more, *arguments)


class Gate:
    """Listens at `path`, and connects each caller with the service or with the refusal.

    Args:
        path: of the socket; a stale one is replaced.
        allowed_uids: who may call besides root and the user that this daemon runs as. Without any, the
            socket's mode is 0600; with some, everybody may connect, and be refused.
        service: where callers are passed on to.
        refusal: where all others are.

    Raises:
        AddressInUse: a daemon listens there, or the path cannot be used.
    """

    def __init__(
        self, path: str, allowed_uids: frozenset[int], service: HiddenSocket, refusal: HiddenSocket
    ) -> None:
        self._path = path
        self._unbounded_uids = frozenset({0, os.geteuid()})
        self._allowed_uids = allowed_uids | self._unbounded_uids
        self._service = service
        self._refusal = refusal
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._connections: set[_Connection] = set()
        self._complaints = _Complaints()
        self._closed = False
        mode = 0o600 if self._allowed_uids == self._unbounded_uids else 0o666
        try:
            self._listener = listen(path, mode)
        except OSError as error:
            raise AddressInUse(f"unix://{path}", error.strerror or str(error)) from error
        self._bound = os.lstat(path)
        threading.Thread(target=self._accept, name="gate", daemon=True).start()

    def close(self) -> None:
        """Let nobody in any more, and remove the socket if it is still ours."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(self._path), self._bound):
                os.unlink(self._path)

    def hang_up(self, patience: float) -> None:
        """Let the connections end, as they do once the last answer has gone through; cut what is left then.

        Args:
            patience: seconds to wait for that.
        """
        with self._ended:
            self._ended.wait_for(lambda: not self._connections, patience)
            for connection in self._connections:
                connection.cut()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                self._complaints.tell(logging.ERROR, "accept failed: %s", error.strerror)
                time.sleep(0.1)  # out of descriptors or memory: the next one may fare better
                continue
            try:
                connection = self._admitted(caller)
            except (OSError, MemoryError) as error:
                self._complaints.tell(logging.ERROR, "a caller was turned away: %s", error)
                connection = None
            if connection is None:
                caller.close()
                continue
            try:
                self._join(connection)
            except (RuntimeError, MemoryError) as error:  # no thread can be had
                self._complaints.tell(logging.ERROR, "a caller was turned away: %s", error)

    def _admitted(self, caller: socket.socket) -> _Connection | None:
        """A caller, connected with what it is to be passed on to; None: with nothing, it has had its share.

        Raises:
            OSError: the operating system refuses.
        """
        _, uid, _ = _CREDENTIALS.unpack(
            caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        allowed = uid in self._allowed_uids
        if not allowed:
            told = "uid %d is not among allowed_uids and is refused"
            self._complaints.tell(logging.WARNING, told, uid)
        if self._has_too_many(uid, allowed=allowed):
            if allowed:
                told = "uid %d has %d connections already, and gets no other"
                self._complaints.tell(logging.WARNING, told, uid, _MOST_OF_A_USER)
            return None
        if allowed:
            return _Connection(uid, allowed, caller, self._service.connect(), None)
        served = self._refusal.connect()
        for end in (caller, served):
            end.settimeout(_SECONDS_FOR_REFUSAL)  # of what is sent
        return _Connection(uid, allowed, caller, served, time.monotonic() + _SECONDS_FOR_REFUSAL)

    def _join(self, connection: _Connection) -> None:
        """Have bytes passed on in both directions, until the caller or the server ends it.

        Raises:
            RuntimeError: no thread can be had; the connection is closed.
        """
        caller, served = connection.caller, connection.served
        directions = [(caller, served), (served, caller)]
        with self._lock:
            self._connections.add(connection)
        try:
            while directions:
                ends = (connection, *directions[-1])
                threading.Thread(target=self._pump, args=ends, name="gate", daemon=True).start()
                directions.pop()
        except BaseException:
            connection.cut()
            for _ in directions:
                self._direction_ended(connection)
            raise

    def _has_too_many(self, uid: int, *, allowed: bool) -> bool:
        if uid in self._unbounded_uids:
            return False
        with self._lock:
            if allowed:
                return sum(one.uid == uid for one in self._connections) >= _MOST_OF_A_USER
            return sum(not one.allowed for one in self._connections) >= _MOST_REFUSED

    def _pump(self, connection: _Connection, source: socket.socket, target: socket.socket) -> None:
        """Pass bytes on in one direction; the second direction to end closes both sockets."""
        try:
            buffer = memoryview(bytearray(_BUFFER_BYTES))
            with suppress(OSError):
                while length := _received(source, buffer, connection.until):
                    target.sendall(buffer[:length])
        finally:
            with suppress(OSError):
                source.shutdown(socket.SHUT_RD)
            with suppress(OSError):
                target.shutdown(socket.SHUT_WR)
            self._direction_ended(connection)

    def _direction_ended(self, connection: _Connection) -> None:
        with self._lock:
            connection.directions -= 1
            if not connection.directions:
                self._connections.remove(connection)
                self._ended.notify_all()
                connection.close()


def _received(source: socket.socket, buffer: memoryview, until: float | None) -> int:
    """What has come, in bytes; 0 once nothing will.

    Raises:
        OSError: nothing can come any more, or the time is over.
    """
    if until is not None:
        source.settimeout(max(until - time.monotonic(), 0.001))
    return source.recv_into(buffer)
