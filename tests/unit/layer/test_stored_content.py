"""The stored bytes of plain and of sparse files, and what lies in holes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.layer.changes import Changes
from guestpull_server.layer.expected import Directory, File
from guestpull_server.layer.sparse import SparseMap
from guestpull_server.layer.stored_content import PIECE_BYTES, content_of, is_hole, stored_part


def _file(size: int, sparse_map: SparseMap | None = None) -> File:
    return File(Directory(None, b"", 0o755, 0, 0, 0), b"f", 0o100644, 0, 0, 0, size, sparse_map)


@pytest.fixture
def opened() -> Iterator[int]:
    descriptor = os.memfd_create("content")
    yield descriptor
    os.close(descriptor)


@st.composite
def _sparse(draw: st.DrawFn) -> tuple[bytes, SparseMap]:
    gaps = draw(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=6))
    content, segments = bytearray(), []
    for gap, length in gaps:
        content += bytes(gap)
        segments.append((len(content), length))
        content += draw(st.binary(min_size=length, max_size=length))
    content += bytes(draw(st.integers(0, 50)))
    return bytes(content), SparseMap(tuple(segments), len(content))


@given(sparse=_sparse(), piece=st.integers(1, 60))
def test_segments_are_cut_from_a_files_bytes(sparse: tuple[bytes, SparseMap], piece: int) -> None:
    content, sparse_map = sparse
    parts = (memoryview(content)[start : start + piece] for start in range(0, len(content), piece))
    found = b"".join(bytes(one) for one in stored_part(parts, _file(len(content), sparse_map)))
    assert found == b"".join(content[start : start + length] for start, length in sparse_map.segments)


@given(sparse=_sparse())
def test_segments_are_read_from_an_open_file(sparse: tuple[bytes, SparseMap]) -> None:
    content, sparse_map = sparse
    descriptor = os.memfd_create("content")
    os.write(descriptor, content)
    changes = Changes(10)
    found = b"".join(bytes(one) for one in content_of(descriptor, _file(len(content), sparse_map), changes))
    os.close(descriptor)
    assert found == b"".join(content[start : start + length] for start, length in sparse_map.segments)
    assert changes.found == []


def test_something_in_a_hole_is_told(opened: int) -> None:
    os.truncate(opened, 1_000_000)
    os.pwrite(opened, b"x", 600_000)
    changes = Changes(10)
    sparse_map = SparseMap(((0, 10), (700_000, 10)), 1_000_000)
    assert sum(len(one) for one in content_of(opened, _file(1_000_000, sparse_map), changes)) == 20
    assert len(changes.found) == 1


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
def test_a_plain_file_is_read_whole_and_no_further(opened: int, size: int) -> None:
    content = os.urandom(size)
    os.write(opened, content + b"more")
    assert b"".join(bytes(one) for one in content_of(opened, _file(size), Changes(1))) == content


def test_a_file_that_is_shorter_than_it_should_be_ends(opened: int) -> None:
    os.write(opened, b"short")
    assert b"".join(bytes(one) for one in content_of(opened, _file(1_000_000), Changes(1))) == b"short"


@pytest.mark.parametrize(
    ("at", "start", "end", "empty"),
    [
        (500, 0, 400, True),
        (500, 0, 501, False),
        (500, 501, 9000, True),
        (500, 500, 500, True),
        (9000, 0, 9000, True),
    ],
)
def test_a_hole_is_where_nothing_but_zeros_is(
    opened: int, at: int, start: int, end: int, empty: bool
) -> None:
    os.truncate(opened, 10_000)
    os.pwrite(opened, b"x", at)
    assert is_hole(opened, start, end) is empty


def test_zeros_that_were_written_are_a_hole(opened: int) -> None:
    os.write(opened, bytes(1_000_000))
    assert is_hole(opened, 0, 1_000_000)
