"""Makes the entries of a tar as files, directories, links and devices in the process's root directory.

The process is chrooted into the layer and its current directory is the entry's parent (`directories.py`), so
every call below takes a bare name. Attributes are set in the order in which the kernel does not undo them:
content, owner, mode (chown clears setuid), xattrs (writing and chown clear security.capability), times.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Final

from guestpull_server.config import Limits
from guestpull_server.layer import tar_entry, whiteout
from guestpull_server.layer.apply import TarApplier
from guestpull_server.layer.directories import Directories, drop_inherited_acls
from guestpull_server.layer.removal import remove_directory, remove_file
from guestpull_server.layer.tar_entry import Entry
from guestpull_server.layer.tar_paths import joined
from guestpull_server.layer.tar_reader import TarReader
from guestpull_server.layer.tar_split import TarSplitWriter

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL_BITS: Final = stat.S_ISUID | stat.S_ISGID
_DEFAULT_ACL: Final = b"system.posix_acl_default"


class Extractor(TarApplier):
    """Extracts one tar into the process's root directory, which is empty at first. The umask must be 0.

    Args:
        reader: reads the tar.
        limits: what the layer may cost.
        tar_split: gets the contents of files that later entries replace.

    Attributes:
        replaced_bytes: the size of the files that were replaced.
        dropped_xattrs: how many extended attributes the file system did not accept.
    """

    def __init__(self, reader: TarReader, limits: Limits, tar_split: TarSplitWriter | None = None) -> None:
        self._directories = Directories(limits)
        super().__init__(reader, limits, self._directories)
        self._keep = None if tar_split is None else tar_split.replaced
        self.replaced_bytes = 0
        self.dropped_xattrs = 0

    def apply_all(self) -> None:
        """Extract all entries; see TarApplier."""
        super().apply_all()
        self._directories.leave_all()

    # -- types of entries -----------------------------------------------------------------------------------------

    def _make_file(self, name: bytes, entry: Entry) -> None:
        try:
            file = os.open(name, _CREATE, entry.mode)
        except FileExistsError:
            self._remove(name)
            file = os.open(name, _CREATE, entry.mode)
        try:
            if entry.sparse is not None:
                self._write_segments(file, entry.sparse.real_size, entry.sparse.segments)
            elif entry.size:
                # one write from the buffer as it is: 9 of 10 files lie within one buffer
                content = self._reader.whole_content()
                if content is not None:
                    written = os.write(file, content)
                    if written < entry.size:
                        _write(file, content[written:])
                else:
                    for piece in self._reader.content():
                        _write(file, piece)
            self._set_owner(file, entry)
            if entry.xattrs:
                self._set_xattrs(file, entry)
            os.utime(file, ns=(entry.atime_ns, entry.mtime_ns))
        finally:
            os.close(file)

    def _write_segments(self, file: int, real_size: int, segments: tuple[tuple[int, int], ...]) -> None:
        os.ftruncate(file, real_size)
        left_segments = iter(segments)
        left = 0
        for piece in self._reader.content():
            rest = piece
            while rest:
                while left == 0:
                    offset, left = next(left_segments)
                    os.lseek(file, offset, os.SEEK_SET)
                written = min(left, len(rest))
                _write(file, rest[:written])
                left -= written
                rest = rest[written:]

    def _make_directory(self, name: bytes, entry: Entry) -> None:
        hides_lower = False
        try:
            os.mkdir(name, entry.mode)
        except FileExistsError:
            existing = os.lstat(name)
            if stat.S_ISDIR(existing.st_mode):
                self._merge_attributes(name, entry)
                os.utime(name, ns=(entry.atime_ns, entry.mtime_ns))
                self._directories.no_longer_implied(self._relative(name))
                return
            hides_lower = whiteout.is_whiteout(existing)
            self._remove(name)
            os.mkdir(name, entry.mode)
        if hides_lower:
            whiteout.make_opaque(name)
        self._set_attributes(name, entry)

    def _set_root_attributes(self, entry: Entry) -> None:
        self._merge_attributes(b"/", entry)
        self._directories.root_has_entry(entry.atime_ns, entry.mtime_ns)

    def _merge_attributes(self, directory: bytes, entry: Entry) -> None:
        """Give a directory that exists the attributes of its entry, but for the times; what is in it stays."""
        os.chown(directory, entry.uid, entry.gid)
        os.chmod(directory, entry.mode)
        if entry.xattrs:
            self._set_xattrs(directory, entry)

    def _make_symlink(self, name: bytes, entry: Entry) -> None:
        try:
            os.symlink(entry.link_target, name)
        except FileExistsError:
            self._remove(name)
            os.symlink(entry.link_target, name)
        self._set_owner(name, entry)
        if entry.xattrs:
            self._set_xattrs(name, entry)
        os.utime(name, ns=(entry.atime_ns, entry.mtime_ns), follow_symlinks=False)

    def _make_hard_link(self, name: bytes, target: bytes) -> None:
        try:
            os.link(target, name, follow_symlinks=False)
        except FileExistsError:
            if _is_same_file(target, name):
                return
            self._remove(name)
            os.link(target, name, follow_symlinks=False)

    def _make_node(self, name: bytes, entry: Entry, kind: int) -> None:
        device = os.makedev(*entry.device)
        try:
            os.mknod(name, kind | entry.mode, device)
        except FileExistsError:
            self._remove(name)
            os.mknod(name, kind | entry.mode, device)
        if kind == stat.S_IFCHR and device == 0:  # the tar of an overlay's upper directory
            whiteout.have_whiteouts_seen()
        self._set_attributes(name, entry)

    def _make_opaque(self) -> None:
        whiteout.make_opaque(b".")

    def _make_whiteout(self, name: bytes) -> bool:
        try:
            whiteout.make_whiteout(name)
        except FileExistsError:
            is_directory = stat.S_ISDIR(os.lstat(name).st_mode)
            if is_directory:
                whiteout.make_opaque(name)
            return is_directory
        if self._directories.inherits_group:
            os.chown(name, 0, 0)
        return False

    # -- attributes -----------------------------------------------------------------------------------------------

    def _set_attributes(self, name: bytes, entry: Entry) -> None:
        self._set_owner(name, entry)
        if entry.mode & _SPECIAL_BITS:
            os.chmod(name, entry.mode)
        if entry.xattrs:
            self._set_xattrs(name, entry)
        os.utime(name, ns=(entry.atime_ns, entry.mtime_ns))

    def _set_owner(self, what: int | bytes, entry: Entry) -> None:
        """Set owner and mode where creation did not: root's files in plain directories are right already."""
        uid, gid = entry.uid, entry.gid
        directories = self._directories
        inherited = directories.inherits_group or directories.inherits_acl
        if not uid and not gid and not inherited:
            return
        if entry.type == tar_entry.SYMLINK:
            assert isinstance(what, bytes)
            os.chown(what, uid, gid, follow_symlinks=False)
            return
        if directories.inherits_acl:
            drop_inherited_acls(what)
        os.chown(what, uid, gid)
        if entry.mode & _SPECIAL_BITS or inherited:
            os.chmod(what, entry.mode)

    def _set_xattrs(self, what: int | bytes, entry: Entry) -> None:
        for name, value in self._allowed_xattrs(entry):
            if name == _DEFAULT_ACL:
                self._directories.inherits_acl = True
            try:
                if isinstance(what, int):
                    os.setxattr(what, name, value)
                else:
                    os.setxattr(what, name, value, follow_symlinks=False)
            except OSError as error:
                # the file system has no xattrs, or user.* on something other than a file or a directory
                if error.errno != errno.ENOTSUP and not (
                    error.errno == errno.EPERM and name.startswith(b"user.")
                ):
                    raise
                self.dropped_xattrs += 1

    # -- replacing ------------------------------------------------------------------------------------------------

    def _remove(self, name: bytes) -> None:
        """Remove what an earlier entry put under this name."""
        status = os.lstat(name)
        if stat.S_ISDIR(status.st_mode):
            self.replaced_bytes += remove_directory(
                name, self._keep, lambda removed: self._directories.no_longer_implied(self._relative(removed))
            )
        else:
            self.replaced_bytes += remove_file(name, status, self._keep)
        self._look_up_parents_again()

    def _relative(self, name: bytes) -> bytes:
        return joined(self._directories.path, name)[1:]


def _write(file: int, content: memoryview) -> None:
    while content:
        content = content[os.write(file, content) :]


def _is_same_file(one: bytes, other: bytes) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.lstat(one), os.lstat(other))
    return False
