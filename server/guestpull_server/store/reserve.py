"""Room on the disk that nobody else gets: a removal needs some before it gives any back.

To forget an image is to write meta_store.json anew, beside the old one. On a full disk that would fail, and what
fills the disk could not be removed. So the room for it is taken while there is some, by a file without a name,
which goes with this process.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

from guestpull_server.models import KiB

# for the copies of entries that change with it, and for blocks that are not full
_SLACK_BYTES: Final = 64 * KiB


class Reserve:
    """The reserve of one work directory. Not thread-safe.

    Args:
        directory: where the room is taken; its file system may know no files without a name, or be full: then
            there is none.
    """

    def __init__(self, directory: str) -> None:
        self._length = 0
        try:
            self._file = os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        except OSError:
            self._file = -1

    def keep(self, length: int) -> None:
        """Have room for a file of so many bytes, and some more, if there is that much."""
        if self._file >= 0 and self._length < length + _SLACK_BYTES // 2:
            with suppress(OSError):
                os.posix_fallocate(self._file, 0, length + length // 4 + _SLACK_BYTES)
                self._length = os.fstat(self._file).st_size

    def give_up(self) -> bool:
        """Give the room back, for others to take; whether there was any."""
        had, self._length = self._length > 0, 0
        if had:
            os.ftruncate(self._file, 0)
        return had

    def close(self) -> None:
        """Give everything back. Harmless to repeat."""
        if self._file >= 0:
            os.close(self._file)
            self._file, self._length = -1, 0
