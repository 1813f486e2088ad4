"""Damages valid inputs.

There are three kinds of damage. Bytes are changed, moved, repeated and cut. JSON values are swapped, or
replaced by odd ones. Fields of tar headers are changed and the checksum is corrected, because nothing after a
header with a wrong checksum is read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

Mutate: TypeAlias = Callable[[random.Random, Sequence[bytes]], bytes]
"""Creates a damaged input from valid ones."""

_BLOCK: Final = 512
_INTERESTING: Final = (
    b"\0",
    b"\xff",
    b"\x80",
    b"\x7f",
    b"0",
    b"9",
    b"-1",
    b"/",
    b"..",
    b" ",
    b"\n",
    b"=",
    b":",
    b"@",
)
_FIELDS: Final = (  # of a tar header: start, length
    (0, 100), (100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (329, 8),
    (337, 8), (345, 155), (482, 1), (483, 12), (386, 24), (410, 24),
)  # fmt: skip
_NUMBERS: Final = (
    b"0", b"7777777", b"77777777777", b"00000000001", b"-1", b"8", b"\x80" + b"\xff" * 11, b"\xff" * 12,
    b"\x80" + b"\0" * 7 + b"\x01\0\0\0", b"1000", b"00000002000",
)  # fmt: skip
_PATHS: Final = (
    b"..", b"/", b".", b"", b"a/../..", b".wh.a", b".wh..wh..opq", b".wh.", b"../../x", b"a", b"d/f", b"d", b"s",
    b"s/f", b"./", b"h", b"x" * 100,
)  # fmt: skip
_ODD: Final[tuple[object, ...]] = (
    None, True, 0, -1, 1 << 63, 1e400, "", "sha256:", "sha256:" + "0" * 64, [], {}, [[]], {"": None}, "\0",
    "\ud800", "/", "..", "x" * 5000, ["sha256:" + "f" * 64] * 3,
)  # fmt: skip


def bytes_of(source: random.Random, corpus: Sequence[bytes]) -> bytes:
    """Damage bytes, without regard to their meaning."""
    damaged = bytearray(source.choice(corpus))
    for _ in range(1 + int(source.expovariate(0.4))):
        _damage(source, damaged, corpus)
    return bytes(damaged)


def _damage(source: random.Random, damaged: bytearray, corpus: Sequence[bytes]) -> None:
    at = source.randrange(len(damaged) + 1)
    length = min(source.choice((1, 2, 4, 8, 64, 512)), len(damaged) - at)
    match source.randrange(7):
        case 0 if at < len(damaged):
            damaged[at] ^= 1 << source.randrange(8)
        case 1 if at < len(damaged):
            damaged[at] = source.randrange(256)
        case 2:
            damaged[at:at] = source.choice(_INTERESTING)
        case 3:
            del damaged[at : at + length]
        case 4:
            damaged[at:at] = damaged[at : at + length] * source.choice((1, 2, 50))
        case 5:
            other = source.choice(corpus)
            start = source.randrange(len(other) + 1)
            damaged[at:] = other[start:]
        case _:
            damaged[at : at + length] = source.randbytes(length)


def json_of(source: random.Random, corpus: Sequence[bytes]) -> bytes:
    """Damage the structure of JSON documents; sometimes their bytes."""
    if source.random() < 0.2:
        return bytes_of(source, corpus)
    document = json.loads(source.choice(corpus))
    others = [value for one in corpus for value in _values(json.loads(one))]
    for _ in range(1 + int(source.expovariate(0.7))):
        document = _changed(source, document, others)
    return json.dumps(document).encode()


def _values(document: object) -> list[object]:
    found = [document]
    if isinstance(document, dict):
        found += [inner for value in document.values() for inner in _values(value)]
    elif isinstance(document, list):
        found += [inner for value in document for inner in _values(value)]
    return found


def _changed(source: random.Random, document: object, others: Sequence[object]) -> object:
    if isinstance(document, dict) and document and source.random() < 0.8:
        key = source.choice(sorted(document))
        changed = dict(document)
        match source.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[source.choice((key.upper(), "", key + "x", key[:-1]))] = changed.pop(key)
            case _:
                changed[key] = _changed(source, document[key], others)
        return changed
    if isinstance(document, list) and document and source.random() < 0.8:
        place = source.randrange(len(document))
        inner = _changed(source, document[place], others)
        match source.randrange(6):
            case 0:
                return document[:place] + document[place + 1 :]
            case 1:
                return document + [document[place]] * source.choice((1, 600))
            case _:
                return [*document[:place], inner, *document[place + 1 :]]
    return source.choice(_ODD) if source.random() < 0.6 else source.choice(others)


def tar_of(source: random.Random, corpus: Sequence[bytes]) -> bytes:
    """Damage headers of tars."""
    damaged = bytearray(source.choice(corpus))
    if source.random() < 0.15:
        damaged = bytearray(bytes_of(source, corpus))
    headers = [
        start
        for start in range(0, len(damaged) - _BLOCK + 1, _BLOCK)
        if damaged[start + 257 : start + 262] == b"ustar"
    ]
    for _ in range(1 + int(source.expovariate(0.3))):
        if headers:
            _damage_header(source, damaged, source.choice(headers), headers)
    for start in headers:
        _mend_checksum(damaged, start)
    if source.random() < 0.1:
        del damaged[source.randrange(len(damaged) + 1) :]
    return bytes(damaged)


def _damage_header(source: random.Random, damaged: bytearray, start: int, headers: Sequence[int]) -> None:
    field, length = source.choice(_FIELDS)
    place = slice(start + field, start + field + length)
    match source.randrange(7):
        case 0:
            damaged[start + 156] = source.choice(b"01234567xgLKSVD\0Z")
        case 1:
            damaged[start + 124 : start + 136] = source.choice(_NUMBERS).ljust(12, b"\0")[:12]
        case 2:
            damaged[place] = source.choice(_NUMBERS).ljust(length, b"\0")[:length]
        case 3:
            target = source.choice((slice(start, start + 100), slice(start + 157, start + 257)))
            damaged[target] = source.choice(_PATHS).ljust(100, b"\0")
        case 4:
            other = source.choice(headers)
            damaged[start : start + _BLOCK] = damaged[other : other + _BLOCK]
        case 5:
            at = start + source.randrange(2 * _BLOCK)
            damaged[at % len(damaged)] = source.randrange(256)
        case _:
            damaged[place] = source.randbytes(length)


def _mend_checksum(damaged: bytearray, start: int) -> None:
    if start + _BLOCK <= len(damaged):
        damaged[start + 148 : start + 156] = b" " * 8
        damaged[start + 148 : start + 156] = b"%06o\0 " % sum(damaged[start : start + _BLOCK])
