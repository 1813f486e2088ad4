"""The unix socket's door: who connects is asked for its credentials before gRPC sees a byte.

gRPC neither tells a servicer who is at the other end of a unix socket, nor takes over a socket that others
made. So the daemon listens itself, asks the kernel (SO_PEERCRED, unix(7)), and passes bytes on to the socket
that gRPC listens at: to the service for those who may, to a server that answers PERMISSION_DENIED to every
call for those who may not. gRPC's own sockets have no name in any file system once they are bound: they are
reached by a descriptor of this process alone.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from guestpull_server.errors import AddressInUse

_log = logging.getLogger(__name__)

_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_BUFFER_BYTES: Final = 64 * 1024
_BACKLOG: Final = 128


class HiddenSocket:
    """A unix socket that a server binds by name, and that has no name any more afterwards."""

    def __init__(self, bind: Callable[[str], int]) -> None:
        directory = tempfile.mkdtemp(prefix="guestpulld-")
        try:
            path = os.path.join(directory, "grpc")
            bind(f"unix:{path}")
            self._inode = os.open(path, os.O_PATH | os.O_CLOEXEC)
        finally:
            shutil.rmtree(directory)

    def connect(self) -> socket.socket:
        """A new connection to it."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(f"/proc/self/fd/{self._inode}")
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._inode)


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
        self._allowed_uids = allowed_uids | {0, os.geteuid()}
        self._service = service
        self._refusal = refusal
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._connections: set[socket.socket] = set()
        self._closed = False
        mode = 0o600 if self._allowed_uids == {0, os.geteuid()} else 0o666
        try:
            self._listener = _listen(path, mode)
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
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                _log.error("accept failed: %s", error.strerror)
                time.sleep(0.1)  # out of descriptors or memory: the next one may fare better
                continue
            try:
                self._let_in(caller)
            except OSError as error:
                _log.error("a caller was turned away: %s", error.strerror)
                caller.close()

    def _let_in(self, caller: socket.socket) -> None:
        _, uid, _ = _CREDENTIALS.unpack(
            caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if uid in self._allowed_uids:
            served = self._service.connect()
        else:
            _log.warning("uid %d is not among allowed_uids and is refused", uid)
            served = self._refusal.connect()
        with self._lock:
            self._connections |= {caller, served}
        left = [caller, served]
        for source, target in ((caller, served), (served, caller)):
            threading.Thread(target=self._pump, args=(source, target, left), name="gate", daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, left: list[socket.socket]) -> None:
        """Pass bytes on in one direction; the second direction to end closes both sockets."""
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        with suppress(OSError):
            while length := source.recv_into(buffer):
                target.sendall(buffer[:length])
        with suppress(OSError):
            source.shutdown(socket.SHUT_RD)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
        with self._lock:
            left.pop()
            if not left:
                self._connections -= {source, target}
                self._ended.notify_all()
                source.close()
                target.close()


def _listen(path: str, mode: int) -> socket.socket:
    """A listening socket at a path. A stale socket is replaced, a live one is an error.

    The socket appears under its name with its mode set and listening: nobody ever finds it half-made.
    """
    directory = os.path.dirname(path)
    os.makedirs(directory, mode=0o755, exist_ok=True)
    _refuse_live(path)
    listener = socket.socket(socket.AF_UNIX)
    unfinished = tempfile.mkdtemp(prefix=".", dir=directory)
    try:
        # a relative way to it, because a socket's path has a small limit
        inside = os.open(unfinished, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{inside}/socket")
        finally:
            os.close(inside)
        made = os.path.join(unfinished, "socket")
        os.chmod(made, mode)
        listener.listen(_BACKLOG)
        os.rename(made, path)
    except BaseException:
        listener.close()
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return listener


def _refuse_live(path: str) -> None:
    address = f"unix://{path}"
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise AddressInUse(address, "there is a file of that name, and it is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return
        except BlockingIOError:
            pass
    raise AddressInUse(address, "a daemon listens there")
