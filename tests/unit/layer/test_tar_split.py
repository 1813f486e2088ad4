"""Tar-splits: what is written is read again, and nothing else is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from isal.isal_zlib import crc32

from guestpull_server.layer.tar_split import TarSplitError, TarSplitReader, TarSplitWriter

_CONTENTS = st.lists(st.binary(max_size=2000), max_size=6)
_BOUND = 1 << 20


@pytest.fixture
def tar_split() -> Iterator[int]:
    descriptor = os.memfd_create("tar-split")
    yield descriptor
    os.close(descriptor)


def _joined(pieces: Iterator[memoryview]) -> bytes:
    return b"".join(bytes(piece) for piece in pieces)


def _open(path: Path, content: bytes) -> int:
    path.write_bytes(content)
    return os.open(path, os.O_RDONLY)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(literals=_CONTENTS, contents=_CONTENTS, lost=_CONTENTS)
def test_what_was_told_is_read_again(
    tmp_path: Path, literals: list[bytes], contents: list[bytes], lost: list[bytes]
) -> None:
    descriptor = os.memfd_create("tar-split")
    writer = TarSplitWriter(descriptor)
    for literal in literals:
        writer.literal(memoryview(literal))
    for content in contents:
        writer.content(memoryview(content[:7]), False)
        writer.content(memoryview(content[7:]), True)
    for content in lost:
        file = _open(tmp_path / "lost", content)
        writer.replaced(file)
        os.close(file)
    writer.finish()

    reader = TarSplitReader(descriptor)
    assert _joined(reader.headers(_BOUND)) == b"".join(literals)
    assert list(reader.sums) == [crc32(content) for content in contents]
    assert [_joined(reader.replaced(number, _BOUND)) for number in range(reader.replaced_count)] == lost
    os.close(descriptor)


def test_a_large_tar_split_is_read_again(tar_split: int, tmp_path: Path) -> None:
    literal, content = os.urandom(3_000_000), os.urandom(2_000_000)
    writer = TarSplitWriter(tar_split)
    for start in range(0, len(literal), 1000):
        writer.literal(memoryview(literal)[start : start + 1000])
    for number in range(70_000):
        writer.content(memoryview(b"%d" % number), True)
    file = _open(tmp_path / "lost", content)
    writer.replaced(file)
    os.close(file)
    writer.finish()

    reader = TarSplitReader(tar_split)
    assert _joined(reader.headers(1 << 30)) == literal
    assert _joined(reader.replaced(0, 1 << 30)) == content
    assert list(reader.sums) == [crc32(b"%d" % number) for number in range(70_000)]


def test_headers_can_be_read_more_than_once(tar_split: int) -> None:
    writer = TarSplitWriter(tar_split)
    writer.literal(memoryview(b"headers"))
    writer.finish()
    reader = TarSplitReader(tar_split)
    assert [_joined(reader.headers(_BOUND)) for _ in range(2)] == [b"headers"] * 2


def test_a_tar_split_without_its_end_is_refused(tar_split: int) -> None:
    TarSplitWriter(tar_split)
    with pytest.raises(TarSplitError, match="cut short"):
        TarSplitReader(tar_split)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"something else",
        b"guestpull layer record 2\nE\0\0\0\0",
        b"guestpull layer record 1\nX\0\0\0\0",
        b"guestpull layer record 1\nM\0\0\0\0E\0\0\0\0",  # more of nothing
        b"guestpull layer record 1\nS\3\0\0\0abcE\0\0\0\0",  # no sum has 3 bytes
        b"guestpull layer record 1\nS\0\0\0\x7fE\0\0\0\0",
        b"guestpull layer record 1\nH\xff\xff\xff\xffE\0\0\0\0",
        b"guestpull layer record 1\nE\0\0\0\0more",
        b"guestpull layer record 1\nE\4\0\0\0more",
    ],
)
def test_other_formats_are_refused(tar_split: int, content: bytes) -> None:
    os.write(tar_split, content)
    with pytest.raises(TarSplitError):
        TarSplitReader(tar_split)


def test_headers_that_are_not_zstd_are_refused(tar_split: int) -> None:
    os.write(tar_split, b"guestpull layer record 1\nH\5\0\0\0helloE\0\0\0\0")
    with pytest.raises(TarSplitError, match="decompressed"):
        _joined(TarSplitReader(tar_split).headers(_BOUND))


def test_headers_are_bounded(tar_split: int) -> None:
    writer = TarSplitWriter(tar_split)
    for _ in range(100):
        writer.literal(memoryview(bytes(100_000)))
    writer.finish()
    with pytest.raises(TarSplitError, match="larger than"):
        _joined(TarSplitReader(tar_split).headers(_BOUND))


def test_a_missing_content_of_a_replaced_file_is_reported(tar_split: int) -> None:
    TarSplitWriter(tar_split).finish()
    with pytest.raises(TarSplitError, match="replaced file"):
        TarSplitReader(tar_split).replaced(0, _BOUND)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_tar_split_or_refused(content: bytes) -> None:
    descriptor = os.memfd_create("tar-split")
    os.write(descriptor, b"guestpull layer record 1\n" + content)
    try:
        reader = TarSplitReader(descriptor)
        _joined(reader.headers(_BOUND))
        for number in range(reader.replaced_count):
            _joined(reader.replaced(number, _BOUND))
    except TarSplitError:
        pass
    finally:
        os.close(descriptor)
