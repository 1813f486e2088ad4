"""One entry -> system calls.

The process is chrooted into the layer and its current directory is the entry's parent (`directories.py`), so
that every call below takes a bare name. Attributes are set in the order in which the kernel does not take
them back: contents, owner, mode (chown clears setuid), xattrs (writing and chown clear security.capability),
times.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Final

from guestpull_server.config import Limits
from guestpull_server.layer import tar_entry, whiteout
from guestpull_server.layer.directories import Directories, ParentNotADirectory, drop_inherited_acls
from guestpull_server.layer.removal import remove_directory, remove_file
from guestpull_server.layer.tar_entry import Entry
from guestpull_server.layer.tar_fields import TarError
from guestpull_server.layer.tar_paths import clean
from guestpull_server.layer.tar_reader import TarReader
from guestpull_server.layer.tar_split import TarSplitWriter
from guestpull_server.layer.worker_protocol import LayerLimitExceeded

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL_BITS: Final = stat.S_ISUID | stat.S_ISGID
_NO_ID: Final = 0xFFFFFFFF  # chown(2) would read it as "leave it"
_MAJORS: Final = 1 << 12  # as Linux has them
_MINORS: Final = 1 << 20
_NOWHERE: Final = b"\0"  # no entry has this for a parent
_NO_NAMES: Final = frozenset((b"", b".", b".."))
_DEFAULT_ACL: Final = b"system.posix_acl_default"


class Extractor:
    """Makes the entries of one tar in the process's root directory, which is empty at first.

    The umask must be 0. The counters tell what was made so far. A record, if one is kept, gets the contents of
    files that later entries replace.
    """

    def __init__(self, reader: TarReader, limits: Limits, record: TarSplitWriter | None = None) -> None:
        self._reader = reader
        self._record = record
        self._limits = limits
        self._directories = Directories(limits)
        self._max_path_bytes = limits.max_path_bytes
        self._parent = _NOWHERE  # the current directory as the entry before wrote it; links may lead there
        self.entries = 0
        self.size_bytes = 0  # of all files that were written
        self.replaced_bytes = 0  # of those that an entry behind them replaced
        self.dropped_xattrs = 0

    @property
    def implied_directories(self) -> tuple[bytes, ...]:
        """Directories that were made without an entry of their own; b"" is the root."""
        return tuple(self._directories.implied)

    def extract_all(self) -> None:
        """Make every entry, and give the directories their times.

        Raises:
            TarError: an entry cannot be what it says.
            LayerLimitExceeded: the layer costs more than allowed.
            OSError: the operating system refused.
        """
        for entry in self._reader:
            self.entries += 1
            if self.entries > self._limits.max_layer_entries:
                raise LayerLimitExceeded(
                    "the number of entries", "max_layer_entries", self._limits.max_layer_entries
                )
            try:
                self._extract(entry)
            except OSError as error:
                # the path says where; without it the message would be of no use
                error.filename = entry.path
                raise
        self._directories.leave_all()

    def _extract(self, entry: Entry) -> None:
        path = entry.path
        if len(path) > self._max_path_bytes or len(entry.link_target) > self._max_path_bytes:
            raise LayerLimitExceeded("the length of a path", "max_path_bytes", self._max_path_bytes)
        parent, _, name = path.rpartition(b"/")
        # most entries stand beside the one before them; not to look at their path any closer saves 0.7 of the
        # 4 us that Python takes for a file, beside the 8 us of its system calls
        if parent != self._parent or name in _NO_NAMES:
            clean_parent, _, clean_name = clean(path).rpartition(b"/")
            if clean_parent.startswith(whiteout.AUFS_PREFIX) or b"/" + whiteout.AUFS_PREFIX in clean_parent:
                return
            is_whiteout = clean_name[:4] == whiteout.PREFIX
            try:
                self._enter(clean_parent, revive=not is_whiteout)
            except ParentNotADirectory:
                if is_whiteout:  # what lower layers have there is hidden anyway
                    return
                raise
            if clean_name == name:
                self._parent = parent
            name = clean_name
        if name[:4] == whiteout.PREFIX:
            self._whiteout(name)
            return
        # in the order of frequency: most entries are regular files
        if entry.type == tar_entry.REGULAR:
            self._regular_file(name, entry)
        elif entry.type == tar_entry.DIRECTORY:
            self._directory(name, entry)
        elif entry.type == tar_entry.SYMLINK:
            self._symlink(name, entry)
        elif entry.type == tar_entry.HARD_LINK:
            self._hard_link(name, entry)
        else:
            self._node(name, entry)

    def _enter(self, parent: bytes, *, revive: bool) -> None:
        self._parent = _NOWHERE  # if entering fails, the next entry must not believe to be there
        self._directories.enter(parent, revive=revive)

    # -- the types of entries -------------------------------------------------------------------------------

    def _regular_file(self, name: bytes, entry: Entry) -> None:
        if not name:
            raise TarError("the root of the layer is a file")
        size = entry.size
        self.size_bytes += size
        if self.size_bytes > self._limits.max_layer_bytes:
            raise LayerLimitExceeded("the unpacked layer", "max_layer_bytes", self._limits.max_layer_bytes)
        try:
            file = os.open(name, _CREATE, entry.mode)
        except FileExistsError:
            self._clear(name)
            file = os.open(name, _CREATE, entry.mode)
        try:
            if entry.sparse is not None:
                self._write_segments(file, entry)
            elif size:
                # one write from the buffer as it is: 9 of 10 files lie within one
                content = self._reader.whole_content()
                if content is not None:
                    written = os.write(file, content)
                    if written < size:
                        _write(file, content[written:])
                else:
                    for piece in self._reader.content():
                        _write(file, piece)
            self._own(file, entry)
            if entry.xattrs:
                self._set_xattrs(file, entry)
            os.utime(file, ns=(entry.atime_ns, entry.mtime_ns))
        finally:
            os.close(file)

    def _write_segments(self, file: int, entry: Entry) -> None:
        assert entry.sparse is not None
        os.ftruncate(file, entry.sparse.real_size)
        segments = iter(entry.sparse.segments)
        offset = left = 0
        for piece in self._reader.content():
            rest = piece
            while rest:
                while left == 0:
                    offset, left = next(segments)
                    os.lseek(file, offset, os.SEEK_SET)
                _write(file, rest[:left])
                written = min(left, len(rest))
                left -= written
                rest = rest[written:]

    def _directory(self, name: bytes, entry: Entry) -> None:
        if not name:
            self._root(entry)
            return
        hides_lower = False
        try:
            os.mkdir(name, entry.mode)
        except FileExistsError:
            existing = os.lstat(name)
            if stat.S_ISDIR(existing.st_mode):
                self._merge_directory(name, entry)
                return
            hides_lower = whiteout.is_whiteout(existing)
            self._clear(name)
            os.mkdir(name, entry.mode)
        self._own(name, entry)
        if entry.mode & _SPECIAL_BITS:
            os.chmod(name, entry.mode)
        if hides_lower:
            whiteout.make_opaque(name)
        if entry.xattrs:
            self._set_xattrs(name, entry)
        os.utime(name, ns=(entry.atime_ns, entry.mtime_ns))

    def _merge_directory(self, name: bytes, entry: Entry) -> None:
        """Give a directory that is there already the attributes of its entry; what is in it stays."""
        _check_owner(entry)
        os.chmod(name, entry.mode)
        os.chown(name, entry.uid, entry.gid)
        if entry.xattrs:
            self._set_xattrs(name, entry)
        os.utime(name, ns=(entry.atime_ns, entry.mtime_ns))
        self._no_longer_implied(name)

    def _root(self, entry: Entry) -> None:
        _check_owner(entry)
        os.chown(b"/", entry.uid, entry.gid)
        os.chmod(b"/", entry.mode)
        if entry.xattrs:
            self._set_xattrs(b"/", entry)
        self._directories.set_times(entry.atime_ns, entry.mtime_ns)
        self._directories.refresh_mode()
        self._directories.implied.pop(b"", None)

    def _symlink(self, name: bytes, entry: Entry) -> None:
        if not entry.link_target or not name:
            raise TarError(f"symbolic link {_text(entry.path)} has no target or no name")
        try:
            os.symlink(entry.link_target, name)
        except FileExistsError:
            self._clear(name)
            os.symlink(entry.link_target, name)
        self._own(name, entry)
        if entry.xattrs:
            self._set_xattrs(name, entry)
        os.utime(name, ns=(entry.atime_ns, entry.mtime_ns), follow_symlinks=False)

    def _hard_link(self, name: bytes, entry: Entry) -> None:
        # the link shares its target's inode, so that the attributes of its own header mean nothing
        target = b"/" + clean(entry.link_target)
        if not name or target == self._absolute(name):
            raise TarError(f"hard link {_text(entry.path)} leads to itself")
        try:
            try:
                os.link(target, name, follow_symlinks=False)
            except FileExistsError:
                if _same_file(target, name):
                    return
                self._clear(name)
                os.link(target, name, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise TarError(
                f"hard link {_text(entry.path)}: the layer has no file {_text(entry.link_target)}"
            ) from None

    def _node(self, name: bytes, entry: Entry) -> None:
        kind = {
            tar_entry.CHARACTER_DEVICE: stat.S_IFCHR,
            tar_entry.BLOCK_DEVICE: stat.S_IFBLK,
            tar_entry.FIFO: stat.S_IFIFO,
        }[entry.type]
        if not name:
            raise TarError("the root of the layer is a device or a fifo")
        major, minor = entry.device
        if not (0 <= major < _MAJORS and 0 <= minor < _MINORS):
            raise TarError(f"device {_text(entry.path)} has numbers out of range")
        device = os.makedev(major, minor)
        try:
            os.mknod(name, kind | entry.mode, device)
        except FileExistsError:
            self._clear(name)
            os.mknod(name, kind | entry.mode, device)
        if kind == stat.S_IFCHR and device == 0:  # the tar of an overlay's upper directory
            whiteout.have_whiteouts_seen()
        self._own(name, entry)
        if entry.mode & _SPECIAL_BITS:
            os.chmod(name, entry.mode)
        if entry.xattrs:
            self._set_xattrs(name, entry)
        os.utime(name, ns=(entry.atime_ns, entry.mtime_ns))

    def _whiteout(self, name: bytes) -> None:
        if name == whiteout.OPAQUE_MARKER:
            whiteout.make_opaque(b".")
            return
        if name.startswith(whiteout.AUFS_PREFIX):
            return
        hidden = name[len(whiteout.PREFIX) :]
        if hidden in _NO_NAMES:
            raise TarError(f"whiteout {_text(name)} names nothing that could be gone")
        try:
            whiteout.make_whiteout(hidden)
            if self._directories.inherits_group:
                os.chown(hidden, 0, 0)
        except FileExistsError:
            # the layer has put something there already; what must go is a lower layer's directory below it
            if stat.S_ISDIR(os.lstat(hidden).st_mode):
                whiteout.make_opaque(hidden)
                self._no_longer_implied(hidden)

    # -- attributes -----------------------------------------------------------------------------------------

    def _own(self, what: int | bytes, entry: Entry) -> None:
        """Owner and mode, as far as creation did not set them: root's files in plain directories are done."""
        uid, gid = entry.uid, entry.gid
        directories = self._directories
        inherited = directories.inherits_group or directories.inherits_acl
        if not uid and not gid and not inherited:
            return
        _check_owner(entry)
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
        for name, value in entry.xattrs:
            if name.startswith(whiteout.OVERLAY_XATTRS):
                continue
            if len(value) > self._limits.max_xattr_bytes:
                raise LayerLimitExceeded(
                    "an extended attribute", "max_xattr_bytes", self._limits.max_xattr_bytes
                )
            if not name or b"\0" in name:
                raise TarError(f"entry {_text(entry.path)} has an extended attribute without a name")
            if name == _DEFAULT_ACL:
                self._directories.inherits_acl = True
            try:
                if isinstance(what, int):
                    os.setxattr(what, name, value)
                else:
                    os.setxattr(what, name, value, follow_symlinks=False)
            except OSError as error:
                # a file system without them, or a user.* one on what is neither file nor directory
                if error.errno != errno.ENOTSUP and not (
                    error.errno == errno.EPERM and name.startswith(b"user.")
                ):
                    raise
                self.dropped_xattrs += 1

    # -- what is in the way ---------------------------------------------------------------------------------

    def _clear(self, name: bytes) -> None:
        """Remove what an earlier entry put under this name.

        Raises:
            TarError: it is the layer's root, or a name that cannot be.
        """
        if name in _NO_NAMES:
            raise TarError("an entry would replace the root of the layer")
        lost = self._record.lost if self._record is not None else None
        status = os.lstat(name)
        if stat.S_ISDIR(status.st_mode):
            self.replaced_bytes += remove_directory(name, lost, self._no_longer_implied)
        else:
            self.replaced_bytes += remove_file(name, status, lost)
        # a link that is gone may have been on the way to where we believe to be
        self._parent = _NOWHERE

    def _no_longer_implied(self, name: bytes) -> None:
        self._directories.implied.pop(self._absolute(name)[1:], None)

    def _absolute(self, name: bytes) -> bytes:
        current = self._directories.path
        return current + name if current == b"/" else current + b"/" + name


def _check_owner(entry: Entry) -> None:
    if not (0 <= entry.uid < _NO_ID and 0 <= entry.gid < _NO_ID):
        raise TarError(f"entry {_text(entry.path)} has an owner out of range")


def _write(file: int, content: memoryview) -> None:
    while content:
        content = content[os.write(file, content) :]


def _same_file(one: bytes, other: bytes) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.lstat(one), os.lstat(other))
    return False


def _text(path: bytes) -> str:
    return repr(path.decode(errors="backslashreplace"))
