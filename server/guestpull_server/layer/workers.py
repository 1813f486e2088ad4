"""The daemon's side of the layer workers: start one, feed it, hear its result, kill it.

    with workers.unpack(staging_directory, "sha256", what) as worker:
        worker.write(compressed)          # as often as there are bytes; blocks when the worker is behind
        unpacked = worker.finish()

`LayerWorkers` is one per daemon, and thread-safe; a `LayerWorker` belongs to the thread that feeds it, but
for `kill`.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Final, Self

import msgspec

from guestpull_server.config import Limits
from guestpull_server.errors import (
    CorruptLayer,
    GuestpullError,
    LimitExceeded,
    StorageFailed,
    StorageFull,
    WorkerFailed,
    storage_errors,
)
from guestpull_server.layer.messages import (
    MAX_REPORT_BYTES,
    Corrupt,
    Refused,
    Report,
    TooMuch,
    Unpacked,
    UnpackRequest,
)
from guestpull_server.models import Decoder, Digest, MiB, UnpackedLayer

_PIPE_BYTES: Final = 1 * MiB  # the most that a process without CAP_SYS_RESOURCE may have
_RECORD_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class LayerWorkers:
    """Starts layer workers, by a fork server that is started with it, and again should it die.

    Raises:
        StorageFailed: the fork server cannot be started.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._server = _ForkServer()

    @property
    def pid(self) -> int:
        """The fork server's process id."""
        return self._server.pid

    def unpack(
        self,
        directory: str,
        hash_algorithm: str,
        layer: str,
        *,
        checked_digest: Digest | None = None,
        record_path: str | None = None,
    ) -> LayerWorker:
        """Start a worker that unpacks what it is fed into `directory`, which is empty and ours alone.

        Args:
            directory: absolute path of the staging directory.
            hash_algorithm: the algorithm of the wanted diff_id.
            layer: the layer's digest, as errors are to name it.
            checked_digest: the digest that the caller itself checks the fed bytes against before it believes
                the result. If the layer is not compressed, this is its diff_id, and nothing is hashed twice.
            record_path: a file to make, mode 0600, for the record by which `verify_layer` can prove later that
                the directory is the layer; None: keep none.

        Raises:
            StorageFull: the file system has no room for a record.
            StorageFailed: the record cannot be made, or no fork server be started.
            WorkerFailed: the fork server died.
        """
        request = UnpackRequest(
            directory=directory,
            hash_algorithm=hash_algorithm,
            hash_plain=checked_digest is None or checked_digest.algorithm != hash_algorithm,
            limits=self._limits,
        )
        with ExitStack() as handed_on:
            record = []
            if record_path is not None:
                with storage_errors("keep a record of a layer", record_path):
                    record = [os.open(record_path, _RECORD_FLAGS, 0o600)]
                handed_on.callback(os.close, record[0])
            with storage_errors("start a layer worker", directory):
                report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                handed_on.enter_context(theirs)
                handed_on.enter_context(failing := ExitStack())
                failing.enter_context(report)
                reader, writer = os.pipe()
                handed_on.callback(os.close, reader)
                failing.callback(os.close, writer)
            # more pipes than /proc/sys/fs/pipe-user-pages-soft allows: a small one is slower, no more
            with suppress(PermissionError):
                fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            if not self._send(request, [reader, theirs.fileno(), *record]):
                raise WorkerFailed(layer, "cannot be started, because the fork server is gone")
            failing.pop_all()
        return LayerWorker(writer, report, layer, directory, hash_algorithm, checked_digest)

    def close(self) -> None:
        """End the fork server; workers that still run are killed."""
        with self._lock:
            self._server.close()

    def _send(self, request: UnpackRequest, descriptors: list[int]) -> bool:
        """Hand a request to the fork server; a dead one is replaced, once."""
        message = msgspec.json.encode(request)
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
            command = [sys.executable, "-m", "guestpull_server.layer.fork_server", str(theirs.fileno())]
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


