"""A ring buffer in shared memory that carries a layer's bytes from the daemon to a worker.

    daemon: RingWriter.write copies bytes into the ring and announces how many
    worker: RingReader.next_span returns the bytes in place; the next call releases them

A pipe would copy each byte twice, into the kernel and out of it, with fresh pages in between. That is 3 % of
the CPU time of a cold pull for gzip, and a tenth for a plain tar, which the worker reads in place.
Announcements and releases are numbers in two pipes, so that either side waits in read(2) and sees there when
the other one has ended.

The worker only reads: the kernel forbids it to map the memory for writing, and both sides to resize it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
from array import array
from contextlib import ExitStack
from typing import Final

from guestpull_server.models import KiB, MiB

_BYTES: Final = 2 * MiB
_SPAN_BYTES: Final = 256 * KiB  # the most that is announced and released at once
_NUMBER_BYTES: Final = 4
_MAX_SPANS: Final = 512  # that are not released: even the smallest pipe, one page, holds as many numbers
_F_SEAL_FUTURE_WRITE: Final = 0x10  # Linux 5.1; Python has no name for it
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


class RingWriter:
    """The daemon's end, for one thread.

    Attributes:
        descriptors: the arguments of RingReader. `hand_over` closes them here.

    Raises:
        OSError: too many files are open, or memory is exhausted.
    """

    def __init__(self) -> None:
        with ExitStack() as on_failure:

            def kept(descriptor: int) -> int:
                on_failure.callback(os.close, descriptor)
                return descriptor

            memory = kept(os.memfd_create("guestpull layer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(memory, _BYTES)
            announced, self._announce = map(kept, os.pipe())
            self._given_back, give_back = map(kept, os.pipe())
            self._memory = mmap.mmap(memory, _BYTES)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
            on_failure.pop_all()
        self.descriptors = [memory, announced, give_back]
        self._bytes = memoryview(self._memory)
        self._position = 0
        self._free = _BYTES
        self._spans = 0

    def hand_over(self) -> None:
        """Close the worker's descriptors here, so that only the worker has them and its end can be seen."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def write(self, piece: memoryview) -> None:
        """Write bytes; blocks while the ring is full, or while there are too many spans.

        The bound on spans keeps the pipes from filling up, in which case both sides would wait for each other.

        Raises:
            BrokenPipeError: the worker has ended.
        """
        while piece:
            if not self._free or self._spans == _MAX_SPANS:
                self._wait()
            length = min(len(piece), self._free, _SPAN_BYTES, _BYTES - self._position)
            self._bytes[self._position : self._position + length] = piece[:length]
            os.write(self._announce, length.to_bytes(_NUMBER_BYTES, sys.byteorder))
            self._position = (self._position + length) % _BYTES
            self._free -= length
            self._spans += 1
            piece = piece[length:]

    def finish(self) -> None:
        """Tell the worker that these were all bytes. Harmless if repeated."""
        if self._announce >= 0:
            os.close(self._announce)
            self._announce = -1

    def close(self) -> None:
        """Release everything; the worker sees the end of the bytes. Harmless if repeated."""
        self.hand_over()
        self.finish()
        if self._given_back >= 0:
            os.close(self._given_back)
            self._given_back = -1
            self._bytes.release()
            self._memory.close()

    def _wait(self) -> None:
        # each number is written by one system call, so that none is cut
        numbers = array("I", os.read(self._given_back, _MAX_SPANS * _NUMBER_BYTES))
        if not numbers:
            raise BrokenPipeError
        self._free += sum(numbers)
        self._spans -= len(numbers)


class RingReader:
    """The worker's end.

    Args:
        memory: descriptor of the memory; it is closed.
        announced: descriptor that says how many bytes came.
        give_back: descriptor that takes how many bytes are released.
    """

    def __init__(self, memory: int, announced: int, give_back: int) -> None:
        self._bytes = memoryview(mmap.mmap(memory, _BYTES, prot=mmap.PROT_READ))
        os.close(memory)
        self._announced = announced
        self._give_back = give_back
        self._position = 0
        self._lent = b""

    def next_span(self) -> memoryview | None:
        """Return the next bytes in place, valid until the next call; None at the end and after it."""
        if self._lent:
            os.write(self._give_back, self._lent)
        self._lent = os.read(self._announced, _NUMBER_BYTES)
        if not self._lent:
            return None
        start = self._position
        end = start + int.from_bytes(self._lent, sys.byteorder)
        self._position = end % _BYTES
        return self._bytes[start:end]
