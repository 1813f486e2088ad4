"""Numbers, times and pax records of tar headers."""

from __future__ import annotations

import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.layer.refusals import TarError
from guestpull_server.layer.tar_fields import decimal, nanoseconds, number, pax_records


@given(st.integers(0, 8**7 - 1))
def test_octal_numbers_read_as_tarfile_writes_them(value: int) -> None:
    header = tarfile.TarInfo()
    header.uid = value
    assert number(header.tobuf(tarfile.USTAR_FORMAT)[108:116]) == value


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_base_256_numbers_read_as_gnu_tar_writes_them(value: int) -> None:
    header = tarfile.TarInfo()
    header.mtime = value
    assert number(header.tobuf(tarfile.GNU_FORMAT)[136:148]) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"        ", 0),
        (b"\0\0\0\0\0\0\0\0", 0),
        (b" 644 \0\0\0", 0o644),
        (b"0000644\0", 0o644),
        (b"00000644", 0o644),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff", -1),
        (b"\x80\0\0\0\0\0\0\x05", 5),
    ],
)
def test_padded_and_base_256_numbers_are_read(field: bytes, value: int) -> None:
    assert number(field) == value


@pytest.mark.parametrize(
    "field",
    [
        b"0000648\0",
        b"0x644\0\0\0",
        b"-644\0\0\0\0",
        b"6_44\0\0\0\0",
        b"+644\0\0\0\0",
        b"644\0junk",
        b"\x80" + b"\xff" * 11,
    ],
)
def test_what_is_no_number_of_64_bits_is_refused(field: bytes) -> None:
    with pytest.raises(TarError):
        number(field)


@given(st.binary(min_size=8, max_size=12))
def test_any_field_is_a_number_of_64_bits_or_refused(field: bytes) -> None:
    try:
        value = number(field)
    except TarError:
        return
    assert -(1 << 63) <= value < 1 << 63


def _record(key: bytes, value: bytes) -> bytes:
    tail = b" " + key + b"=" + value + b"\n"
    length = len(tail)
    while len(tail) + len(str(length)) != length:
        length = len(tail) + len(str(length))
    return str(length).encode() + tail


_KEYS = st.binary(min_size=1, max_size=40).filter(lambda key: b"=" not in key)


@given(st.lists(st.tuples(_KEYS, st.binary(max_size=200)), max_size=8))
def test_pax_records_come_back_in_their_order(records: list[tuple[bytes, bytes]]) -> None:
    content = b"".join(_record(key, value) for key, value in records)
    assert pax_records(content) == records


@given(st.binary(max_size=300))
def test_any_bytes_are_pax_records_or_refused(content: bytes) -> None:
    try:
        records = pax_records(content)
    except TarError:
        return
    assert b"".join(_record(key, value) for key, value in records) == content or content.startswith(b"0")


@pytest.mark.parametrize(
    "content",
    [
        b"5 a=b\n",  # too short
        b"7 a=b\n",  # too long
        b"6 a=bc\n",
        b"6 a=b\0",
        b"6 abc\n",
        b"6 =bc\n",
        b" 6 a=b\n",
        b"-6 a=b\n",
        b"0 a=b\n",
        b"999999999999999999999 a=b\n",
    ],
)
def test_malformed_pax_records_are_refused(content: bytes) -> None:
    with pytest.raises(TarError):
        pax_records(content)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"0", 0),
        (b"1.5", 1_500_000_000),
        (b"1.", 1_000_000_000),
        (b"1.000000001", 1_000_000_001),
        (b"1.0000000019", 1_000_000_001),
        (b"-1.5", -1_500_000_000),
        (b"-0.5", -500_000_000),
        (b"-9223372036854775808", -(1 << 63) * 10**9),
        (b"9223372036854775807.5", ((1 << 63) - 1) * 10**9 + 500_000_000),
    ],
)
def test_times_are_read_to_the_nanosecond(text: bytes, value: int) -> None:
    assert nanoseconds(text, "mtime") == value


@pytest.mark.parametrize(
    "text", [b"", b".", b"now", b"1.x", b"1e3", b"--1", b"9" * 19, b"1.5 ", b"-9223372036854775808.5"]
)
def test_what_is_no_time_is_refused(text: bytes) -> None:
    with pytest.raises(TarError):
        nanoseconds(text, "mtime")


@pytest.mark.parametrize("text", [b"", b"-", b"1.0", b" 1", b"9" * 19, b"1" * 40, b"0x1"])
def test_what_is_no_decimal_of_64_bits_is_refused(text: bytes) -> None:
    with pytest.raises(TarError):
        decimal(text, "size")
