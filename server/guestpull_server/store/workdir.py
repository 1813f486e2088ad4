"""The work directory as a place: its directories, its one owner, and what is on its way out.

    <work_dir>/lock        held by the process that owns the work directory
    <work_dir>/layers/     unpacked layers
    <work_dir>/records/    what each layer's tar held besides file contents
    <work_dir>/images/     copies of the images' entries in meta_store.json
    <work_dir>/overlay/    upper and work directories of bundles
    <work_dir>/staging/    what is not believed: layers in the making, and what is being deleted

All rooms are 0700, whoever made them: see access.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from guestpull_server import config
from guestpull_server.errors import StorageFailed, WorkDirInUse, WorkDirReplaced, storage_errors
from guestpull_server.models import Digest
from guestpull_server.store import catalog, facts
from guestpull_server.store.access import secure_room, secure_work_dir
from guestpull_server.store.durability import TEMPORARY
from guestpull_server.store.filesystems import is_read_only
from guestpull_server.store.reserve import Reserve
from guestpull_server.store.trees import remove_tree

LOCK: Final = "lock"
ROOMS: Final = ("layers", "records", "images", "overlay", "staging")
RECORD_SUFFIX: Final = ".record"
_EPOCH: Final = "SOURCE_DATE_EPOCH"


def rooms_of(work_dir: str) -> tuple[str, ...]:
    """The directories of a work directory."""
    return tuple(os.path.join(work_dir, room) for room in ROOMS)


def files_of(work_dir: str) -> tuple[str, ...]:
    """The files of a work directory, those that are there and those that may come."""
    names = (config.FILE_NAME, catalog.FILE_NAME, facts.FILE_NAME, LOCK)
    return tuple(os.path.join(work_dir, f"{name}{end}") for name in names for end in ("", TEMPORARY))


def _own_names(work_dir: str) -> frozenset[str]:
    own = (*rooms_of(work_dir), *files_of(work_dir))
    return frozenset(os.path.basename(path) for path in own)


class WorkDir:
    """One work directory, owned by this process from here to `close`.

    Attributes:
        path: where it is; `layers`, `records`, `images`, `overlay` and `staging` are its rooms.
        keeps_its_layers: layers/ is mounted read-only: nothing comes into it, and nothing goes.
        reserve: room for a removal on a full disk.

    Raises:
        WorkDirInUse: another process owns it.
        InsecureWorkDir: another user could put files in it, or reach what is in its rooms.
        StorageFailed: it cannot be made or used.
        WorkDirReplaced: others delete it at this moment.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.layers, self.records, self.images, self.overlay, self.staging = rooms_of(path)
        try:
            with storage_errors("opening the work directory", path):
                self._lock = self._made_and_locked()
        except StorageFailed as error:
            if isinstance(error.__cause__, FileNotFoundError):  # what was just made
                raise WorkDirReplaced(path) from error
            raise
        self.reserve = Reserve(path)

    def _made_and_locked(self) -> int:
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        # before anything is opened in it: a name there may be somebody else's link
        secure_work_dir(self.path, _own_names(self.path))
        lock = _locked(self.path)
        try:
            for room in rooms_of(self.path):
                os.makedirs(room, mode=0o700, exist_ok=True)
                secure_room(room)
            self.keeps_its_layers = is_read_only(self.layers)
            # while the lock's file is open, no other file gets its number
            names = (os.path.join(self.path, LOCK), *rooms_of(self.path))
            self._identities = {name: _identity(name) for name in names}
        except BaseException:
            os.close(lock)
            raise
        return lock

    def is_in_place(self) -> bool:
        """Whether the path still leads to what was opened, and all of it is there; some microseconds."""
        try:
            is_same = all(_identity(path) == identity for path, identity in self._identities.items())
        except OSError:
            return False
        # looked at last: once the lock is released, a new file may have the number of ours
        return is_same and self._lock >= 0

    def check(self) -> None:
        """Do nothing as long as the work directory is in place.

        Raises:
            WorkDirReplaced: it is not; or it was closed, and may be another's by now.
        """
        if not self.is_in_place():
            raise WorkDirReplaced(self.path)

    def close(self) -> None:
        """Give the work directory back. Harmless to repeat."""
        self.reserve.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def record_path(self, layer_directory: str) -> str:
        """Where the record of a layer is; the layer is given by its directory, or by its name in layers/."""
        return os.path.join(self.records, os.path.basename(layer_directory) + RECORD_SUFFIX)

    def tidy(self) -> None:
        """Leave nothing but images and layers, and no time of now: the same layers give the same bytes.

        Times are those of SOURCE_DATE_EPOCH (reproducible-builds.org), or 0; layers keep their own.
        """
        with storage_errors("tidying the work directory", self.path):
            os.unlink(os.path.join(self.path, LOCK))
            for room in (self.staging, self.overlay, self.records, self.images, self.layers):
                with suppress(OSError):  # what is not empty stays
                    os.rmdir(room)
            epoch = os.environ.get(_EPOCH, "")
            seconds = int(epoch) if epoch.isdecimal() else 0
            for name in sorted(os.listdir(self.path)):
                path = os.path.join(self.path, name)
                if path in (self.records, self.images):
                    for inner in os.listdir(path):
                        os.utime(os.path.join(path, inner), (seconds, seconds), follow_symlinks=False)
                if name in ROOMS or not os.path.isdir(path):
                    os.utime(path, (seconds, seconds), follow_symlinks=False)
            os.utime(self.path, (seconds, seconds))

    def leftovers(self) -> list[str]:
        """What an earlier process left half-done, or half-deleted."""
        with storage_errors("looking for leftovers", self.path):
            staged = [os.path.join(self.staging, name) for name in sorted(os.listdir(self.staging))]
        unfinished = [
            os.path.join(self.path, name + TEMPORARY) for name in (catalog.FILE_NAME, facts.FILE_NAME)
        ]
        return staged + [path for path in unfinished if os.path.lexists(path)]

    def set_aside(self, path: str) -> str:
        """Rename a file or directory into staging/, out of sight; returns where it is now.

        Where its room is a mount of its own, it is hidden there, under a name that belongs to nothing.
        """
        name = secrets.token_hex(8)
        aside = os.path.join(self.staging, name)
        try:
            os.rename(path, aside)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            aside = os.path.join(os.path.dirname(path), f".{name}")
            os.rename(path, aside)
        return aside

    def discard(self, path: str) -> None:
        """Delete a directory so that it is never found half-deleted."""
        remove_tree(self.set_aside(path))


