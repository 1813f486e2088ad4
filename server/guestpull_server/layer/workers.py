"""The daemon's side of the layer workers: start one, feed it, hear its result, kill it.

    with workers.unpack(staging_directory, "sha256", what) as worker:
        worker.write(compressed)          # as often as there are bytes; blocks when the worker is behind
        unpacked = worker.finish()

    changes = workers.verify(directory, tar_split_path, diff_id, cancellation)

`LayerWorkers` is one per daemon, and thread-safe; a `LayerWorker` belongs to the thread that feeds it, but
for `kill`.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Final, Self, assert_never

import msgspec

from guestpull_server.cancellation import Cancellation
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
from guestpull_server.layer.changes import Change
from guestpull_server.layer.fork_client import ForkClient, WorkerProcess
from guestpull_server.layer.ring import RingWriter
from guestpull_server.layer.worker_protocol import (
    MAX_REPORT_BYTES,
    MAX_VERDICT_BYTES,
    Corrupt,
    Defect,
    Refused,
    Report,
    TooMuch,
    Unpacked,
    UnpackRequest,
    Verdict,
    Verified,
    VerifyRequest,
)
from guestpull_server.models import Decoder, Digest, UnpackedLayer

_RECORD_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class LayerWorkers:
    """Starts layer workers. Thread-safe.

    Raises:
        StorageFailed: the fork server that they come from cannot be started.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._forks = ForkClient()

    @property
    def pid(self) -> int:
        """The fork server's process id."""
        return self._forks.pid

    def unpack(
        self,
        directory: str,
        hash_algorithm: str,
        layer: str,
        *,
        checked_digest: Digest | None = None,
        tar_split_path: str | None = None,
    ) -> LayerWorker:
        """Start a worker that unpacks what it is fed into `directory`, which is empty and ours alone.

        Args:
            directory: absolute path of the staging directory.
            hash_algorithm: the algorithm of the wanted diff_id.
            layer: the layer's digest, as errors are to name it.
            checked_digest: the digest that the caller itself checks the fed bytes against before it believes
                the result. If the layer is not compressed, this is its diff_id, and nothing is hashed twice.
            tar_split_path: a file to make, mode 0600, for the record by which `verify_layer` can prove later that
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
            if tar_split_path is not None:
                with storage_errors("keep a record of a layer", tar_split_path):
                    record = [os.open(tar_split_path, _RECORD_FLAGS, 0o600)]
                handed_on.callback(os.close, record[0])
            with storage_errors("start a layer worker", directory):
                ring = RingWriter()
            try:
                process = self._forks.start(request, [*ring.descriptors, *record], layer)
            except BaseException:
                ring.close()
                raise
        ring.hand_over()
        return LayerWorker(ring, process, layer, request, checked_digest)

    def verify(
        self,
        directory: str,
        tar_split_path: str,
        diff_id: Digest,
        cancellation: Cancellation,
        *,
        implied: str = "",
    ) -> tuple[Change, ...]:
        """Do as `verify_layer`, in a process: several at once keep as many cores busy.

        Raises:
            StorageFailed: directory or record cannot be read.
            WorkerFailed: the process died.
            Cancelled: the caller left.
            DeadlineExceeded: its time is up.
        """
        cancellation.check()
        request = VerifyRequest(
            directory=directory,
            tar_split_path=tar_split_path,
            diff_id=str(diff_id),
            implied=implied,
            limits=self._limits,
        )
        process = self._forks.start(request, [], diff_id)
        withdraw = cancellation.on_cancel(process.kill)
        try:
            process.wait_at_most(cancellation.remaining())
            verdict = _verdict(process.hear(MAX_VERDICT_BYTES))
        except TimeoutError:
            verdict = None
        finally:
            withdraw()
            process.end()
        match verdict:
            case Verified(changes):
                return tuple(changes)
            case Refused(doing, problem, _):
                raise StorageFailed(doing, directory, problem)
            case None:
                cancellation.check()
                raise WorkerFailed(diff_id, "died while it verified the layer")
        assert_never(verdict)

    def close(self) -> None:
        """End the fork server; workers that still run are killed."""
        self._forks.close()


def _verdict(line: bytes) -> Verdict | None:
    with suppress(msgspec.DecodeError):
        verdict: Verdict = msgspec.json.decode(line, type=Verdict)
        return verdict
    return None


class LayerWorker:
    """One layer worker at work. A context manager: leaving it kills the worker unless it is done."""

    def __init__(
        self,
        ring: RingWriter,
        process: WorkerProcess,
        layer: str,
        request: UnpackRequest,
        checked_digest: Digest | None,
    ) -> None:
        self._ring = ring
        self._process = process
        self._layer = layer
        self._directory = request.directory
        self._hash_algorithm = request.hash_algorithm
        self._checked_digest = checked_digest

    def write(self, compressed: memoryview) -> None:
        """Hand on the next bytes of the layer; blocks while the worker is behind.

        Raises:
            GuestpullError: the worker gave up; the error says why.
        """
        try:
            self._ring.write(compressed)
        except BrokenPipeError:
            raise self._failure(self._hear()) from None

    def finish(self) -> UnpackedLayer:
        """Tell the worker that it has all bytes, and wait for its result.

        Raises:
            CorruptLayer: the layer cannot be decompressed or unpacked.
            LimitExceeded: it costs more than allowed.
            StorageFull: the file system has no room.
            StorageFailed: the operating system refused a step.
            WorkerFailed: the worker died, was killed, or met an error that it does not know.
        """
        self._ring.finish()
        report = self._hear()
        if not isinstance(report, Unpacked):
            raise self._failure(report)
        implied = self._process.hear(report.implied_bytes)
        if len(implied) < report.implied_bytes:
            raise self._failure(None)
        diff_id = self._checked_digest
        if report.hexdigest or diff_id is None:
            diff_id = Digest(f"{self._hash_algorithm}:{report.hexdigest}")
        return UnpackedLayer(
            diff_id=diff_id,
            decoder=Decoder(report.decoder),
            size_bytes=report.size_bytes,
            entries=report.entries,
            implied_directories=tuple(implied.split(b"\0")[:-1]),
            dropped_xattrs=report.dropped_xattrs,
        )

    def kill(self) -> None:
        """Kill the worker, from any thread. What waits for it gets WorkerFailed. Harmless if it is gone."""
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Leave nothing running: once this returns, nothing writes to the directory any more."""
        self._process.kill()
        self._ring.close()
        self._process.end()

    def _hear(self) -> Report | None:
        """The worker's report; None if it died without one."""
        with suppress(msgspec.DecodeError):
            report: Report = msgspec.json.decode(self._process.hear_line(MAX_REPORT_BYTES), type=Report)
            return report
        return None

    def _failure(self, report: Report | None) -> GuestpullError:
        match report:
            case Corrupt(problem):
                return CorruptLayer(self._layer, problem)
            case TooMuch(what, limit, allowed):
                return LimitExceeded(f"layer {self._layer}: {what}", limit, allowed)
            case Refused(doing, problem, full):
                doing = f"layer {self._layer}: {doing}"
                if full:
                    return StorageFull(doing, self._directory)
                return StorageFailed(doing, self._directory, problem)
            case Defect(error):
                return WorkerFailed(self._layer, f"met an error that it does not know ({error})", "report it")
            case Unpacked():
                return CorruptLayer(self._layer, "there are bytes behind its end")
            case None:
                return WorkerFailed(self._layer, "was killed" if self._process.killed else "died")
        assert_never(report)