class LayerWorker:
    """One layer worker at work. A context manager: leaving it kills the worker unless it is done."""

    def __init__(
        self,
        pipe: int,
        report: socket.socket,
        layer: str,
        directory: str,
        hash_algorithm: str,
        checked_digest: Digest | None,
    ) -> None:
        self._pipe = pipe
        self._report = report
        self._layer = layer
        self._directory = directory
        self._hash_algorithm = hash_algorithm
        self._checked_digest = checked_digest
        self._lock = threading.Lock()
        self._pidfd = -1
        self._killed = False
        with suppress(ConnectionError):
            _, descriptors, _, _ = socket.recv_fds(report, 1, 1)
            if descriptors:
                self._pidfd = descriptors[0]

    def write(self, compressed: memoryview) -> None:
        """Hand on the next bytes of the layer; blocks while the worker is behind.

        Raises:
            GuestpullError: the worker gave up; the error says why.
        """
        try:
            while compressed:
                compressed = compressed[os.write(self._pipe, compressed) :]
        except BrokenPipeError:
            raise self._failure(self._hear()) from None

    def finish(self) -> UnpackedLayer:
        """Tell the worker that it has all bytes, and wait for its result.

        Raises:
            CorruptLayer: the layer cannot be decompressed or unpacked.
            LimitExceeded: it costs more than allowed.
            StorageFull: the file system has no room.
            StorageFailed: the operating system refused a step.
            WorkerFailed: the worker died, or was killed.
        """
        self._close_pipe()
        report = self._hear()
        if not isinstance(report, Unpacked):
            raise self._failure(report)
        implied = self._receive(report.implied_bytes).split(b"\0")[:-1]
        diff_id = self._checked_digest
        if report.hexdigest or diff_id is None:
            diff_id = Digest(f"{self._hash_algorithm}:{report.hexdigest}")
        return UnpackedLayer(
            diff_id=diff_id,
            decoder=Decoder(report.decoder),
            size_bytes=report.size_bytes,
            entries=report.entries,
            implied_directories=tuple(implied),
            dropped_xattrs=report.dropped_xattrs,
        )

    def kill(self) -> None:
        """Kill the worker, from any thread. What waits for it gets WorkerFailed. Harmless if it is gone."""
        with self._lock:
            self._killed = True
            if self._pidfd >= 0:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Leave nothing running: once this returns, nothing writes to the directory any more."""
        self.kill()
        self._close_pipe()
        self._report.close()
        with self._lock:
            if self._pidfd >= 0:
                select.select([self._pidfd], [], [])
                os.close(self._pidfd)
                self._pidfd = -1

    def _hear(self) -> Report | None:
        """The worker's report; None if it died without one."""
        line = b""
        with suppress(ConnectionError, msgspec.DecodeError):
            while not line.endswith(b"\n") and len(line) < MAX_REPORT_BYTES:
                byte = self._report.recv(1)
                if not byte:
                    return None
                line += byte
            report: Report = msgspec.json.decode(line, type=Report)
            return report
        return None

    def _receive(self, length: int) -> bytes:
        received = bytearray()
        while len(received) < length:
            piece = self._report.recv(length - len(received))
            if not piece:
                raise self._failure(None)
            received += piece
        return bytes(received)

    def _failure(self, report: Report | None) -> GuestpullError:
        match report:
            case Corrupt(problem):
                return CorruptLayer(self._layer, problem)
            case TooMuch(what, limit, allowed):
                return LimitExceeded(f"layer {self._layer}: {what}", limit, allowed)
            case Refused(doing, _, full=True):
                return StorageFull(f"layer {self._layer}: {doing}", self._directory)
            case Refused(doing, problem, full=False):
                return StorageFailed(f"layer {self._layer}: {doing}", self._directory, problem)
            case Unpacked():
                return CorruptLayer(self._layer, "there are bytes behind its end")
            case None:
                return WorkerFailed(self._layer, "was killed" if self._killed else "died")
        raise AssertionError(report)

    def _close_pipe(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
