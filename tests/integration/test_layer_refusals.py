"""A layer that cannot be unpacked cannot be proved: extraction and replay refuse the same, for the same reason."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from guestpull_server.config import Limits
from guestpull_server.errors import CorruptLayer, LimitExceeded
from guestpull_server.layer import LayerWorkers
from guestpull_server.layer.refusals import LayerLimitExceeded, TarError
from guestpull_server.layer.replay import Replay
from support.images import Entry, device, directory, fifo, file, hardlink, layer, symlink, whiteout
from support.reading import pieces
from support.unpacking import Unpacker


def _extraction(disk: Path, limits: Limits, entries: Sequence[Entry]) -> str:
    """The limit that the extraction reports, "corrupt", or nothing."""
    workers = LayerWorkers(limits)
    try:
        Unpacker(disk, workers).unpack_layer(layer(*entries, tar_format=tarfile.PAX_FORMAT))
    except LimitExceeded as error:
        return error.limit
    except CorruptLayer:
        return "corrupt"
    finally:
        workers.close()
    return ""


def _replay(limits: Limits, entries: Sequence[Entry]) -> str:
    """The same of the replay of a tar whose contents are left out."""
    headers = b"".join(
        one.header.tobuf(tarfile.PAX_FORMAT) + bytes(-len(one.content) % 512) for one in entries
    )
    try:
        Replay(pieces(headers, 700), limits).apply_all()
    except LayerLimitExceeded as error:
        return error.limit
    except TarError:
        return "corrupt"
    return ""


def _chain(links: int) -> list[Entry]:
    chain = [symlink(f"l{number}", f"l{number + 1}") for number in range(links)]
    return [*chain, directory(f"l{links}")]


def _growing_links() -> list[Entry]:
    part = "d" * 200
    links = [symlink("l0", part), *(symlink(f"l{one}", f"l{one - 1}/{part}") for one in range(1, 15))]
    return [*links, *(file(f"l{number}/f") for number in range(15))]


def _xattr(value: str, name: str = "user.a") -> dict[str, str]:
    return {f"SCHILY.xattr.{name}": value}


def _owned(one: Entry, uid: int) -> Entry:
    one.header.uid = uid
    return one


_BOUNDS: dict[str, tuple[Limits, Sequence[Entry]]] = {
    "max_layer_entries": (Limits(max_layer_entries=10), [file(str(number)) for number in range(11)]),
    "max_layer_bytes": (Limits(max_layer_bytes=5000), [file("a", b"a" * 3000), file("b", b"b" * 2001)]),
    "max_layer_bytes, replaced": (Limits(max_layer_bytes=5000), [file("a", b"a" * 3000), file("a", b"b" * 2001)]),
    "max_path_bytes": (Limits(max_path_bytes=99), [file("long" * 25)]),
    "max_path_bytes, a target": (Limits(max_path_bytes=99), [symlink("link", "long" * 25)]),
    "max_path_bytes, by links": (Limits(max_path_bytes=2000), _growing_links()),
    "max_path_depth": (Limits(max_path_depth=20), [file("d/" * 21 + "f")]),
    "max_path_depth, by a link": (
        Limits(max_path_depth=20),
        [file("d/" * 15 + "f"), symlink("l", "d/" * 15), file("l/" + "e/" * 6 + "f")],
    ),
    "max_implied_directories": (Limits(max_implied_directories=10), [file(f"{number}/f") for number in range(11)]),
    "max_implied_path_bytes": (Limits(max_implied_path_bytes=19), [file("a/b/c/d/f")]),
    "max_implied_path_bytes, revived": (
        Limits(max_implied_path_bytes=9),
        [whiteout("a"), file("a/b/c/f"), whiteout("d"), file("d/f")],
    ),
    "max_xattr_bytes": (Limits(max_xattr_bytes=10), [file("f", pax=_xattr("x" * 11))]),
    "max_xattr_bytes, a directory": (Limits(max_xattr_bytes=10), [directory("d", pax=_xattr("x" * 11))]),
    "max_xattr_bytes, any namespace": (Limits(max_xattr_bytes=10), [file("f", pax=_xattr("x" * 11, "other.a"))]),
    "max_header_bytes": (Limits(max_header_bytes=1024), [file("f", pax={"comment": "c" * 2000})]),
}  # fmt: skip

_CORRUPT: dict[str, Sequence[Entry]] = {
    "an owner beyond 32 bits": [file("f", uid=1 << 32)],
    "the owner that means none": [directory("d", gid=(1 << 32) - 1)],
    "a directory's owner, the second time": [directory("d"), directory("d", uid=1 << 32)],
    "the root's owner": [directory("./", uid=1 << 32)],
    "a device's number": [device("d", "char", 1 << 12, 0)],
    "a symbolic link without a target": [symlink("s", "")],
    "a hard link to itself": [file("f"), hardlink("f", "f")],
    "a hard link to nothing": [hardlink("a", "missing")],
    "a hard link to a directory": [directory("d"), hardlink("a", "d")],
    "a hard link to what is in its way": [file("d/f"), hardlink("d", "d/f")],
    "a whiteout of nothing": [file(".wh.")],
    "a whiteout of the directory itself": [file("d/.wh..")],
    "an xattr without a name": [file("f", pax=_xattr("x", ""))],
    "a file for a root": [file(".")],
    "a fifo for a root": [fifo("..")],
    "a parent that is a file": [file("a"), file("a/b")],
    "a parent that is a whiteout's file": [file("a"), hardlink("b", "a"), file("b/c")],
    "256 links": [*_chain(256), file("l0/f")],
    "links that never end": [symlink("a", "b"), symlink("b", "a/x"), file("a/f")],
    "a hard link through 256 links": [*_chain(256), file("l256/f"), hardlink("h", "l0/f")],
}

_TAKEN: dict[str, tuple[Limits, Sequence[Entry]]] = {
    "as many entries": (Limits(max_layer_entries=10), [file(str(number)) for number in range(10)]),
    "as many bytes": (Limits(max_layer_bytes=5000), [file("a", b"a" * 3000), file("b", b"b" * 2000)]),
    "as long a path": (Limits(max_path_bytes=100), [file("long" * 25), symlink("link", "long" * 25)]),
    "as deep a path": (Limits(max_path_depth=20), [file("d/" * 20 + "f")]),
    "as many directories": (Limits(max_implied_directories=10), [file(f"{number}/f") for number in range(10)]),
    "as many directories as are left": (
        Limits(max_implied_directories=3),
        [file("a/b/f"), file("a", b"file"), directory("c"), file("d/e/g/f")],
    ),
    "as many bytes of paths": (Limits(max_implied_path_bytes=20), [file("a/b/c/d/f")]),
    "as large an xattr": (Limits(max_xattr_bytes=10), [file("f", pax=_xattr("x" * 10))]),
    "an xattr that is dropped": (
        Limits(max_xattr_bytes=10),
        [file("f", pax=_xattr("x" * 11, "trusted.overlay.a"))],
    ),
    "255 links": (Limits(), [*_chain(255), file("l0/f")]),
    "a hard link through as many": (Limits(), [*_chain(255), file("l255/f"), hardlink("h", "l0/f")]),
    "a hard link by a way out of nowhere": (
        Limits(),
        [file("d/f"), symlink("s", "missing/../d"), hardlink("h", "s/f")],
    ),
    "a hard link's own owner": (Limits(), [file("f"), _owned(hardlink("h", "f"), 1 << 32)]),
}  # fmt: skip


@pytest.mark.parametrize("case", _BOUNDS)
def test_a_bound_of_the_extraction_is_one_of_the_proof(disk: Path, case: str) -> None:
    limits, entries = _BOUNDS[case]
    limit = case.partition(",")[0]
    assert (_extraction(disk, limits, entries), _replay(limits, entries)) == (limit, limit)


@pytest.mark.parametrize("case", _CORRUPT)
def test_what_cannot_be_unpacked_cannot_be_proved(disk: Path, case: str) -> None:
    entries = _CORRUPT[case]
    assert (_extraction(disk, Limits(), entries), _replay(Limits(), entries)) == ("corrupt", "corrupt")


@pytest.mark.parametrize("case", _TAKEN)
def test_what_is_within_the_bounds_is_taken_by_both(disk: Path, case: str) -> None:
    limits, entries = _TAKEN[case]
    assert (_extraction(disk, limits, entries), _replay(limits, entries)) == ("", "")
