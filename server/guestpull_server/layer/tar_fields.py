"""The fields of tar headers: octal and base-256 numbers, pax records, times.

Follows POSIX.1-2017 (pax) and, for base-256 numbers, GNU tar's documentation.
"""

from __future__ import annotations

from typing import Final

from guestpull_server.layer.refusals import TarError

NANOSECONDS: Final = 1_000_000_000
_INT64: Final = 1 << 63
_OCTAL: Final = b"01234567"
_LONG_SECONDS: Final = 18  # digits


def number(field: bytes) -> int:
    """Parse a numeric header field: octal digits, or base-256 if its first bit is set.

    Raises:
        TarError: the field is neither, or exceeds 64 bits.
    """
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        bits = 8 * len(field)
        # the marker bit is not part of the number; the next bit is its sign
        value = value - (1 << bits) if field[0] & 0x40 else value - (1 << (bits - 1))
        if not -_INT64 <= value < _INT64:
            raise TarError("a number in a header exceeds 64 bits")
        return value
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if digits.translate(None, _OCTAL):
        raise TarError(f"a header has {field!r} in place of an octal number")
    return int(digits, 8)


def pax_records(content: bytes) -> list[tuple[bytes, bytes]]:
    r"""Parse the records of one pax extended header, `<length> <key>=<value>\n`, in order.

    Raises:
        TarError: a record is malformed.
    """
    records: list[tuple[bytes, bytes]] = []
    position = 0
    while position < len(content):
        space = content.find(b" ", position, position + 20)
        digits = content[position:space] if space > 0 else b""
        if not digits.isdigit():
            raise TarError("a pax record does not begin with its length")
        end = position + int(digits)
        if not space + 1 < end <= len(content) or content[end - 1] != 0x0A:
            raise TarError("a pax record does not end where its length says")
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not equals or not key:
            raise TarError("a pax record has no key")
        records.append((key, value))
        position = end
    return records


def decimal(value: bytes, key: str) -> int:
    """Parse the decimal integer of a pax record.

    Raises:
        TarError: the value is not an integer, or exceeds 64 bits.
    """
    digits = value[1:] if value[:1] == b"-" else value
    if not digits.isdigit() or len(digits) > 19 or not -_INT64 <= (parsed := int(value)) < _INT64:
        raise TarError(f"pax record {key} is {value[:40]!r}, not a number")
    return parsed


def nanoseconds(value: bytes, key: str) -> int:
    """Parse the time of a pax record, decimal seconds with any number of decimals, as nanoseconds.

    Digits below a nanosecond are dropped, as in Go.

    Raises:
        TarError: the value is not a time, or its seconds exceed 64 bits.
    """
    seconds, _, fraction = value.partition(b".")
    if fraction.isdigit() and seconds.isdigit() and len(seconds) < _LONG_SECONDS:
        return int(seconds + (fraction + b"00000000")[:9])  # half the cost of what follows
    if fraction and not fraction.isdigit():
        raise TarError(f"pax record {key} is {value[:40]!r}, not a time")
    whole = decimal(seconds, key) * NANOSECONDS
    part = int(fraction[:9].ljust(9, b"0")) if fraction else 0
    time = whole - part if seconds.startswith(b"-") else whole + part
    if time < -_INT64 * NANOSECONDS:
        raise TarError(f"pax record {key} is {value[:40]!r}, before any time that a file can have")
    return time
