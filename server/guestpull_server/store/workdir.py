"""The work directory: its directories, its lock, staging.

    <work_dir>/lock        held by the process that owns the work directory
    <work_dir>/layers/     unpacked layers
    <work_dir>/records/    metadata of each layer, and its tar-split: what its tar held besides file contents
    <work_dir>/images/     backups of the images' entries in meta_store.json, and image indexes
    <work_dir>/overlay/    upper and work directories of bundles
    <work_dir>/staging/    layers being unpacked, and whatever is being deleted; meaningless after a crash

All of these directories are 0700, whoever created them (access.py).
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
from guestpull_server.store import layer_metadata, meta_store
from guestpull_server.store.access import secure_directory, secure_work_dir
from guestpull_server.store.durability import TEMPORARY, PreallocatedSpace
from guestpull_server.store.filesystem import is_read_only, remove_tree

LOCK: Final = "lock"
DIRECTORIES: Final = ("layers", "records", "images", "overlay", "staging")
TAR_SPLIT_SUFFIX: Final = ".record"
_EPOCH: Final = "SOURCE_DATE_EPOCH"


def directories_of(work_dir: str) -> tuple[str, ...]:
    """Return the paths of a work directory's directories."""
    return tuple(os.path.join(work_dir, name) for name in DIRECTORIES)


def files_of(work_dir: str) -> tuple[str, ...]:
    """Return the paths of all files that a work directory may have."""
    names = (config.FILE_NAME, meta_store.FILE_NAME, layer_metadata.OLD_FILE_NAME, LOCK)
    return tuple(os.path.join(work_dir, f"{name}{end}") for name in names for end in ("", TEMPORARY))


def _own_names(work_dir: str) -> frozenset[str]:
    own = (*directories_of(work_dir), *files_of(work_dir))
    return frozenset(os.path.basename(path) for path in own)


