"""The attributes of directories that a layer has only because something is in them.

A tar may hold `usr/bin/tool` without an entry for `usr` or `usr/bin`. The layer's directory must have both, and
overlayfs, which shows the topmost layer's attributes, would show what we made up in place of what the layers
below say. umoci and containerd, which unpack one layer over the other, leave the lower attributes alone. So do
we: where the topmost occurrence of a directory is implied, the upper directory gets one with the attributes of
the nearest occurrence below that has an entry of its own. The root directory is implied in most layers.

Layers are read here without following a link: each component of a path is known to be a directory before the
next one is looked at, and nothing changes layers once they are in the store.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Final

from guestpull_server.models import StoredLayer

_OPAQUE: Final = "trusted.overlay.opaque"
_OVERLAY_XATTRS: Final = ("trusted.overlay.", "user.overlay.")
_CACHED: Final = 100_000
_ROOT: Final = b""


class _Kind(Enum):
    """What a layer has under a path."""

    ABSENT = "nothing"
    DIRECTORY = "a directory"
    OPAQUE_DIRECTORY = "a directory that hides those below"
    OTHER = "anything else, a whiteout included"


def visible(paths: Sequence[str]) -> Sequence[str]:
    """The layers down to the first whose root is opaque; overlayfs would not look at that.

    Args:
        paths: of layers, topmost first.
    """
    for number, path in enumerate(paths):
        if _is_opaque(os.fsencode(path)):
            return paths[: number + 1]
    return paths


def prepare_upper(layers: Sequence[StoredLayer], upper: str) -> None:
    """Give the upper directory what the merged view must not take from implied directories.

    Args:
        layers: topmost first, each once.
        upper: the new upper directory, empty.
    """
    merged = _Merged(layers)
    upper_bytes = os.fsencode(upper)
    made: list[tuple[bytes, bytes]] = []
    for path in merged.directories_to_correct():
        source = merged.source(path)
        directory = upper_bytes + b"/" + path
        os.mkdir(directory, 0o700)
        made.append((source, directory))
    root_source = merged.source(_ROOT) if layers else None
    # children first: making them has changed their parents' times
    for source, directory in reversed(made):
        _copy_attributes(source, directory)
    if root_source is not None:
        _copy_attributes(root_source, upper_bytes)


@dataclass(frozen=True, slots=True)
class _Layer:
    path: bytes
    implied: frozenset[bytes]


class _Merged:
    """What overlayfs will show of some layers, as far as directories are concerned."""

    def __init__(self, layers: Sequence[StoredLayer]) -> None:
        self._layers = [
            _Layer(os.fsencode(layer.store_path), frozenset(layer.implied_directories)) for layer in layers
        ]
        self._kinds: dict[tuple[int, bytes], _Kind] = {}

    def directories_to_correct(self) -> list[bytes]:
        """Directories, parents first, that are to be made in the upper directory."""
        wrong: set[bytes] = set()
        for path in {path for layer in self._layers for path in layer.implied if path != _ROOT}:
            occurrences = list(self._occurrences(path))
            if not occurrences or not self._is_implied(occurrences[0], path):
                continue
            if any(not self._is_implied(number, path) for number in occurrences):
                wrong.update(_with_parents(path))
        return sorted(wrong)

    def source(self, path: bytes) -> bytes:
        """The directory whose attributes the merged one must have."""
        occurrences = list(self._occurrences(path))
        chosen = next(
            (number for number in occurrences if not self._is_implied(number, path)), occurrences[0]
        )
        return self._layers[chosen].path + b"/" + path

    def _is_implied(self, number: int, path: bytes) -> bool:
        return path in self._layers[number].implied

    def _occurrences(self, path: bytes) -> Iterator[int]:
        """Layers, topmost first, that contribute a directory at this path to the merged view."""
        for number in range(len(self._layers)):
            last = False
            for prefix in (_ROOT, *_with_parents(path)) if path else (_ROOT,):
                kind = self._kind(number, prefix)
                match kind:
                    case _Kind.ABSENT:
                        break
                    case _Kind.OTHER:
                        return
                    case _Kind.OPAQUE_DIRECTORY:
                        # what is below it is hidden, but the attributes of what an implied one replaces are not
                        last = last or prefix != path or not self._is_implied(number, path)
                    case _Kind.DIRECTORY:
                        pass
            else:
                yield number
            if last:
                return

    def _kind(self, number: int, path: bytes) -> _Kind:
        known = self._kinds.get((number, path))
        if known is None:
            if len(self._kinds) >= _CACHED:
                self._kinds.clear()
            known = self._kinds[number, path] = _kind_of(self._layers[number].path + b"/" + path)
        return known


def _with_parents(path: bytes) -> list[bytes]:
    components = path.split(b"/")
    return [b"/".join(components[:length]) for length in range(1, len(components) + 1)]


def _kind_of(path: bytes) -> _Kind:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return _Kind.ABSENT
    if not stat.S_ISDIR(status.st_mode):
        return _Kind.OTHER
    return _Kind.OPAQUE_DIRECTORY if _is_opaque(path) else _Kind.DIRECTORY


def _is_opaque(path: bytes) -> bool:
    with suppress(OSError):
        return os.getxattr(path, _OPAQUE, follow_symlinks=False) == b"y"
    return False


def _copy_attributes(source: bytes, target: bytes) -> None:
    status = os.lstat(source)
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    os.chmod(target, stat.S_IMODE(status.st_mode))
    for name in _xattr_names(source):
        if not name.startswith(_OVERLAY_XATTRS):
            os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _xattr_names(path: bytes) -> list[str]:
    """The extended attributes of a file; none where its file system has no such thing (squashfs without)."""
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return []
        raise
