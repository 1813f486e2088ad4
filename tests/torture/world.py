"""Images whose unpacked entries are known in advance.

The layers use few names in few directories, so that they replace, hide and delete each other's entries. The
expected result of unpacking a layer, and of stacking layers, is computed here from the entries of the tar,
independently of the product.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import random
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support import images
from support.images import Compression, Entry, Image, Layer
from support.trees import Node, differences, tree

_DIRECTORIES: Final = ("a", "a/b", "a/b/c", "d", "d/e", "f", "f/a", "g")
_NAMES: Final = ("a", "b", "c", "e", "one", "two", "three", "four", "five", "six")
_COMPRESSIONS: Final[tuple[Compression, ...]] = ("gzip", "gzip", "zstd", "none")
_NOTHING_ELSE: Final = frozenset[bytes]()


@dataclass(frozen=True)
class KnownLayer:
    """A layer, and its expected form on disk.

    Attributes:
        layer: its tar and its blob.
        nodes: its entries except whiteouts, by path.
        whiteouts: paths that it deletes from the layers below.
        opaque: its directories that hide the entries of the layers below.
    """

    layer: Layer
    nodes: Mapping[bytes, Node] = field(repr=False)
    whiteouts: frozenset[bytes]
    opaque: frozenset[bytes]

    def violations(self, directory: Path) -> list[str]:
        """What is wrong with a directory that should be this layer, unpacked for overlayfs; a line each."""
        found = tree(directory)
        hidden = {path for path in found if _is_whiteout(os.path.join(os.fsencode(directory), path))}
        wrong = differences(_without(found, hidden | {b""}), self.nodes)
        wrong += [f"{path!r}: is a whiteout, and should not be" for path in hidden - self.whiteouts]
        wrong += [f"{path!r}: should be a whiteout" for path in self.whiteouts - hidden]
        opaque = {path for path, node in found.items() if node.kind == "directory"}
        opaque = {path for path in opaque if _is_opaque(os.path.join(os.fsencode(directory), path))}
        wrong += [f"{path!r}: is opaque or not, wrongly" for path in opaque ^ self.opaque]
        return [f"{directory}: {one}" for one in wrong]


@dataclass(frozen=True)
class KnownImage:
    """An image, and its expected root filesystem."""

    image: Image
    layers: tuple[KnownLayer, ...]
    nodes: Mapping[bytes, Node] = field(repr=False)

    def violations(self, rootfs: Path, *, besides: frozenset[bytes] = _NOTHING_ELSE) -> list[str]:
        """What is wrong with a root filesystem of this image, except for some names in its root; a line each."""
        found = _without(tree(rootfs), besides | {b""})
        # a file whose other names are hidden is a hard link in overlayfs, but not in a tree unpacked in place
        wrong = differences(_without_lone_links(found), _without_lone_links(self.nodes))
        return [f"{rootfs}: {one}" for one in wrong]


@dataclass(frozen=True)
class World:
    """All images that callers pull."""

    layers: tuple[KnownLayer, ...]
    images: tuple[KnownImage, ...]

    def image(self, image_id: str) -> KnownImage | None:
        """The image with an id."""
        return next((one for one in self.images if one.image.image_id == image_id), None)

    def layer(self, compressed_digest: str) -> KnownLayer | None:
        """The layer with a compressed digest."""
        return next((one for one in self.layers if one.layer.digest == compressed_digest), None)


def make_world(choices: random.Random, *, layers: int = 14, images_: int = 10) -> World:
    """Create images that share layers: one without layers, one with a layer twice, one with many layers."""
    made = [_Composer(choices, big=number % 5 == 0).layer() for number in range(layers)]
    stacks: list[tuple[KnownLayer, ...]] = [(), (made[0], made[1], made[0]), tuple(made)]
    while len(stacks) < images_:
        stacks.append(tuple(choices.sample(made, choices.randint(1, 5))))
    known = [
        KnownImage(
            images.image(*(one.layer for one in stack), process={"Cmd": [f"/{number}"]}), stack, merged(stack)
        )
        for number, stack in enumerate(stacks)
    ]
    return World(tuple(made), tuple(known))


def merged(stack: Sequence[KnownLayer]) -> dict[bytes, Node]:
    """Stack layers, bottom-most first (OCI image specification, layer.md)."""
    topmost = {one.layer.digest: place for place, one in enumerate(stack)}
    visible: dict[bytes, tuple[int, Node]] = {}
    for place, one in enumerate(stack):
        if topmost[one.layer.digest] != place:
            continue
        for path in one.whiteouts:
            visible.pop(path, None)
            _hide(visible, path)
        for path in one.opaque:
            _hide(visible, path)
        for path, node in sorted(one.nodes.items()):
            if node.kind != "directory":
                _hide(visible, path)
            visible[path] = place, node
    return {
        path: dataclasses.replace(
            node,
            links=frozenset(link for link in node.links if link in visible and visible[link][0] == place),
        )
        for path, (place, node) in visible.items()
    }


class _Composer:
    """Builds one random layer: entries of the tar, and the expected result of each."""

    def __init__(self, choices: random.Random, *, big: bool) -> None:
        self._choices = choices
        self._big = big
        self._entries: list[Entry] = []
        self._nodes: dict[bytes, Node] = {}
        self._whiteouts: set[bytes] = set()
        self._opaque: set[bytes] = set()

    def layer(self) -> KnownLayer:
        """Build the layer."""
        choose = self._choices
        chosen = {
            parent
            for one in choose.sample(_DIRECTORIES, choose.randint(2, 5))
            for parent in _and_parents(one)
        }
        for directory in sorted(chosen):
            self._directory(directory)
            taken = {one for one in chosen if one.startswith(f"{directory}/")}
            free = [name for name in _NAMES if f"{directory}/{name}" not in taken]
            for name in choose.sample(free, choose.randint(0, len(free))):
                self._any(f"{directory}/{name}")
        if self._big:
            for number in range(300):
                self._file(f"{min(chosen)}/many-{number}", choose.randrange(20_000))
        made = images.layer(
            *self._entries, compression=choose.choice(_COMPRESSIONS), members=choose.choice((1, 1, 3))
        )
        return KnownLayer(made, self._nodes, frozenset(self._whiteouts), frozenset(self._opaque))

    def _directory(self, path: str) -> None:
        mode = self._choices.choice((0o755, 0o700, 0o1777, 0o500))
        uid, gid, mtime = self._owner_and_time()
        self._entries.append(images.directory(path, mode=mode, uid=uid, gid=gid, mtime=mtime))
        self._nodes[path.encode()] = Node("directory", mode, uid, gid, mtime * 10**9)
        if self._choices.random() < 0.15:
            self._entries.append(images.opaque(path))
            self._opaque.add(path.encode())

    def _any(self, path: str) -> None:
        make: Callable[[str], None] = self._choices.choices(
            (self._file, self._symlink, self._hardlink, self._device, self._fifo, self._whiteout),
            (10, 3, 3, 1, 1, 4),
        )[0]
        make(path)

    def _file(self, path: str, size: int | None = None) -> None:
        content = self._choices.randbytes(self._choices.randrange(5000) if size is None else size)
        mode = self._choices.choice((0o644, 0o600, 0o755, 0o4755, 0o2711, 0o000))
        uid, gid, mtime = self._owner_and_time()
        self._entries.append(images.file(path, content, mode=mode, uid=uid, gid=gid, mtime=mtime))
        content_digest = f"{len(content)} bytes, {hashlib.sha256(content).hexdigest()}"
        self._nodes[path.encode()] = Node("file", mode, uid, gid, mtime * 10**9, content=content_digest)

    def _symlink(self, path: str) -> None:
        target = self._choices.choice(("one", "../a", "/etc/passwd", "/", "nowhere", "../../../../../tmp"))
        uid, gid, mtime = self._owner_and_time()
        self._entries.append(images.symlink(path, target, uid=uid, gid=gid, mtime=mtime))
        self._nodes[path.encode()] = Node("symlink", 0o777, uid, gid, mtime * 10**9, target=target.encode())

    def _hardlink(self, path: str) -> None:
        files = [one for one, node in self._nodes.items() if node.kind == "file"]
        if not files:
            return
        target = self._choices.choice(files)
        self._entries.append(images.hardlink(path, target.decode()))
        links = self._nodes[target].links | {target, path.encode()}
        for link in links:
            self._nodes[link] = dataclasses.replace(self._nodes[target], links=links)

    def _device(self, path: str) -> None:
        numbers = self._choices.choice(((1, 3), (7, 200), (255, 65536)))
        kind = self._choices.choice(("character device", "block device"))
        self._entries.append(
            images.device(path, "char" if kind == "character device" else "block", *numbers, mode=0o640)
        )
        self._nodes[path.encode()] = Node(kind, 0o640, 0, 0, 0, device=numbers)

    def _fifo(self, path: str) -> None:
        self._entries.append(images.fifo(path, mode=0o622))
        self._nodes[path.encode()] = Node("fifo", 0o622, 0, 0, 0)

    def _whiteout(self, path: str) -> None:
        self._entries.append(images.whiteout(path))
        self._whiteouts.add(path.encode())

    def _owner_and_time(self) -> tuple[int, int, int]:
        choose = self._choices
        return choose.choice((0, 0, 1000, 65534)), choose.choice((0, 0, 50)), choose.randrange(1_000_000_000)


def _and_parents(directory: str) -> Iterator[str]:
    return itertools.accumulate(directory.split("/"), "{}/{}".format)


def _hide(visible: dict[bytes, tuple[int, Node]], directory: bytes) -> None:
    """Remove the entries below a directory."""
    for path in [one for one in visible if one.startswith(directory + b"/")]:
        del visible[path]


def _without(nodes: Mapping[bytes, Node], paths: frozenset[bytes] | set[bytes]) -> dict[bytes, Node]:
    return {path: node for path, node in nodes.items() if path not in paths}


def _without_lone_links(nodes: Mapping[bytes, Node]) -> dict[bytes, Node]:
    return {
        path: dataclasses.replace(node, links=frozenset()) if len(node.links) == 1 else node
        for path, node in nodes.items()
    }


def _is_whiteout(path: bytes) -> bool:
    status = os.lstat(path)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _is_opaque(path: bytes) -> bool:
    try:
        return os.getxattr(path, "trusted.overlay.opaque", follow_symlinks=False) == b"y"
    except OSError:
        return False
