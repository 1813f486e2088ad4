"""What is made durable when, and in which order; the only place that knows fsync.

Where the work directory is a disk, a power cut must find it true. Where it is memory (tmpfs, ramfs) there is
nothing to lose that the power cut leaves, and nothing is synced.

A layer is committed in this order; each step is durable before the next begins:

  1. the unpacked files in staging/                 syncfs(2): one call instead of one fsync a file
  2. what has its name in layers/ already goes      rename into staging/, fsync of layers/
  3. its line in layer_facts.jsonl                  write, fsync
  4. its record in records/                         rename, fsync of records/
  5. its directory in layers/                       rename, fsync of layers/
  6. meta_store.json names it                       temporary file, fsync, rename, fsync of the directory

A crash before 5 leaves a directory in staging/, which the next start deletes, and perhaps a line of facts that
means nothing, which it strikes out. A crash before 6 leaves a whole layer, which the next start takes in by its
facts. Step 2 comes before step 3 because facts and a directory together are believed, and what lies there without
an entry may be what another program left half unpacked.

An image: its copy in images/ is written before meta_store.json is, and deleted after it. An empty meta_store.json
comes before the first copy: where there are copies and no such file, it was lost.

Nothing is deleted in place. To delete a layer:

  1. meta_store.json forgets it                     as above
  2. its directory, and its record                  rename into staging/, fsync of layers/
  3. the files                                      unlink, one by one
  4. its line of facts is struck out                write, fsync

A crash after 1 leaves a whole layer, which the next start takes in as one that nobody uses (gc deletes it). A
crash after 2 leaves a directory in staging/, and facts without a directory, which the next start deletes.

A bundle:

  1. overlay/<id>/bundle.json.preparing             temporary file, fsync, rename, fsync of both directories
  2. its directories, and its mount                 not synced: the next start undoes what is being prepared
  3. bundle.json.preparing names its config.json    temporary file, fsync, rename, fsync of overlay/<id>/
  4. config.json                                    not synced
  5. overlay/<id>/bundle.json                       temporary file, fsync, rename, fsync of overlay/<id>/

From 5 on the next start knows it. To release it: what we made in its directory goes, then overlay/<id>/ is renamed
into staging/, with an fsync of overlay/. A crash before that leaves a bundle that is not mounted, to be released.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from guestpull_server.linux import syncfs
from guestpull_server.store.filesystems import is_volatile

TEMPORARY: Final = ".new"
"""What the name of a file that is being written ends with; without meaning after a crash."""


class Durability:
    """The syncing of one work directory; does nothing where it is volatile."""

    def __init__(self, directory: str) -> None:
        self._volatile = is_volatile(directory)

    def sync_tree(self, directory: str) -> None:
        """Make all that is below a directory durable (syncfs(2))."""
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

    def append(self, path: str, line: bytes) -> None:
        """Add a line to a file, whole or not at all as far as readers of whole lines can tell."""
        new = not os.path.lexists(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            # what a crash or a full disk left of a line must not spoil this one
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            content = b"\n" + line if torn else line
            if os.write(descriptor, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            if not self._volatile:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new:
            self.sync_names(os.path.dirname(path))

    def replace(self, path: str, content: bytes, mode: int = 0o600) -> None:
        """Give a file new content; readers, and whoever comes after a crash, see all of it or the old one."""
        temporary = path + TEMPORARY
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                if not self._volatile:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self.sync_names(os.path.dirname(path))


@contextmanager
def _opened(directory: str) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
