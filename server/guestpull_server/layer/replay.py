"""What a layer's directory must be, told by the headers of its tar: the extraction, on a tree in memory.

`Replay` does with nodes what `extract.Extractor` does with files, step by step: the same entries replace each
other, follow the same links, become the same whiteouts, in the same order. What an extraction refuses is refused
here, too: a tar that could not have been unpacked is not what the directory was made from.
"""

from __future__ import annotations

import stat
from array import array
from collections.abc import Iterator
from typing import Final

from guestpull_server.config import Limits
from guestpull_server.layer import tar_entry, whiteout
from guestpull_server.layer.directories import ParentNotADirectory
from guestpull_server.layer.expected import Directory, File, Node, kept_xattrs
from guestpull_server.layer.tar_bytes import NextChunk
from guestpull_server.layer.tar_entry import Entry
from guestpull_server.layer.tar_fields import TarError
from guestpull_server.layer.tar_paths import clean
from guestpull_server.layer.tar_reader import TarReader
from guestpull_server.layer.worker_protocol import LayerLimitExceeded

_IMPLIED: Final = 0o755
_CACHED: Final = 4096
_NO_NAMES: Final = frozenset((b"", b".", b".."))
_MAX_LINKS: Final = 1000  # on one way; the kernel gives up at 40
_NODE_TYPES: Final = {
    tar_entry.CHARACTER_DEVICE: stat.S_IFCHR,
    tar_entry.BLOCK_DEVICE: stat.S_IFBLK,
    tar_entry.FIFO: stat.S_IFIFO,
}


