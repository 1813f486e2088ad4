"""The daemon's side of the fork server: worker processes, from their start to their end."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Final

import msgspec

from guestpull_server.errors import WorkerFailed, storage_errors
from guestpull_server.layer.worker_protocol import Request

_PIECE_BYTES: Final = 64 * 1024


class WorkerProcess:
    """A worker, known by its pidfd, and the socket that it reports over. Thread-safe but for hearing."""

    def __init__(self, report: socket.socket) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._pidfd = -1
        self.killed = False
        """Whether it was killed from here."""
        with suppress(ConnectionError):
            _, descriptors, _, _ = socket.recv_fds(report, 1, 1)
            if descriptors:
                self._pidfd = descriptors[0]

    def kill(self) -> None:
        """Kill it, from any thread. What is heard of it ends then. Harmless if it is gone."""
        with self._lock:
            self.killed = True
            if self._pidfd >= 0:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def end(self) -> None:
        """Kill it, and wait until it is gone: once this returns, it does nothing any more."""
        self.kill()
        self._report.close()
        with self._lock:
            if self._pidfd >= 0:
                gone = select.poll()  # select() knows no descriptors above 1023
                gone.register(self._pidfd, select.POLLIN)
                gone.poll()
                os.close(self._pidfd)
                self._pidfd = -1

    def hear(self, length: int) -> bytes:
        """The next bytes of its report; fewer where it ends."""
        heard = bytearray()
        with suppress(ConnectionError):
            while len(heard) < length and (
                piece := self._report.recv(min(length - len(heard), _PIECE_BYTES))
            ):
                heard += piece
        return bytes(heard)

    def hear_line(self, most: int) -> bytes:
        """The next line of its report, and no byte more; without its end where the report ends."""
        line = bytearray()
        with suppress(ConnectionError):
            while not line.endswith(b"\n") and len(line) < most and (byte := self._report.recv(1)):
                line += byte
        return bytes(line)

    def wait_at_most(self, seconds: float | None) -> None:
        """Bound how long the hearing waits for each piece; TimeoutError is raised then."""
        self._report.settimeout(seconds)


class ForkClient:
    """Has worker processes forked, by a fork server that is started with it, and again should it die.

    Thread-safe.

    Raises:
        StorageFailed: the fork server cannot be started.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server = _ForkServer()

    @property
    def pid(self) -> int:
        """The fork server's process id."""
        return self._server.pid

    def start(self, request: Request, descriptors: list[int], layer: str) -> WorkerProcess:
        """Have a worker forked for a request, and given these descriptors, which the caller closes.

        Raises:
            StorageFailed: no sockets, or no fork server can be had.
            WorkerFailed: the fork server died.
        """
        with storage_errors("start a layer worker", sys.executable):
            report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                sent = self._send(msgspec.json.encode(request), [theirs.fileno(), *descriptors])
            except BaseException:
                report.close()
                raise
        if not sent:
            report.close()
            raise WorkerFailed(layer, "cannot be started, because the fork server is gone")
        return WorkerProcess(report)

    def close(self) -> None:
        """End the fork server; workers that still run are killed."""
        with self._lock:
            self._server.close()

    def _send(self, message: bytes, descriptors: list[int]) -> bool:
        """Hand a request to the fork server; a dead one is replaced, once."""
        with self._lock:
            if self._server.send(message, descriptors):
                return True
            self._server.close()
            self._server = _ForkServer()
            return self._server.send(message, descriptors)


class _ForkServer:
    """One fork server, from its start to its end."""

    def __init__(self) -> None:
        with storage_errors("start the layer workers", sys.executable):
            self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            # -P: the directory that the daemon was started in is no place to import from
            command = [sys.executable, "-P", "-m", "guestpull_server.layer.fork_server", str(theirs.fileno())]
            with theirs:
                try:
                    self._process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
                    )
                except OSError:
                    self._requests.close()
                    raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: bytes, descriptors: list[int]) -> bool:
        try:
            socket.send_fds(self._requests, [message], descriptors)
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._requests.close()
        self._process.wait()
