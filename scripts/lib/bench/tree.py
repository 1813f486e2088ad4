"""The tree of the main image: files of this machine's /usr, chosen to have the sizes of a real image.

A Debian image with Python, compilers or a web stack has about 19 KB per entry and compresses by a factor of 3
to 4. Such images consist of files of /usr, so these are taken: directory by directory, in a shuffled but
constant order, without files over 24 MiB, and with bytes in step with entries. From a small /usr, files are
taken several times, and each copy is altered at its beginning.

As in real images, the upper of the two layers replaces, removes and hides some entries of the lower one.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import os
import random
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Final, Literal, TypeAlias, cast

import msgspec

from bench.layers import LayerWriter

Kind: TypeAlias = Literal["file", "directory", "symlink"]

_SOURCE: Final = "/usr"
_MAX_FILE_BYTES: Final = 24 * 1024 * 1024
_AHEAD_BYTES: Final = 48 * 1024 * 1024  # how far bytes may be ahead of entries
_LINKED: Final = 150  # every 150th file has a hard link
_OWNED: Final = 40  # every 40th file has another owner than root
_ALTERED: Final = 60  # files that the upper layer replaces, and as many that it removes
_LOWER_SHARE: Final = 0.58  # of the bytes; the rest is in the upper layer
_HIDDEN_DIRECTORY: Final = "opt/hidden"  # the upper layer makes it opaque
_EPOCH: Final = 1_700_000_000  # seconds; the time of generated entries


@dataclass(frozen=True, slots=True)
class Size:
    """The minimum size of the tree: bytes of files, and number of entries."""

    content_bytes: int
    entries: int


class Node(msgspec.Struct, frozen=True, array_like=True):
    """One path of the tree, as expected after a pull.

    `content` is the SHA-256 of a file, the target of a symlink, or empty for a directory; `twin` is another
    path of the same file, or empty. Paths have no leading slash. Times are in whole seconds.
    """

    path: str
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime: int
    content: str = ""
    twin: str = ""


@dataclass(frozen=True, slots=True)
class Pick:
    """A path of a layer and the source of its content; `size` is the source's size when it was chosen.

    The content is `prefix` and then that of `source`, if any. With `twin`, the path is a hard link.
    """

    path: str
    kind: Kind
    mode: int
    mtime: int
    uid: int = 0
    gid: int = 0
    source: str = ""
    size: int = 0
    prefix: bytes = b""
    target: str = ""
    twin: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """The content of one layer's tar; `removed` paths and `opaque` directories become whiteouts."""

    picks: tuple[Pick, ...]
    removed: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()


def choose(wanted: Size) -> tuple[Layer, Layer]:
    """Choose the content of the lower and the upper layer."""
    picks = sorted(_linked(_picked(wanted)), key=lambda one: one.path)
    sizes = list(itertools.accumulate(one.size for one in picks))
    cut = bisect.bisect(sizes, _LOWER_SHARE * sizes[-1])
    lower, upper = picks[:cut], picks[cut:]
    names = {one.path for one in upper}
    # the target of a hard link must be in the same layer
    upper = [replace(one, twin="") if one.twin and one.twin not in names else one for one in upper]

    twins = {one.twin for one in lower}
    plain = [one for one in lower if one.kind == "file" and not one.twin and one.path not in twins]
    chosen = random.Random(2).sample(plain, 2 * _ALTERED)
    replaced = [replace(one, prefix=b"replaced\n") for one in chosen[:_ALTERED]]
    removed = tuple(one.path for one in chosen[_ALTERED:])
    hidden = [_made(f"{_HIDDEN_DIRECTORY}/{number}") for number in range(20)]
    shown = _made(f"{_HIDDEN_DIRECTORY}/shown")

    return (
        Layer(_with_directories([*lower, *hidden])),
        Layer(_with_directories([*upper, *replaced, shown], removed), removed, (_HIDDEN_DIRECTORY,)),
    )


def merged(lower: Sequence[Node], upper: Sequence[Node], above: Layer) -> list[Node]:
    """Merge the two layers."""
    hidden = tuple(f"{directory}/" for directory in above.opaque)
    gone = set(above.removed)
    tree = {node.path: node for node in lower if node.path not in gone and not node.path.startswith(hidden)}
    tree |= {node.path: node for node in upper}
    return [tree[path] for path in sorted(tree)]


