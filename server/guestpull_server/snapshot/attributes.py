"""Sets the attributes of implied directories: those that a layer has without a tar entry.

A tar may contain `usr/bin/tool` without entries for `usr` and `usr/bin`. The layer's directory must have both,
with attributes that the extractor chose, and overlayfs shows the attributes of the topmost layer. umoci and
containerd, which unpack one layer over the other, keep those of the lower layers. To get the same result, the
upper directory gets a copy of each directory whose topmost occurrence is implied, with the attributes of the
nearest lower occurrence that has an entry. The root directory is implied in most layers.

Layers are read here without following links: each component of a path is known to be a directory before the
next one is read, and layers in the store do not change.

Like overlayfs, look for a directory only in the layers that have its parent. New directories of a layer then
cost nothing, however many layers are below: 2,000 new directories over ten layers take 2.5 ms of every warm
pull, and 49 ms if every layer is searched for every path.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Final

from guestpull_server.cancellation import Cancellation
from guestpull_server.models import StoredLayer

_OPAQUE: Final = "trusted.overlay.opaque"
_OVERLAY_XATTRS: Final = ("trusted.overlay.", "user.overlay.")
_MUST_BE_COPIED: Final = ("security.", "system.posix_acl_")
_ACLS: Final = ("system.posix_acl_access", "system.posix_acl_default")
_ROOT: Final = b""
_PATH_MAX: Final = 4096


class _Kind(Enum):
    """The kind of file that a layer has at a path."""

    ABSENT = "nothing"
    DIRECTORY = "a directory"
    OPAQUE_DIRECTORY = "a directory that hides the entries of those below"
    OTHER = "anything else, including a whiteout"


def visible(paths: Sequence[str], cancellation: Cancellation) -> Sequence[str]:
    """The layers down to the first one with an opaque root, which overlayfs itself does not check.

    Args:
        paths: directories of layers, topmost first.
        cancellation: checked at each layer.

    Raises:
        Cancelled: the caller cancelled.
        DeadlineExceeded: the deadline has passed.
    """
    for number, path in enumerate(paths):
        cancellation.check()
        if _is_opaque(os.fsencode(path)):
            return paths[: number + 1]
    return paths


def prepare_upper(layers: Sequence[StoredLayer], shown: int, upper: str, cancellation: Cancellation) -> None:
    """Create directories with the right attributes in the upper directory, over implied directories of layers.

    Args:
        layers: topmost first, each once.
        shown: number of mounted layers. An opaque root hides the entries of the other layers, but if it is
            implied, the root's attributes come from theirs.
        upper: the new, empty upper directory.
        cancellation: checked at each directory.

    Raises:
        OSError: a system call failed.
        Cancelled: the caller cancelled.
        DeadlineExceeded: the deadline has passed.
    """
    if not layers:
        return
    upper_bytes = os.fsencode(upper)
    merged = _Merged(layers, shown, cancellation)
    made: list[tuple[bytes, bytes]] = []
    for directory in merged.directories_to_correct(upper_bytes):
        path = _joined(upper_bytes, directory.path)
        os.mkdir(path, 0o700)
        made.append((directory.source, path))
    # children first: creating them changed their parents' times
    for source, path in reversed(made):
        cancellation.check()
        _copy_attributes(source, path)
    with suppress(FileNotFoundError):  # the mount reports a missing layer
        _copy_attributes(merged.root.source, upper_bytes)


@dataclass(slots=True)
class _Directory:
    """A directory of the merged view.

    Attributes:
        path: relative to the root.
        layers: numbers of the layers that contribute entries, topmost first.
        source: the directory with the right attributes.
        is_wrong: whether overlayfs would show other attributes.
        is_listed: whether it is already among the directories to correct.
    """

    path: bytes
    layers: list[int]
    source: bytes
    is_wrong: bool
    is_listed: bool = False


class _Merged:
    """The directories of the merged view that overlayfs shows of some layers."""

    def __init__(self, layers: Sequence[StoredLayer], shown: int, cancellation: Cancellation) -> None:
        self._cancellation = cancellation
        self._paths = [os.fsencode(layer.store_path) for layer in layers]
        self._implied: list[frozenset[bytes]] = []
        for layer in layers:
            cancellation.check()
            self._implied.append(frozenset(layer.implied_directories))
        source = self._paths[self._source_of(range(len(layers)), _ROOT)]
        self.root = _Directory(_ROOT, list(range(shown)), source, is_wrong=False, is_listed=True)
        self._shown = shown
        self._known: dict[bytes, _Directory | None] = {_ROOT: self.root}

    def directories_to_correct(self, upper: bytes) -> Iterator[_Directory]:
        """The directories to create in the upper directory, parents first, without the root.

        Skips unsafe paths, which the extractor never records, and paths that are too long for the kernel with the
        path of a layer's or the upper directory in front.
        """
        longest = _PATH_MAX - max(len(directory) for directory in (*self._paths, upper)) - len("/\0")
        # implied directories of the bottom-most layer have no lower occurrence
        for path in chain.from_iterable(self._implied[: self._shown - 1]):
            self._cancellation.check()
            if len(path) > longest or not _stays_within(path):
                continue
            directory = self._directory(path)
            if directory is not None and directory.is_wrong:
                yield from self._with_parents(directory)

    def _with_parents(self, directory: _Directory) -> Iterator[_Directory]:
        """A directory and its parents, except those that were listed before."""
        missing: list[_Directory] = []
        here: _Directory | None = directory
        while here is not None and not here.is_listed:
            here.is_listed = True
            missing.append(here)
            here = self._directory(_parent(here.path))
        yield from reversed(missing)

    def _directory(self, path: bytes) -> _Directory | None:
        """A directory of the merged view; None if neither it nor anything below it can be wrong."""
        wanted: list[bytes] = []
        while path not in self._known:
            wanted.append(path)
            path = _parent(path)
        directory = self._known[path]
        for path in reversed(wanted):
            if directory is not None:
                directory = self._child(directory, path)
            self._known[path] = directory
        return directory

    def _child(self, parent: _Directory, path: bytes) -> _Directory | None:
        if len(parent.layers) < 2:
            return None
        found, contributing = self._occurrences(parent, path)
        if len(found) < 2:
            return None
        source = self._source_of(found, path)
        return _Directory(path, contributing, _joined(self._paths[source], path), is_wrong=source != found[0])

    def _occurrences(self, parent: _Directory, path: bytes) -> tuple[list[int], list[int]]:
        """The layers that have a directory at a path, topmost first; and those that contribute its entries.

        An opaque directory hides the entries of the layers below. If it is also implied (the tar has only the
        opaque whiteout), its attributes still come from them.
        """
        found: list[int] = []
        contributing: list[int] = []
        hidden = False
        for number in parent.layers:
            kind = _kind_of(_joined(self._paths[number], path))
            if kind is _Kind.ABSENT:
                continue
            if kind is _Kind.OTHER:
                break
            found.append(number)
            if not hidden:
                contributing.append(number)
            hidden = hidden or kind is _Kind.OPAQUE_DIRECTORY
            if hidden and path not in self._implied[number]:
                break
        return found, contributing

    def _source_of(self, occurrences: Sequence[int], path: bytes) -> int:
        """The topmost layer that has an entry for a directory; the topmost occurrence if none has."""
        return next((number for number in occurrences if path not in self._implied[number]), occurrences[0])


def _stays_within(path: bytes) -> bool:
    return b"\0" not in path and not any(name in (b"", b".", b"..") for name in path.split(b"/"))


def _parent(path: bytes) -> bytes:
    return path.rpartition(b"/")[0]


def _joined(directory: bytes, path: bytes) -> bytes:
    return directory + b"/" + path if path else directory


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
    for acl in _ACLS:
        with suppress(OSError):  # it inherited no default ACL from its parent
            os.removexattr(target, acl)
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    os.chmod(target, stat.S_IMODE(status.st_mode))
    for name in _xattr_names(source):
        if not name.startswith(_OVERLAY_XATTRS):
            _copy_xattr(source, target, name)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _copy_xattr(source: bytes, target: bytes, name: str) -> None:
    """Copy an extended attribute; like overlayfs's copy-up, skip one that the file system does not support."""
    value = os.getxattr(source, name, follow_symlinks=False)
    try:
        os.setxattr(target, name, value, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENOTSUP or name.startswith(_MUST_BE_COPIED):
            raise


def _xattr_names(path: bytes) -> list[str]:
    """The names of a file's extended attributes; none if its file system has no support (some squashfs)."""
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return []
        raise