def owner_of(work_dir: str) -> str | None:
    """The process that owns a work directory now; None if none does. Changes nothing there."""
    try:
        descriptor = os.open(os.path.join(work_dir, LOCK), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _said_owner(descriptor)
    finally:
        os.close(descriptor)
    return None


def _locked(work_dir: str) -> int:
    """Take the lock; returns its descriptor, which holds it until it is closed."""
    path = os.path.join(work_dir, LOCK)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_still(path, descriptor):
                os.close(descriptor)
                continue
        except BlockingIOError:
            owner = _said_owner(descriptor)
            os.close(descriptor)
            raise WorkDirInUse(work_dir, owner) from None
        with suppress(OSError):  # a full disk takes no process id, and must be emptied all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        return descriptor


def _is_still(path: str, descriptor: int) -> bool:
    """Whether the file that was locked is the one that others will try to lock: `tidy` deletes it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _said_owner(descriptor: int) -> str:
    owner = os.pread(descriptor, 20, 0).strip().decode(errors="replace")
    return f"process {owner}" if owner.isdecimal() else "another process"


class StagedLayer:
    """A layer in the making. A context manager: leaving it deletes what was not committed."""

    def __init__(self, work_dir: WorkDir, digest: Digest) -> None:
        self._container = os.path.join(work_dir.staging, f"{digest.hex[:12]}-{secrets.token_hex(8)}")
        with storage_errors(f"staging layer {digest}", work_dir.staging):
            os.mkdir(self._container, 0o700)
            try:
                os.mkdir(self.directory, 0o755)
                os.chmod(self.directory, 0o755)  # whatever the umask is: it is a part of the layer
            except BaseException:
                os.rmdir(self._container)
                raise

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