def write_layer(layer: Layer, writer: LayerWriter) -> list[Node]:
    """Write a layer's tar; return the paths that it adds or changes."""
    nodes: list[Node] = []
    contents: dict[str, str] = {}
    with tarfile.open(fileobj=cast("IO[bytes]", writer), mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for path, pick in sorted(_entries(layer), key=lambda one: one[0]):
            if pick is None:
                tar.addfile(tarfile.TarInfo(path))
            else:
                nodes.append(_add(tar, pick, contents))
    return nodes


# -- choosing ---------------------------------------------------------------------------------------------


def _picked(wanted: Size) -> list[Pick]:
    """Choose files and symlinks until both bounds are reached, with bytes in step with entries."""
    average = wanted.content_bytes / wanted.entries
    picks: list[Pick] = []
    directories: set[str] = set()
    taken_bytes = 0
    for copy in range(1000):
        for pick in _files(copy):
            entries = len(picks) + len(directories)
            if entries >= wanted.entries and taken_bytes >= wanted.content_bytes:
                return picks
            if taken_bytes + pick.size > average * (entries + 1) + _AHEAD_BYTES:
                continue
            picks.append(pick)
            directories.add(os.path.dirname(pick.path))
            taken_bytes += pick.size
    raise AssertionError(f"{_SOURCE} has too few files for an image")


def _files(copy: int) -> Iterator[Pick]:
    """All usable files of the source, in a shuffled order of directories."""
    root = "usr" if copy == 0 else f"opt/copy{copy}"
    directories: list[tuple[str, list[str]]] = []
    for directory, below, names in os.walk(_SOURCE):
        links = [name for name in below if os.path.islink(os.path.join(directory, name))]
        directories.append((directory, sorted([*names, *links])))
    directories.sort()
    random.Random(copy).shuffle(directories)
    for directory, names in directories:
        for name in names:
            source = os.path.join(directory, name)
            found = os.lstat(source)
            if not source.isprintable() or found.st_size > _MAX_FILE_BYTES:
                continue
            path = root + source[len(_SOURCE) :]
            mtime = int(found.st_mtime)
            if stat.S_ISLNK(found.st_mode):
                target = os.readlink(source)
                if target.isprintable():
                    yield Pick(path, "symlink", 0o777, mtime, target=target)
            elif stat.S_ISREG(found.st_mode):
                prefix = f"copy {copy}\n".encode() if copy else b""
                mode = stat.S_IMODE(found.st_mode)
                yield Pick(path, "file", mode, mtime, source=source, size=found.st_size, prefix=prefix)


def _linked(picks: Sequence[Pick]) -> Iterator[Pick]:
    """Give some files another owner, and some a second name."""
    for number, pick in enumerate(picks):
        if pick.kind != "file":
            yield pick
        elif number % _OWNED == 0:
            yield replace(pick, uid=1000, gid=33)
        else:
            yield pick
            if number % _LINKED == 1:
                yield replace(pick, path=f"{pick.path}.link", size=0, twin=pick.path)


def _with_directories(picks: Sequence[Pick], mentioned: Sequence[str] = ()) -> tuple[Pick, ...]:
    """Put each directory before its entries; add the directories of `mentioned` paths too."""
    directories: set[str] = set()
    for path in [*(one.path for one in picks), *mentioned]:
        directory = os.path.dirname(path)
        while directory and directory not in directories:
            directories.add(directory)
            directory = os.path.dirname(directory)
    made = [Pick(path, "directory", 0o755, _EPOCH) for path in directories]
    # this order also puts hard links after their files, because of their names
    return tuple(sorted([*made, *picks], key=lambda one: one.path))


def _made(path: str) -> Pick:
    return Pick(path, "file", 0o644, _EPOCH, prefix=b"made for the benchmark\n")


# -- writing ----------------------------------------------------------------------------------------------


def _entries(layer: Layer) -> Iterator[tuple[str, Pick | None]]:
    """The paths of a layer's tar; those of whiteouts have no pick."""
    for path in layer.removed:
        directory, _, name = path.rpartition("/")
        yield f"{directory}/.wh.{name}", None
    for directory in layer.opaque:
        yield f"{directory}/.wh..wh..opq", None
    for pick in layer.picks:
        yield pick.path, pick


def _add(tar: tarfile.TarFile, pick: Pick, contents: dict[str, str]) -> Node:
    header = tarfile.TarInfo(pick.path)
    header.mode, header.mtime, header.uid, header.gid = pick.mode, pick.mtime, pick.uid, pick.gid
    digest = pick.target
    if pick.kind == "directory":
        header.type = tarfile.DIRTYPE
        tar.addfile(header)
    elif pick.kind == "symlink":
        header.type, header.linkname = tarfile.SYMTYPE, pick.target
        tar.addfile(header)
    elif pick.twin:
        header.type, header.linkname = tarfile.LNKTYPE, pick.twin
        tar.addfile(header)
        digest = contents[pick.twin]
    else:
        content = pick.prefix + _content(pick.source)
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))
        digest = contents[pick.path] = hashlib.sha256(content).hexdigest()
    return Node(pick.path, pick.kind, pick.mode, pick.uid, pick.gid, pick.mtime, digest, pick.twin)


def _content(source: str) -> bytes:
    if not source:
        return b""
    with open(source, "rb") as file:
        return file.read()
