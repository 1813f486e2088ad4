"""The tree that a layer's directory must have, from the headers of its tar: the extraction, in memory.

`Replay` makes nodes by the rules by which `extract.Extractor` makes files (`apply.py`), and replaces them in the
same order.
"""

from __future__ import annotations

import stat
from array import array
from typing import Final

from guestpull_server.config import Limits
from guestpull_server.layer.apply import TarApplier
from guestpull_server.layer.directories import IMPLIED_MODE
from guestpull_server.layer.directory_stack import DirectoryStack, Obstacle
from guestpull_server.layer.expected import Directory, File, Node, supported_xattrs
from guestpull_server.layer.tar_bytes import NextChunk
from guestpull_server.layer.tar_entry import Entry
from guestpull_server.layer.tar_paths import joined
from guestpull_server.layer.tar_reader import TarReader

_SYMLINK_MODE: Final = stat.S_IFLNK | 0o777


class Replay(TarApplier):
    """Builds the expected tree, and says where each content of the tar lies in it.

    Args:
        next_chunk: returns the tar without the contents of its files, piece by piece.
        limits: what the layer may cost.

    Attributes:
        root: the root of the tree.
        contents: for each content in the tar, in order, the file that has it, also if that was replaced.
        starts: for each content, how many bytes of the tar without contents precede it.
        replaced: how many contents were replaced.
    """

    def __init__(self, next_chunk: NextChunk, limits: Limits) -> None:
        self.root = Directory(None, b"", IMPLIED_MODE, 0, 0, 0)
        self._directories = _Directories(limits, self.root)
        super().__init__(TarReader(next_chunk, limits.max_header_bytes), limits, self._directories)
        self.contents: list[File] = []
        self.starts = array("Q")
        self.replaced = 0

    # -- types of entries -----------------------------------------------------------------------------------------

    def _make_file(self, name: bytes, entry: Entry) -> None:
        made = self._put(name, entry, stat.S_IFREG | entry.mode, entry.sparse)
        if entry.size:
            start = self._reader.omit_content()
            if start >= 0:
                made.is_stored = True
                self.contents.append(made)
                self.starts.append(start)

    def _make_directory(self, name: bytes, entry: Entry) -> None:
        above = self._directories.current
        existing = above.children.get(name)
        if not isinstance(existing, Directory):
            made = Directory(above, name, 0, 0, 0, 0)
            if existing is not None:
                made.opaque = existing.is_whiteout
                self._remove(name)
            above.children[name] = existing = made
        self._set_directory_attributes(existing, entry)
        self._directories.no_longer_implied(joined(self._directories.path, name)[1:])

    def _set_root_attributes(self, entry: Entry) -> None:
        self._set_directory_attributes(self.root, entry)
        self._directories.no_longer_implied(b"")

    def _make_symlink(self, name: bytes, entry: Entry) -> None:
        self._put(name, entry, _SYMLINK_MODE, entry.link_target)

    def _make_hard_link(self, name: bytes, target: bytes) -> None:
        found = self._directories.at(target)
        if not isinstance(found, File):
            raise FileNotFoundError
        above = self._directories.current
        existing = above.children.get(name)
        if existing is found:
            return
        if existing is not None:
            self._remove(name)
            if self._directories.at(target) is not found:
                raise FileNotFoundError
        above.children[name] = found
        found.add_name(above, name)

    def _make_node(self, name: bytes, entry: Entry, kind: int) -> None:
        self._put(name, entry, kind | entry.mode, entry.device)

    def _make_opaque(self) -> None:
        self._directories.current.opaque = True

    def _make_whiteout(self, name: bytes) -> bool:
        above = self._directories.current
        existing = above.children.get(name)
        if existing is None:
            above.children[name] = File(above, name, stat.S_IFCHR, 0, 0, 0, 0, (0, 0))
        elif isinstance(existing, Directory):
            existing.opaque = True
            return True
        return False

    def _put(self, name: bytes, entry: Entry, mode: int, extra: File.Extra) -> File:
        above = self._directories.current
        if name in above.children:
            self._remove(name)
        made = File(above, name, mode, entry.uid, entry.gid, entry.mtime_ns, entry.size, extra)
        if entry.xattrs:
            made.set_xattrs(supported_xattrs(self._allowed_xattrs(entry), mode))
        above.children[name] = made
        return made

    def _set_directory_attributes(self, directory: Directory, entry: Entry) -> None:
        directory.change_mode(entry.mode)
        directory.uid, directory.gid, directory.mtime_ns = entry.uid, entry.gid, entry.mtime_ns
        if entry.xattrs:
            directory.set_xattrs(supported_xattrs(self._allowed_xattrs(entry), directory.mode))

    # -- replacing ------------------------------------------------------------------------------------------------

    def _remove(self, name: bytes) -> None:
        """Remove what has a name in the current directory, in the order of `removal.py`."""
        self._look_up_parents_again()
        above = self._directories.current
        gone = above.children.pop(name)
        if isinstance(gone, File):
            self._remove_name(gone, above, name)
            return
        left = [gone]
        while left:
            top = left.pop()
            self._directories.no_longer_implied(top.path)
            inside = sorted(top.children.items())
            for inner_name, inner in inside:
                if isinstance(inner, File):
                    self._remove_name(inner, top, inner_name)
            left += reversed([inner for _, inner in inside if isinstance(inner, Directory)])

    def _remove_name(self, file: File, directory: Directory, name: bytes) -> None:
        if file.remove_name(directory, name) and stat.S_ISREG(file.mode) and file.size:
            file.replaced_as = self.replaced
            self.replaced += 1


class _Directories(DirectoryStack[Directory]):
    """The directories from the root of the tree to the current one."""

    def at(self, path: bytes) -> Node | None:
        """The node at an absolute path without links; None if there is none."""
        node: Node | None = self._stack[0][1]
        for name in path[1:].split(b"/") if path != b"/" else ():
            if not isinstance(node, Directory):
                return None
            node = node.children.get(name)
        return node

    def _open(self, name: bytes) -> Directory | Obstacle:
        found = self.current.children.get(name)
        if isinstance(found, Directory):
            return found
        if found is None:
            return Obstacle.MISSING
        if stat.S_ISLNK(found.mode):
            return Obstacle.SYMLINK
        return Obstacle.WHITEOUT if found.is_whiteout else Obstacle.OTHER

    def _make(self, name: bytes) -> Directory:
        made = self.current.children[name] = Directory(self.current, name, IMPLIED_MODE, 0, 0, 0)
        return made

    def _replace_whiteout(self, name: bytes) -> Directory:
        replaced = self.current.children[name]
        assert isinstance(replaced, File)
        replaced.remove_name(self.current, name)
        made = self._make(name)
        made.opaque = True
        return made

    def _read_link(self, path: bytes) -> bytes | None:
        found = self.at(path)
        return found.extra if isinstance(found, File) and isinstance(found.extra, bytes) else None
