"""The files in which a work directory's state is written down, as they are read: whatever has their names."""

from __future__ import annotations

import errno
import os
import stat


class NoFile(Exception):
    """What has a file's name is none, and cannot be read; the message says what it is."""


def read_file(path: str) -> bytes | None:
    """The content of a file; None where there is none.

    Waits for nobody: a fifo has no content, and may never have any.

    Raises:
        NoFile: a directory, a fifo, a device, or a link to nowhere is in its place.
        OSError: the operating system refuses.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        if os.path.islink(path):
            raise NoFile("it is a link to nowhere") from None
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise NoFile(error.strerror or str(error)) from None
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise NoFile("it is a directory" if stat.S_ISDIR(mode) else "it is no file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)
