"""Whether a layer's directory is the layer: checked against the image's own diff_id, and by nothing else.

    record ---- headers ----> replay -> the tree that must be there ---- compared with ----> the directory
       |                                                                                          |
       `------- headers -------------------> SHA-256 <------------------------ file contents -----'
                                                |
                                            = diff_id ?

The record and the directory are both untrusted. Together they make a tar; if its digest is the diff_id, the
record's headers are the image's, and so are the contents; and the tree that these headers make must be the tree
that is there, to every attribute. A record that was altered along with the directory gives another digest.

The CRCs in a record are there to name the file when the digest is wrong; nobody relies on them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from isal.isal_zlib import crc32

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import storage_errors
from guestpull_server.layer.changes import Change, ChangeKind, Changes, TooManyChanges
from guestpull_server.layer.comparison import Comparison
from guestpull_server.layer.expected import Directory, File
from guestpull_server.layer.implied import implied_fingerprint
from guestpull_server.layer.inflate import max_tar_bytes
from guestpull_server.layer.refusals import LayerLimitExceeded, TarError
from guestpull_server.layer.replay import Replay
from guestpull_server.layer.stored_content import PIECE_BYTES, content_of, stored_part
from guestpull_server.layer.tar_paths import joined
from guestpull_server.layer.tar_split import TarSplitError, TarSplitReader
from guestpull_server.layer.unpacked_tree import RootNotADirectory, UnpackedTree
from guestpull_server.models import Digest

if TYPE_CHECKING:
    from hashlib import _Hash

_MOST_CHANGES: Final = 1000
_FILES_BETWEEN_CHECKS: Final = 64
_DIGEST_IS_WRONG_ANYWAY: Final = frozenset(
    {ChangeKind.CONTENT, ChangeKind.SIZE, ChangeKind.MISSING, ChangeKind.TYPE}
)


def verify_layer(
    directory: str,
    tar_split_path: str,
    diff_id: Digest,
    *,
    implied: str = "",
    limits: Limits | None = None,
    cancellation: Cancellation | None = None,
) -> tuple[Change, ...]:
    """Find what of a layer's directory is not as the layer with this diff_id has it; nothing, if all is.

    Thread-safe; most of the time is spent outside of the interpreter's lock. Nothing is written, no link is
    followed, nothing blocks.

    Args:
        directory: the layer's directory.
        tar_split_path: the record that was written when it was unpacked.
        diff_id: from the image's config, which the image's id proves.
        implied: the `implied_fingerprint` that the directories without an entry must have; empty: it is not
            compared.
        limits: bounds of what a record may make us remember; those of the configuration.
        cancellation: asked now and then.

    Raises:
        StorageFailed: directory or record cannot be read.
        Cancelled: the caller left.
        DeadlineExceeded: its time is up.
    """
    changes = Changes(_MOST_CHANGES)
    with storage_errors("verifying a layer", tar_split_path):
        record_file = _open_record(tar_split_path)
    if record_file is None:
        return (Change(b"", ChangeKind.TAR_SPLIT, "it is no file"),)
    try:
        with storage_errors("verifying a layer", directory), UnpackedTree(directory) as tree:
            record = TarSplitReader(record_file)
            proof = _Proof(record, tree, changes, limits or Limits(), cancellation)
            proof.run(diff_id, implied)
    except TooManyChanges:
        pass
    except RootNotADirectory:
        changes.found.append(Change(b"", ChangeKind.TYPE, "it is no directory"))
    except (TarSplitError, TarError) as error:
        changes.found.append(Change(b"", ChangeKind.TAR_SPLIT, f"it cannot be used: {error}"))
    except LayerLimitExceeded as error:
        problem = f"it exceeds limits.{error.limit} ({error.allowed})"
        changes.found.append(Change(b"", ChangeKind.TAR_SPLIT, problem))
    finally:
        os.close(record_file)
    return tuple(changes.found)


def _open_record(path: str) -> int | None:
    """Open a record; None where there is something else."""
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
    """One verification under way."""

    def __init__(
        self,
        record: TarSplitReader,
        tree: UnpackedTree,
        changes: Changes,
        limits: Limits,
        cancellation: Cancellation | None,
    ) -> None:
        self._record = record
        self._tree = tree
        self._changes = changes
        self._limits = limits
        self._max_headers = max_tar_bytes(limits)
        self._cancellation = cancellation or Cancellation("verification of a layer")
        self._comparison = Comparison(tree, changes)

    def run(self, diff_id: Digest, implied: str) -> None:
        headers = self._record.headers(self._max_headers)
        replay = Replay(lambda: next(headers, None), self._limits)
        replay.apply_all()
        if len(self._record.sums) != len(replay.contents) or self._record.lost_count != replay.replaced:
            raise TarSplitError("its parts do not belong together")
        if implied and implied_fingerprint(replay.implied_directories) != implied:
            self._changes.add(b"", ChangeKind.IMPLIED, "they are others than those that are listed")
        self._compare_names(replay.root)
        digest = self._digest(replay, diff_id.hasher())
        if digest == diff_id.hex:
            return
        if not any(one.kind in _DIGEST_IS_WRONG_ANYWAY for one in self._changes.found):
            made = f"{diff_id.algorithm}:{digest}"
            self._changes.add(b"", ChangeKind.DIFF_ID, f"record and directory make {made}, not {diff_id}")

    def _compare_names(self, root: Directory) -> None:
        """Compare everything but the files whose content is to be hashed: they are when it is."""
        left = [(root, b"")]
        while left:
            self._cancellation.check()
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
        """The digest of the tar that record and directory make; files are compared on the way."""
        headers = _Headers(self._record.headers(self._max_headers), hasher)
        contents = zip(replay.starts, replay.contents, self._record.sums, strict=True)
        for number, (start, file, expected_sum) in enumerate(contents):
            if number % _FILES_BETWEEN_CHECKS == 0:
                self._cancellation.check()
            headers.feed(start)
            if file.replaced_as >= 0:
                self._hash_lost(file, expected_sum, hasher)
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
            self._cancellation.check()
            hasher.update(piece)
            found_sum = crc32(piece, found_sum)
        return found_sum

    def _hash_lost(self, file: File, expected_sum: int, hasher: _Hash) -> None:
        found_sum = 0
        for piece in stored_part(self._record.lost(file.replaced_as, file.size), file):
            hasher.update(piece)
            found_sum = crc32(piece, found_sum)
        if found_sum != expected_sum:
            raise TarSplitError("the content of a replaced file was altered")


class _Headers:
    """Feeds the tar without its contents to a hash, part by part."""

    def __init__(self, pieces: Iterator[memoryview], hasher: _Hash) -> None:
        self._pieces = pieces
        self._hasher = hasher
        self._piece = memoryview(b"")
        self._start = 0  # of the piece, in all
        self._position = 0  # in the piece

    def feed(self, end: int) -> None:
        """Feed up to this byte of all."""
        while (stop := end - self._start) > len(self._piece):
            self._finish_piece()
            self._piece = next(self._pieces)
        self._hasher.update(self._piece[self._position : stop])
        self._position = stop

    def feed_rest(self) -> None:
        """Feed what is left."""
        self._finish_piece()
        for piece in self._pieces:
            self._hasher.update(piece)

    def _finish_piece(self) -> None:
        self._hasher.update(self._piece[self._position :])
        self._start += len(self._piece)
        self._position = 0