class WorkDir:
    """A work directory that this process owns until `close`.

    Attributes:
        path: the work directory; `layers`, `records`, `images`, `overlay` and `staging` are its directories.
        keeps_its_layers: layers/ is mounted read-only, so no layer is added or deleted.
        preallocated_space: space for a removal on a full disk.

    Raises:
        WorkDirInUse: another process owns it.
        InsecureWorkDir: another user could put files in it, or reach what is in its directories.
        StorageFailed: it cannot be created or used.
        WorkDirReplaced: somebody deletes it at this moment.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.layers, self.records, self.images, self.overlay, self.staging = directories_of(path)
        try:
            with storage_errors("opening the work directory", path):
                self._lock = self._create_and_lock()
        except StorageFailed as error:
            if isinstance(error.__cause__, FileNotFoundError):  # what was just created
                raise WorkDirReplaced(path) from error
            raise
        self.preallocated_space = PreallocatedSpace(path)

    def _create_and_lock(self) -> int:
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        # before anything is opened in it: a name there may be another user's link
        secure_work_dir(self.path, _own_names(self.path))
        lock = _lock(self.path)
        try:
            for directory in directories_of(self.path):
                os.makedirs(directory, mode=0o700, exist_ok=True)
                secure_directory(directory)
            self.keeps_its_layers = is_read_only(self.layers)
            # as long as the lock file is open, no other file gets its inode number
            names = (os.path.join(self.path, LOCK), *directories_of(self.path))
            self._identities = {name: _identity(name) for name in names}
        except BaseException:
            os.close(lock)
            raise
        return lock

    def is_in_place(self) -> bool:
        """Return whether the path still leads to what was opened, and all of it is there. Takes microseconds."""
        try:
            is_same = all(_identity(path) == identity for path, identity in self._identities.items())
        except OSError:
            return False
        # checked last: once the lock is released, a new file may have the inode number of ours
        return is_same and self._lock >= 0

    def check(self) -> None:
        """Ensure that the work directory is in place.

        Raises:
            WorkDirReplaced: it is not, or it was closed and may have another owner.
        """
        if not self.is_in_place():
            raise WorkDirReplaced(self.path)

    def close(self) -> None:
        """Release the work directory's lock. May be repeated."""
        self.preallocated_space.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def tar_split_path(self, layer_directory: str) -> str:
        """Return the path of a layer's tar-split, given the path or the name of the layer's directory."""
        return os.path.join(self.records, os.path.basename(layer_directory) + TAR_SPLIT_SUFFIX)

    def metadata_path(self, layer_directory: str) -> str:
        """Return the path of a layer's metadata, given the path or the name of the layer's directory."""
        return os.path.join(self.records, os.path.basename(layer_directory) + layer_metadata.SUFFIX)

    def tidy(self) -> None:
        """Delete everything but images and layers, and reset all times: the same layers give the same bytes.

        Times become SOURCE_DATE_EPOCH (reproducible-builds.org) or 0; files in layers keep theirs.
        """
        with storage_errors("tidying the work directory", self.path):
            os.unlink(os.path.join(self.path, LOCK))
            for directory in (self.staging, self.overlay, self.records, self.images, self.layers):
                with suppress(OSError):  # it is not empty
                    os.rmdir(directory)
            epoch = os.environ.get(_EPOCH, "")
            seconds = int(epoch) if epoch.isdecimal() else 0
            for name in sorted(os.listdir(self.path)):
                path = os.path.join(self.path, name)
                if path in (self.records, self.images):
                    for inner in os.listdir(path):
                        os.utime(os.path.join(path, inner), (seconds, seconds), follow_symlinks=False)
                if name in DIRECTORIES or not os.path.isdir(path):
                    os.utime(path, (seconds, seconds), follow_symlinks=False)
            os.utime(self.path, (seconds, seconds))

    def leftovers(self) -> list[str]:
        """Return what an earlier process left half written or half deleted."""
        with storage_errors("looking for leftovers", self.path):
            staged = [os.path.join(self.staging, name) for name in sorted(os.listdir(self.staging))]
            half_written = [
                os.path.join(self.records, name)
                for name in sorted(os.listdir(self.records))
                if name.endswith(layer_metadata.SUFFIX + TEMPORARY)
            ]
        names = (meta_store.FILE_NAME, layer_metadata.OLD_FILE_NAME)
        half_written += [os.path.join(self.path, name + TEMPORARY) for name in names]
        return staged + [path for path in half_written if os.path.lexists(path)]

    def set_aside(self, path: str) -> str:
        """Rename a file or directory into staging/, and return its new path.

        If its parent is a mount of its own, it stays in that mount, under a hidden name that belongs to nothing.
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
        """Delete a directory so that nobody finds it half deleted under its name."""
        remove_tree(self.set_aside(path))


def is_set_aside(path: str) -> bool:
    """Return whether a running store is deleting a path outside of staging/."""
    return os.path.basename(path).startswith(".")


def owner_of(work_dir: str) -> str | None:
    """Return the process that owns a work directory, or None. Changes nothing."""
    try:
        descriptor = os.open(os.path.join(work_dir, LOCK), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner_in(descriptor)
    finally:
        os.close(descriptor)
    return None


def _lock(work_dir: str) -> int:
    """Take the lock, and return the descriptor that holds it until it is closed."""
    path = os.path.join(work_dir, LOCK)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_still(path, descriptor):
                os.close(descriptor)
                continue
        except BlockingIOError:
            owner = _owner_in(descriptor)
            os.close(descriptor)
            raise WorkDirInUse(work_dir, owner) from None
        with suppress(OSError):  # on a full disk there is no room for the process id
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        return descriptor


def _is_still(path: str, descriptor: int) -> bool:
    """Return whether the locked file is the one that others will try to lock: `tidy` deletes it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _owner_in(descriptor: int) -> str:
    owner = os.pread(descriptor, 20, 0).strip().decode(errors="replace")
    return f"process {owner}" if owner.isdecimal() else "another process"


class StagedLayer:
    """A layer that is being unpacked. A context manager: leaving it deletes what was not committed."""

    def __init__(self, work_dir: WorkDir, digest: Digest) -> None:
        self._container = os.path.join(work_dir.staging, f"{digest.hex[:12]}-{secrets.token_hex(8)}")
        with storage_errors(f"staging layer {digest}", work_dir.staging):
            os.mkdir(self._container, 0o700)
            try:
                os.mkdir(self.directory, 0o755)
                os.chmod(self.directory, 0o755)  # whatever the umask is: the mode is part of the layer
            except BaseException:
                os.rmdir(self._container)
                raise

    @property
    def directory(self) -> str:
        """The directory to unpack to: empty, 0755, owned by root."""
        return os.path.join(self._container, "layer")

    @property
    def tar_split_path(self) -> str:
        """Where to write the layer's tar-split."""
        return os.path.join(self._container, "record")

    @property
    def metadata_path(self) -> str:
        """Where the commit writes the layer's metadata."""
        return os.path.join(self._container, "metadata")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with storage_errors("deleting what was staged", self._container):
            remove_tree(self._container)
