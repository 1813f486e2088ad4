"""What is made durable when, and in which order. Only this module calls fsync.

On a disk, the work directory must be consistent after a power cut. In memory (tmpfs, ramfs) nothing survives a
power cut, so nothing is synced.

Commit of a layer. Each step is durable before the next one begins:

  1. staging/<id>/: the unpacked layer, its tar-split, its metadata     syncfs(2): one call for all of it
  2. move away anything that has the layer's name in layers/            rename to staging/, fsync layers/
  3. records/<name>.json and records/<name>.record                      renames, fsync records/
  4. layers/<name>/                                                     rename, fsync layers/
  5. meta_store.json has the layer's entry                              temporary file, fsync, rename, fsync

After a crash before step 4, the next start deletes what is in staging/, and metadata and tar-splits without a
directory. After a crash before step 5, the layer is complete, and the next start adds its entry from its metadata.
Step 2 precedes step 3 because a directory that has metadata is trusted, and a directory that was there before may
be one that another program has half unpacked.

An image: its backup in images/ is written before meta_store.json, and deleted after it. An empty meta_store.json
is written before the first backup: backups without a meta_store.json mean that the file was lost.

Deletion of a layer. Nothing is deleted in place:

  1. meta_store.json no longer has the layer's entry                    as above
  2. the directory                                                      rename to staging/, fsync layers/
  3. its metadata and tar-split                                         renames to staging/, fsync records/
  4. the files in staging/                                              unlink, one by one; not synced

After a crash before step 2, the layer is complete, and the next start adds it again as an unused layer, which gc
deletes. After a crash before step 3, the metadata has no directory, and the next start deletes it. Step 2 precedes
step 3 because a directory without metadata would be foreign: only gc would delete it.

A bundle:

  1. overlay/<id>/bundle.json.preparing                                 temporary file, fsync, rename, fsync twice
  2. its directories and its mount                                      not synced: the next start undoes them
  3. bundle.json.preparing identifies the bundle's config.json          temporary file, fsync, rename, fsync
  4. config.json                                                        not synced
  5. overlay/<id>/bundle.json                                           temporary file, fsync, rename, fsync

From step 5 on, the next start knows the bundle. To release it, delete what we created in its directory, then
rename overlay/<id>/ to staging/ and fsync overlay/. After a crash before that, the bundle is not mounted, and is
still to be released.

A store of an earlier version has layer_facts.jsonl instead of the metadata files. The next start that may write:

  1. records/<name>.json for each layer that is there                   temporary files, renames, syncfs
  2. delete layer_facts.jsonl                                           unlink, fsync of the work directory

As long as layer_facts.jsonl exists, both are read, and a metadata file takes precedence over a line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from guestpull_server.linux import syncfs
from guestpull_server.models import KiB
from guestpull_server.store.filesystem import is_volatile

TEMPORARY: Final = ".new"
"""The suffix of files that are being written. Such files are meaningless after a crash."""

# for backups of entries that change at the same time, and for partly filled blocks
_SLACK_BYTES: Final = 64 * KiB


class Durability:
    """Syncs one work directory. Does nothing if the directory is volatile."""

    def __init__(self, directory: str) -> None:
        self._volatile = is_volatile(directory)

    def sync_tree(self, directory: str) -> None:
        """Make everything below a directory durable (syncfs(2))."""
        if self._volatile:
            return
        with _opened(directory) as descriptor:
            syncfs(descriptor, directory)

    def sync_names(self, directory: str) -> None:
        """Make the names in a directory durable."""
        if self._volatile:
            return
        with _opened(directory) as descriptor:
            os.fsync(descriptor)

    def replace(self, path: str, content: bytes, mode: int = 0o600) -> None:
        """Replace a file. Readers, and the next start after a crash, see either the new content or the old one."""
        self._write(path, content, mode, sync=not self._volatile)
        self.sync_names(os.path.dirname(path))

    def replace_unsynced(self, path: str, content: bytes, mode: int = 0o600) -> None:
        """Replace a file like `replace`, but leave it to the caller to make it durable."""
        self._write(path, content, mode, sync=False)

    def _write(self, path: str, content: bytes, mode: int, *, sync: bool) -> None:
        temporary = path + TEMPORARY
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        try:
            create(temporary, content, mode, sync=sync)
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def create(path: str, content: bytes, mode: int = 0o600, *, sync: bool = False) -> None:
    """Write a file that does not exist yet. A crash may leave half of it, so its name must be meaningless then.

    Raises:
        OSError: the operating system refuses.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PreallocatedSpace:
    """Preallocated disk space, so that images can be removed when the disk is full. Not thread-safe.

    Removing an image writes a new meta_store.json beside the old one before it frees any space. The space for that
    is allocated in advance, in a file without a name, which disappears with this process.

    Args:
        directory: where to allocate. If its file system is full or does not support files without a name, nothing
            is allocated.
    """

    def __init__(self, directory: str) -> None:
        self._length = 0
        try:
            self._file = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError:
            self._file = -1

    def keep(self, length: int) -> None:
        """Allocate space for a file of this many bytes, with some slack, if there is enough."""
        if self._file >= 0 and self._length < length + _SLACK_BYTES // 2:
            with suppress(OSError):
                os.posix_fallocate(self._file, 0, length + length // 4 + _SLACK_BYTES)
                self._length = os.fstat(self._file).st_size

    def release(self) -> bool:
        """Free the space for others to use; return whether there was any."""
        had, self._length = self._length > 0, 0
        if had:
            os.ftruncate(self._file, 0)
        return had

    def close(self) -> None:
        """Free the space for good. May be repeated."""
        if self._file >= 0:
            os.close(self._file)
            self._file, self._length = -1, 0


@contextmanager
def _opened(directory: str) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
