"""The daemon's side of the layer workers: start one, feed it, read its result, kill it.

with workers.unpack(staging_directory, "sha256", layer) as worker:
worker.write(compressed)          # as often as bytes arrive; blocks while the worker is behind
unpacked = worker.finish()

changes = workers.verify(directory, tar_split_path, diff_id, cancellation)
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

_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class LayerWorkers:
    """Starts layer workers; one per daemon. Thread-safe.

    Raises:
        StorageFailed: the fork server cannot be started.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._fork_client = ForkClient()

    @property
    def pid(self) -> int:
        """The process id of the fork server."""
        return self._fork_client.pid

    def unpack(
        self,
        directory: str,
        hash_algorithm: str,
        layer: str,
        *,
        checked_digest: Digest | None = None,
        tar_split_path: str | None = None,
    ) -> LayerWorker:
        """Start a worker that unpacks what it is fed.

        Args:
            directory: absolute path of the staging directory, which is empty.
            hash_algorithm: the algorithm of the diff_id.
            layer: the layer's digest, for error messages.
            checked_digest: the digest that the caller checks the bytes against before it trusts the result. If
                the layer is not compressed, this is its diff_id, and nothing is hashed twice.
            tar_split_path: a file to create, mode 0600, for the tar-split by which `verify` can later prove that
                the directory is the layer; None for no tar-split.

        Raises:
            StorageFull: the file system has no space for a tar-split.
            StorageFailed: the tar-split cannot be created, or the fork server cannot be started.
            WorkerFailed: the fork server died.
        """
        request = UnpackRequest(
            directory=directory,
            hash_algorithm=hash_algorithm,
            hash_plain=checked_digest is None or checked_digest.algorithm != hash_algorithm,
            limits=self._limits,
        )
        with ExitStack() as opened:
            tar_split = []
            if tar_split_path is not None:
                with storage_errors("creating the tar-split of a layer", tar_split_path):
                    tar_split = [os.open(tar_split_path, _NEW_FILE, 0o600)]
                opened.callback(os.close, tar_split[0])
            with storage_errors("starting a layer worker", directory):
                ring = RingWriter()
            try:
                process = self._fork_client.start(request, [*ring.descriptors, *tar_split], layer)
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
        """Run `verify_layer` in a process of its own, so that several at once use as many cores.

        Raises:
            StorageFailed: the directory or the tar-split cannot be read.
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
        process = self._fork_client.start(request, [], diff_id)
        withdraw = cancellation.on_cancel(process.kill)
        try:
            process.set_timeout(cancellation.remaining())
            verdict = _verdict(process.read(MAX_VERDICT_BYTES))
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
        """Stop the fork server, which kills all workers."""
        self._fork_client.close()


def _verdict(line: bytes) -> Verdict | None:
    with suppress(msgspec.DecodeError):
        verdict: Verdict = msgspec.json.decode(line, type=Verdict)
        return verdict
    return None


class LayerWorker:
    """A layer worker that unpacks; for one thread, except `kill`.

    A context manager: at its end nothing writes to the directory any more.
    """

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
        """Feed the next bytes of the layer; blocks while the worker is behind.

        Raises:
            GuestpullError: the worker ended early; the error says why.
        """
        try:
            self._ring.write(compressed)
        except BrokenPipeError:
            raise self._failure(self._report()) from None

    def finish(self) -> UnpackedLayer:
        """Tell the worker that these were all bytes, and wait for its result.

        Raises:
            CorruptLayer: the layer cannot be decompressed or unpacked.
            LimitExceeded: the layer exceeds a limit.
            StorageFull: the file system has no space left.
            StorageFailed: a system call failed.
            WorkerFailed: the worker died, was killed, or met an unexpected error.
        """
        self._ring.finish()
        report = self._report()
        if not isinstance(report, Unpacked):
            raise self._failure(report)
        implied = self._process.read(report.implied_bytes)
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
        """Kill the worker; who waits for it gets WorkerFailed. Thread-safe. Harmless if it has ended."""
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._ring.close()
        self._process.end()

    def _report(self) -> Report | None:
        """Read the worker's report; None if it died without one."""
        with suppress(msgspec.DecodeError):
            report: Report = msgspec.json.decode(self._process.read_line(MAX_REPORT_BYTES), type=Report)
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
                return WorkerFailed(self._layer, f"met an unexpected error ({error})", "report it")
            case Unpacked():
                return CorruptLayer(self._layer, "there are bytes behind its end")
            case None:
                return WorkerFailed(self._layer, "was killed" if self._process.killed else "died")
        assert_never(report)
