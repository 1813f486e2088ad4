"""The ring: what is written comes out, whatever the pieces; neither side waits for one that has gone."""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import random
import termios
import threading
from array import array
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.layer.ring import RingReader, RingWriter
from guestpull_server.models import KiB, MiB
from support.waiting import end_of, until

_NOISE = random.Random(7).randbytes(8 * MiB)


@pytest.fixture
def writer() -> Iterator[RingWriter]:
    one = RingWriter()
    yield one
    one.close()


def _reader(writer: RingWriter) -> RingReader:
    """The other end, as a worker gets it."""
    reader = RingReader(*(os.dup(descriptor) for descriptor in writer.descriptors))
    writer.hand_over()
    return reader


def _spans_in(announced: int) -> int:
    """How many spans of a ring, of 256 KiB each, are announced and not read."""
    unread = array("i", [0])
    fcntl.ioctl(announced, termios.FIONREAD, unread)
    return unread[0] // 4


def _through_a_ring(pieces: Sequence[bytes]) -> bytes:
    writer = RingWriter()
    reader = _reader(writer)

    def write() -> None:
        for piece in pieces:
            writer.write(memoryview(piece))
        writer.finish()

    thread = threading.Thread(target=write)
    thread.start()
    came = b"".join(bytes(span) for span in iter(reader.next_span, None))
    thread.join()
    writer.close()
    return came


@given(st.lists(st.integers(0, 700 * KiB), max_size=12))
def test_what_is_written_comes_out(lengths: list[int]) -> None:
    ends = list(itertools.accumulate(lengths, initial=0))
    pieces = [_NOISE[start:end] for start, end in itertools.pairwise(ends)]
    assert _through_a_ring(pieces) == b"".join(pieces)


def test_pieces_of_a_byte_each_fill_no_pipe() -> None:
    noise = _NOISE[:100_000]
    assert _through_a_ring([noise[at : at + 1] for at in range(len(noise))]) == noise


def test_what_is_written_can_be_read_at_once(writer: RingWriter) -> None:
    reader = _reader(writer)
    writer.write(memoryview(b"a"))
    span = reader.next_span()
    assert span is not None
    assert bytes(span) == b"a"


def test_a_span_stays_as_it_is_until_the_next_is_asked_for(writer: RingWriter) -> None:
    announced = os.dup(writer.descriptors[1])
    reader = _reader(writer)
    writer.write(memoryview(bytes(256 * KiB)))
    span = reader.next_span()
    assert span is not None

    def fill() -> None:
        writer.write(memoryview(b"\xff" * (4 * MiB)))
        writer.finish()

    filler = threading.Thread(target=fill, daemon=True)
    filler.start()
    until("all but the span that is read is filled", lambda: _spans_in(announced) == 7)
    os.close(announced)
    filler.join(0.1)  # for one that does not wait then
    assert bytes(span) == bytes(256 * KiB)
    for _ in iter(reader.next_span, None):
        pass
    end_of(filler)


def test_the_end_is_told_again_and_again(writer: RingWriter) -> None:
    reader = _reader(writer)
    writer.finish()
    assert reader.next_span() is None
    assert reader.next_span() is None


def test_the_writer_does_not_wait_for_a_reader_that_has_gone(writer: RingWriter) -> None:
    writer.hand_over()
    with pytest.raises(BrokenPipeError):
        writer.write(memoryview(_NOISE))


def test_a_writer_that_waits_hears_that_the_reader_goes(writer: RingWriter) -> None:
    memory, announced, give_back = (os.dup(descriptor) for descriptor in writer.descriptors)
    writer.hand_over()
    os.close(memory)

    def go_once_it_is_full() -> None:
        try:
            until("the ring is full", lambda: _spans_in(announced) == 8)
        finally:
            os.close(give_back)

    going = threading.Thread(target=go_once_it_is_full)
    going.start()
    with pytest.raises(BrokenPipeError):
        writer.write(memoryview(_NOISE))
    end_of(going)
    os.close(announced)


def test_the_reader_can_neither_write_nor_shrink_the_memory(writer: RingWriter) -> None:
    memory = writer.descriptors[0]
    with pytest.raises(PermissionError):
        mmap.mmap(memory, 2 * MiB)
    with pytest.raises(PermissionError):
        os.ftruncate(memory, 0)
    with pytest.raises(PermissionError):
        os.pwrite(memory, b"x", 0)


def test_closing_twice_is_harmless_and_leaves_no_descriptors() -> None:
    before = set(os.listdir("/proc/self/fd"))  # of which others may close some meanwhile
    writer = RingWriter()
    writer.close()
    writer.close()
    assert set(os.listdir("/proc/self/fd")) <= before
