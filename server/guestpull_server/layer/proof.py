"""Verifies that a directory is a layer, by the image's own diff_id and nothing else.

    tar-split --- headers ---> replay -> expected tree --- compared with ---> directory
        |                                                                         |
        `------- headers ------------------> SHA-256 <------- file contents ------'
                                                |
                                            = diff_id ?

Both the tar-split and the directory are untrusted. Together they make a tar. If its digest is the diff_id,
then the headers and the contents are the image's, and the tree that the headers describe must be the tree
that is there, in every attribute. A tar-split that was altered together with the directory makes another
digest.

The CRCs in a tar-split only serve to name the file that was altered when the digest is wrong.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from isal.isal_zlib import crc32

from guestpull_server.config import Limits
from guestpull_server.errors import storage_errors
from guestpull_server.layer.changes import Change, ChangeKind, Changes
from guestpull_server.layer.comparison import Comparison
from guestpull_server.layer.expected import Directory, File
from guestpull_server.layer.inflate import max_tar_bytes
from guestpull_server.layer.refusals import LayerLimitExceeded, TarError
from guestpull_server.layer.replay import Replay
from guestpull_server.layer.stored_content import PIECE_BYTES, content_of, stored_part
from guestpull_server.layer.tar_paths import joined
from guestpull_server.layer.tar_split import TarSplitError, TarSplitReader
from guestpull_server.layer.unpacked_tree import UnpackedTree, find_changes
from guestpull_server.models import Digest

if TYPE_CHECKING:
    from hashlib import _Hash

_CHANGES_THAT_ALTER_THE_DIGEST: Final = frozenset(
    {ChangeKind.CONTENT, ChangeKind.SIZE, ChangeKind.MISSING, ChangeKind.TYPE}
)


def verify_layer(
    directory: str,
    tar_split_path: str,
    diff_id: Digest,
    *,
    implied: str = "",
    limits: Limits | None = None,
) -> tuple[Change, ...]:
    """Find how a directory differs from the layer with this diff_id; nothing if it is the layer.

    Writes nothing, follows no links, and does not block. It cannot be cancelled: `LayerWorkers.verify` runs
    it in a process that can be killed.

    Args:
        directory: the layer's directory.
        tar_split_path: the tar-split that was written when the layer was unpacked.
        diff_id: the layer's diff_id from the image's config, which the image's id proves.
        implied: the expected `implied_fingerprint`; empty to skip the check.
        limits: the limits of the configuration, which also bound memory.

    Raises:
        StorageFailed: the directory or the tar-split cannot be read.
    """
    with storage_errors("verifying a layer", tar_split_path):
        file = _open_tar_split(tar_split_path)
    if file is None:
        return (Change(b"", ChangeKind.TAR_SPLIT, "it is not a regular file"),)

    def prove(tree: UnpackedTree, changes: Changes) -> None:
        try:
            _Proof(TarSplitReader(file), tree, changes, limits or Limits()).run(diff_id, implied)
        except (TarSplitError, TarError) as error:
            changes.add(b"", ChangeKind.TAR_SPLIT, str(error))
        except LayerLimitExceeded as error:
            changes.add(b"", ChangeKind.TAR_SPLIT, f"it exceeds limits.{error.limit} ({error.allowed})")

    try:
        return find_changes(directory, prove)
    finally:
        os.close(file)


def implied_fingerprint(paths: Iterable[bytes]) -> str:
    """A digest of a layer's implied directories, which its tar has no entries for. It is never empty.

    The list of them is kept beside the layer and decides what a mount shows, so it must be verified too. The list
    may be long; a verifying worker is only sent this digest.

    Args:
        paths: the directories, in any order, relative to the layer's root, which is b"".
    """
    return hashlib.sha256(b"".join(path + b"\0" for path in sorted(set(paths)))).hexdigest()


def _open_tar_split(path: str) -> int | None:
    """Open a tar-split; None if it is not a regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link; a socket
            return None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