class Replay:
    """The expected tree, and the way in which the tar's contents lie in it.

    Args:
        next_chunk: brings the tar without its contents.
        limits: bounds of what is remembered.
    """

    def __init__(self, next_chunk: NextChunk, limits: Limits) -> None:
        self._reader = TarReader(next_chunk, limits.max_header_bytes)
        self._limits = limits
        self.root = Directory(None, b"", _IMPLIED, 0, 0, 0)
        self.root.implied = True
        self.contents: list[File] = []
        """The file that took each content, in the tar's order, whether or not it is still there."""
        self.starts = array("Q")
        """For each content, how many bytes stand in front of it in the tar without contents."""
        self._lost = 0
        self._implied_bytes = 0  # of the paths of directories that were made without an entry
        self._parents: dict[bytes, Directory] = {}  # of entries, as they were written, and what they lead to

    @property
    def lost_count(self) -> int:
        """How many contents were replaced."""
        return self._lost

    def implied_directories(self) -> Iterator[bytes]:
        """The paths of directories that have no entry, once all are replayed; the root's is b""."""
        left = [self.root]
        while left:
            directory = left.pop()
            if directory.implied:
                yield directory.path
            left += [child for child in directory.children.values() if isinstance(child, Directory)]

    def run(self) -> None:
        """Replay all entries.

        Raises:
            TarError: no extraction could have been made of them.
            LayerLimitExceeded: they are too many.
        """
        for number, entry in enumerate(self._reader):
            if number >= self._limits.max_layer_entries:
                raise LayerLimitExceeded("the number of entries", "max_layer_entries", number)
            self._make(entry)

    def _make(self, entry: Entry) -> None:
        longest = self._limits.max_path_bytes
        if len(entry.path) > longest or len(entry.link_target) > longest:
            raise LayerLimitExceeded("the length of a path", "max_path_bytes", longest)
        raw_parent, _, name = entry.path.rstrip(b"/").rpartition(b"/")
        # most entries stand beside others: not to look for their parents again saves a fifteenth of the replay
        directory = self._parents.get(raw_parent)
        if directory is None or name in _NO_NAMES:
            place = self._place(entry, raw_parent, name)
            if place is None:
                return
            directory, name = place
        if name[:4] == whiteout.PREFIX:
            self._whiteout(directory, name)
        elif entry.type == tar_entry.DIRECTORY:
            self._make_directory(directory, name, entry)
        elif not name:
            raise TarError("the root of the layer is no directory")
        elif entry.type == tar_entry.HARD_LINK:
            self._link(directory, name, entry)
        else:
            if name in directory.children:
                self._clear(directory, name)
            directory.children[name] = self._file(directory, name, entry)

    def _place(self, entry: Entry, raw_parent: bytes, raw_name: bytes) -> tuple[Directory, bytes] | None:
        """Where an entry goes; None if it is left out."""
        parent, _, name = clean(entry.path).rpartition(b"/")
        if parent.startswith(whiteout.AUFS_PREFIX) or b"/" + whiteout.AUFS_PREFIX in parent:
            return None
        is_whiteout = name[:4] == whiteout.PREFIX
        try:
            directory = self._directory_at(parent, revive=not is_whiteout)
        except ParentNotADirectory:
            if is_whiteout:
                return None
            raise
        if name == raw_name:
            if len(self._parents) >= _CACHED:
                self._parents.clear()
            self._parents[raw_parent] = directory
        return directory, name

    def _file(self, directory: Directory, name: bytes, entry: Entry) -> File:
        extra: File.Extra = None
        if entry.type == tar_entry.REGULAR:
            kind = stat.S_IFREG
            extra = entry.sparse
        elif entry.type == tar_entry.SYMLINK:
            kind = stat.S_IFLNK
            extra = entry.link_target
        else:
            kind = _NODE_TYPES[entry.type]
            extra = entry.device
        mode = kind | (0o777 if kind == stat.S_IFLNK else entry.mode)
        made = File(directory, name, mode, entry.uid, entry.gid, entry.mtime_ns, entry.size, extra)
        if entry.xattrs:
            made.set_xattrs(self._kept_xattrs(entry, mode))
        if kind == stat.S_IFREG and entry.size:
            self._take_content(made)
        return made

    def _take_content(self, made: File) -> None:
        start = self._reader.omit_content()
        if start >= 0:
            made.is_stored = True
            self.contents.append(made)
            self.starts.append(start)

    def _make_directory(self, directory: Directory, name: bytes, entry: Entry) -> None:
        existing: Node | None = directory.children.get(name) if name else self.root
        hides_lower = False
        if not isinstance(existing, Directory):
            if existing is not None:
                hides_lower = existing.is_whiteout
                self._clear(directory, name)
            existing = Directory(directory, name, 0, 0, 0, 0)
            directory.children[name] = existing
        existing.implied = False
        existing.change_mode(entry.mode)
        existing.uid, existing.gid, existing.mtime_ns = entry.uid, entry.gid, entry.mtime_ns
        existing.opaque = existing.opaque or hides_lower
        if entry.xattrs:
            existing.set_xattrs(self._kept_xattrs(entry, stat.S_IFDIR))

    def _kept_xattrs(self, entry: Entry, mode: int) -> list[tuple[bytes, bytes]]:
        kept = kept_xattrs(entry.xattrs, mode)
        largest = self._limits.max_xattr_bytes
        if any(len(value) > largest for _, value in kept):
            raise LayerLimitExceeded("an extended attribute", "max_xattr_bytes", largest)
        return kept

    def _link(self, directory: Directory, name: bytes, entry: Entry) -> None:
        parent, _, target_name = clean(entry.link_target).rpartition(b"/")
        target = self._resolved(parent).children.get(target_name)
        if not isinstance(target, File):
            raise TarError("a hard link leads to no file")
        existing = directory.children.get(name)
        if existing is target:
            return
        if existing is not None:
            self._clear(directory, name)
            if self._resolved(parent).children.get(target_name) is not target:
                raise TarError("a hard link leads to what it replaces")
        directory.children[name] = target
        target.add_name(directory, name)

    def _whiteout(self, directory: Directory, name: bytes) -> None:
        if name == whiteout.OPAQUE_MARKER:
            directory.opaque = True
            return
        if name.startswith(whiteout.AUFS_PREFIX):
            return
        hidden = name[len(whiteout.PREFIX) :]
        existing = directory.children.get(hidden)
        if existing is None:
            directory.children[hidden] = File(directory, hidden, stat.S_IFCHR, 0, 0, 0, 0, (0, 0))
        elif isinstance(existing, Directory):
            existing.opaque = True
            existing.implied = False

    # -- replacing ------------------------------------------------------------------------------------------

    def _clear(self, directory: Directory, name: bytes) -> None:
        """Remove what is under a name, in the order in which `removal.py` does."""
        self._parents.clear()
        gone = directory.children.pop(name)
        left = [gone] if isinstance(gone, Directory) else []
        if isinstance(gone, File):
            self._remove_name(gone, directory, name)
        while left:
            top = left.pop()
            inside = sorted(top.children.items())
            for inner_name, inner in inside:
                if isinstance(inner, File):
                    self._remove_name(inner, top, inner_name)
            left += reversed([inner for _, inner in inside if isinstance(inner, Directory)])

    def _remove_name(self, file: File, directory: Directory, name: bytes) -> None:
        if file.remove_name(directory, name) and stat.S_ISREG(file.mode) and file.size:
            file.lost_as = self._lost
            self._lost += 1

    # -- finding --------------------------------------------------------------------------------------------

    def _directory_at(self, path: bytes, *, revive: bool) -> Directory:
        """The directory that an entry's parent path leads to; what is missing is made, as in the extraction."""
        directory = self.root
        for name in path.split(b"/") if path else ():
            found = self._child(directory, name, revive)
            if found is None:  # a link: from the start again, by the way that it leads
                return self._canonical_directory(self._real_path(path), revive)
            directory = found
        return directory

    def _canonical_directory(self, names: list[bytes], revive: bool) -> Directory:
        directory = self.root
        for name in names:
            found = self._child(directory, name, revive)
            if found is None:
                raise TarError("links never end")
            directory = found
        return directory

    def _child(self, directory: Directory, name: bytes, revive: bool) -> Directory | None:
        """A directory in another, made if it is missing; None if it is a symbolic link."""
        child = directory.children.get(name)
        if isinstance(child, Directory):
            return child
        if child is not None and stat.S_ISLNK(child.mode):
            return None
        if child is not None and not (child.is_whiteout and revive):
            raise ParentNotADirectory("an entry's parent is no directory")
        made = Directory(directory, name, _IMPLIED, 0, 0, 0)
        if child is not None:
            self._clear(directory, name)
            made.opaque = True
        else:
            made.implied = True
        self._implied_bytes += len(made.path)
        if self._implied_bytes > self._limits.max_implied_path_bytes:
            what = "the paths of directories without an entry"
            raise LayerLimitExceeded(what, "max_implied_path_bytes", self._limits.max_implied_path_bytes)
        directory.children[name] = made
        return made

    def _resolved(self, path: bytes) -> Directory:
        """The directory that a path leads to, all of which is there."""
        directory = self.root
        for name in self._real_path(path):
            child = directory.children.get(name)
            if not isinstance(child, Directory):
                raise TarError("a hard link's target is not there")
            directory = child
        return directory

    def _real_path(self, path: bytes) -> list[bytes]:
        """The names on the way that is left when all links are followed, within the root."""
        way: list[bytes] = []
        left = path.split(b"/")[::-1]
        followed = 0
        while left:
            name = left.pop()
            if name == b"..":
                del way[-1:]
            if name in (b"", b".", b".."):
                continue
            node = self._at([*way, name])
            if isinstance(node, File) and stat.S_ISLNK(node.mode):
                followed += 1
                target = node.extra
                assert isinstance(target, bytes)
                if followed > _MAX_LINKS:
                    raise TarError("links never end")
                if target.startswith(b"/"):
                    way = []
                left += target.split(b"/")[::-1]
            else:
                way.append(name)
        return way

    def _at(self, names: list[bytes]) -> Node | None:
        node: Node = self.root
        for name in names:
            if not isinstance(node, Directory):
                return None
            child = node.children.get(name)
            if child is None:
                return None
            node = child
        return node
