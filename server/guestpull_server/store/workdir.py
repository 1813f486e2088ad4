"""The work directory as a place: its directories, its one owner, and what is on its way out.

    <work_dir>/lock        held by the process that owns the work directory
    <work_dir>/layers/     unpacked layers
    <work_dir>/records/    what each layer's tar held besides file contents
    <work_dir>/overlay/    upper and work directories of bundles
    <work_dir>/staging/    what is not believed: layers in the making, and what is being deleted

All are 0700: a layer may hold setuid files and devices, which nobody may reach but through a mount.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from guestpull_server.errors import WorkDirInUse, storage_errors
from guestpull_server.models import Digest
from guestpull_server.store.durability import remove_tree

_ROOMS: Final = ("layers", "records", "overlay", "staging")


class WorkDir:
    """One work directory, owned by this process from here to `close`.

    Raises:
        WorkDirInUse: another process owns it.
        StorageFailed: it cannot be made or used.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.layers, self.records, self.overlay, self.staging = (os.path.join(path, room) for room in _ROOMS)
        with storage_errors("opening the work directory", path):
            os.makedirs(path, mode=0o755, exist_ok=True)
            self._lock = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._own()
                for room in (self.layers, self.records, self.overlay, self.staging):
                    os.makedirs(room, mode=0o700, exist_ok=True)
            except BaseException:
                os.close(self._lock)
                raise

    def _own(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 20, 0).strip().decode(errors="replace")
            raise WorkDirInUse(self.path, f"process {owner}" if owner else "another process") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, b"%d\n" % os.getpid(), 0)

    def close(self) -> None:
        """Give the work directory back."""
        os.close(self._lock)

    def tidy(self) -> None:
        """Remove what is of use to a running process only, where it is empty: a baked store holds nothing else."""
        for room in (self.staging, self.overlay, self.records, self.layers):
            with suppress(OSError):
                os.rmdir(room)
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.path, "lock"))

    def empty_staging(self) -> None:
        """Delete what an earlier process left half-done."""
        with storage_errors("deleting leftovers", self.staging):
            for name in os.listdir(self.staging):
                remove_tree(os.path.join(self.staging, name))

    def set_aside(self, path: str) -> str:
        """Rename a file or directory into staging/, out of sight; returns where it is now."""
        aside = os.path.join(self.staging, secrets.token_hex(8))
        os.rename(path, aside)
        return aside

    def discard(self, path: str) -> None:
        """Delete a directory so that it is never found half-deleted."""
        remove_tree(self.set_aside(path))


class StagedLayer:
    """A layer in the making. A context manager: leaving it deletes what was not committed."""

    def __init__(self, work_dir: WorkDir, digest: Digest) -> None:
        self._container = os.path.join(work_dir.staging, f"{digest.hex[:12]}-{secrets.token_hex(8)}")
        with storage_errors(f"staging layer {digest}", work_dir.staging):
            os.mkdir(self._container, 0o700)
            os.mkdir(self.directory, 0o755)

    @property
    def directory(self) -> str:
        """Where to unpack to: an empty directory, 0755, owned by root."""
        return os.path.join(self._container, "layer")

    @property
    def record_path(self) -> str:
        """Where to put the layer's record; nothing is there yet."""
        return os.path.join(self._container, "record")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with storage_errors("deleting what was staged", self._container):
            remove_tree(self._container)
