"""The daemon's side of the fork server: starts worker processes, reads their reports, kills them."""

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
    """A worker process and the socket that it reports over.

    `kill` and `end` are thread-safe; one thread at a time may read the report.

    Attributes:
        killed: whether the process was killed from here.
    """

    def __init__(self, report: socket.socket) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._pidfd = -1
        self.killed = False
        with suppress(ConnectionError):
            _, descriptors, _, _ = socket.recv_fds(report, 1, 1)
            if descriptors:
                self._pidfd = descriptors[0]

    def kill(self) -> None:
        """Kill the process, which ends its report. Harmless if it has ended."""
        with self._lock:
            self.killed = True
            if self._pidfd >= 0:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def end(self) -> None:
        """Kill the process and wait until it has ended."""
        self.kill()
        self._report.close()
        with self._lock:
            if self._pidfd >= 0:
                exited = select.poll()  # select(2) is limited to descriptors below 1024
                exited.register(self._pidfd, select.POLLIN)
                exited.poll()
                os.close(self._pidfd)
                self._pidfd = -1

    def read(self, length: int) -> bytes:
        """Read the next bytes of the report; fewer if the report ends."""
        received = bytearray()
        with suppress(ConnectionError):
            while len(received) < length and (
                piece := self._report.recv(min(length - len(received), _PIECE_BYTES))
            ):
                received += piece
        return bytes(received)

    def read_line(self, most: int) -> bytes:
        """Read the next line of the report and not a byte more; without a newline if the report ends."""
        line = bytearray()
        with suppress(ConnectionError):
            while not line.endswith(b"\n") and len(line) < most and (byte := self._report.recv(1)):
                line += byte
        return bytes(line)

    def set_timeout(self, seconds: float | None) -> None:
        """Set how long reading waits for each piece before it raises TimeoutError."""
        self._report.settimeout(seconds)


class ForkClient:
    """Starts worker processes by a fork server, which is started again if it dies. Thread-safe.

    Raises:
        StorageFailed: the fork server cannot be started.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server = _ForkServer()

    @property
    def pid(self) -> int:
        """The process id of the fork server."""
        return self._server.pid

    def start(self, request: Request, descriptors: list[int], layer: str) -> WorkerProcess:
        """Fork a worker for a request and pass it these descriptors, which the caller closes.

        Raises:
            StorageFailed: no socket can be made, or the fork server cannot be started.
            WorkerFailed: the fork server died.
        """
        with storage_errors("starting a layer worker", sys.executable):
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
        """Stop the fork server, which kills all workers."""
        with self._lock:
            self._server.close()

    def _send(self, message: bytes, descriptors: list[int]) -> bool:
        """Send a request to the fork server; if that is dead, to a new one."""
        with self._lock:
            if self._server.send(message, descriptors):
                return True
            self._server.close()
            self._server = _ForkServer()
            return self._server.send(message, descriptors)


class _ForkServer:
    """One fork server process."""

    def __init__(self) -> None:
        with storage_errors("starting the layer workers", sys.executable):
            self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            # -P: do not import from the directory that the daemon was started in
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