class _Proof:
    """One verification."""

    def __init__(
        self, tar_split: TarSplitReader, tree: UnpackedTree, changes: Changes, limits: Limits
    ) -> None:
        self._tar_split = tar_split
        self._tree = tree
        self._changes = changes
        self._limits = limits
        self._max_headers = max_tar_bytes(limits)
        self._comparison = Comparison(tree, changes)

    def run(self, diff_id: Digest, implied: str) -> None:
        headers = self._tar_split.headers(self._max_headers)
        replay = Replay(lambda: next(headers, None), self._limits)
        replay.apply_all()
        replaced = self._tar_split.replaced_count
        if len(self._tar_split.sums) != len(replay.contents) or replaced != replay.replaced:
            raise TarSplitError("its parts do not belong together")
        if implied and implied_fingerprint(replay.implied_directories) != implied:
            self._changes.add(b"", ChangeKind.IMPLIED, "they are not the ones that are listed")
        self._compare_names(replay.root)
        digest = self._digest(replay, diff_id.hasher())
        if digest == diff_id.hex:
            return
        if not any(one.kind in _CHANGES_THAT_ALTER_THE_DIGEST for one in self._changes.found):
            made = f"{diff_id.algorithm}:{digest}"
            self._changes.add(b"", ChangeKind.DIFF_ID, f"tar-split and directory make {made}, not {diff_id}")

    def _compare_names(self, root: Directory) -> None:
        """Compare everything but the files whose content is hashed, which are compared then."""
        left = [(root, b"")]
        while left:
            expected, path = left.pop()
            descriptor = self._tree.enter(path)
            if descriptor is None:
                self._changes.add(path, ChangeKind.MISSING, "there is no such directory")
                continue
            self._comparison.directory(expected, path, descriptor)
            for name, child in expected.children.items():
                if isinstance(child, Directory):
                    left.append((child, joined(path, name)))
                    continue
                if child.other_names:
                    self._comparison.name(child, expected, name, descriptor)
                if not child.is_stored and child.name == name and child.directory is expected:
                    self._comparison.file(child, descriptor)

    def _digest(self, replay: Replay, hasher: _Hash) -> str:
        """The digest of the tar that tar-split and directory make. Compares the files on the way."""
        headers = _Headers(self._tar_split.headers(self._max_headers), hasher)
        contents = zip(replay.starts, replay.contents, self._tar_split.sums, strict=True)
        for start, file, expected_sum in contents:
            headers.feed(start)
            if file.replaced_as >= 0:
                self._hash_replaced(file, expected_sum, hasher)
            else:
                self._hash_file(file, expected_sum, hasher)
        headers.feed_rest()
        return hasher.hexdigest()

    def _hash_file(self, file: File, expected_sum: int, hasher: _Hash) -> None:
        descriptor = self._comparison.open(file)
        if descriptor < 0:
            return
        try:
            if file.size <= PIECE_BYTES and file.extra is None:
                piece = os.read(descriptor, file.size)
                hasher.update(piece)
                found_sum = crc32(piece)
            else:
                found_sum = self._hash_large(descriptor, file, hasher)
        finally:
            os.close(descriptor)
        if found_sum != expected_sum:
            self._changes.add(file.path, ChangeKind.CONTENT, "it is not the layer's")

    def _hash_large(self, descriptor: int, file: File, hasher: _Hash) -> int:
        found_sum = 0
        for piece in content_of(descriptor, file, self._changes):
            hasher.update(piece)
            found_sum = crc32(piece, found_sum)
        return found_sum

    def _hash_replaced(self, file: File, expected_sum: int, hasher: _Hash) -> None:
        found_sum = 0
        for piece in stored_part(self._tar_split.replaced(file.replaced_as, file.size), file):
            hasher.update(piece)
            found_sum = crc32(piece, found_sum)
        if found_sum != expected_sum:
            raise TarSplitError("the content of a replaced file was altered")


class _Headers:
    """Feeds the tar without the contents of its files to a hash, part by part."""

    def __init__(self, pieces: Iterator[memoryview], hasher: _Hash) -> None:
        self._pieces = pieces
        self._hasher = hasher
        self._piece = memoryview(b"")
        self._start = 0  # of the piece in the tar without contents
        self._position = 0  # in the piece

    def feed(self, end: int) -> None:
        """Feed up to this byte."""
        while (stop := end - self._start) > len(self._piece):
            self._finish_piece()
            self._piece = next(self._pieces)
        self._hasher.update(self._piece[self._position : stop])
        self._position = stop

    def feed_rest(self) -> None:
        """Feed the rest."""
        self._finish_piece()
        for piece in self._pieces:
            self._hasher.update(piece)

    def _finish_piece(self) -> None:
        self._hasher.update(self._piece[self._position :])
        self._start += len(self._piece)
        self._position = 0
