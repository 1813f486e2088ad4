"""What can be said of a layer's directory without a record: whether it could be a layer at all.

image-rs keeps no records. Nothing here proves that such a directory is the image's; it finds what no unpacked
layer has, and what would lead a mount of it astray.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from guestpull_server.cancellation import Cancellation
from guestpull_server.errors import storage_errors
from guestpull_server.layer import whiteout
from guestpull_server.layer.changes import Change, ChangeKind, Changes, TooManyChanges
from guestpull_server.layer.unpacked_tree import RootNotADirectory, UnpackedTree

_MOST_CHANGES: Final = 1000
_LAYERS_OWN: Final = (
    (whiteout.OPAQUE_XATTR, whiteout.OPAQUE),
    (whiteout.HAS_WHITEOUTS_XATTR, whiteout.HAS_WHITEOUTS),
)


def inspect_layer(directory: str, *, cancellation: Cancellation | None = None) -> tuple[Change, ...]:
    """Find what cannot be in an unpacked layer: whiteouts in the tar's form, xattrs that redirect, sockets.

    Args:
        directory: the layer's directory.
        cancellation: asked now and then.

    Raises:
        StorageFailed: the directory cannot be read.
        Cancelled: the caller left.
        DeadlineExceeded: its time is up.
    """
    changes = Changes(_MOST_CHANGES)
    caller = cancellation or Cancellation("verification of a layer")
    try:
        with storage_errors("verifying a layer", directory), UnpackedTree(directory) as tree:
            _walk(tree, changes, caller)
    except TooManyChanges:
        pass
    except RootNotADirectory:
        changes.found.append(Change(b"", ChangeKind.TYPE, "it is no directory"))
    return tuple(changes.found)


def _walk(tree: UnpackedTree, changes: Changes, caller: Cancellation) -> None:
    left = [b""]
    while left:
        caller.check()
        directory = left.pop()
        descriptor = tree.enter(directory)
        if descriptor is None:
            continue
        _check_xattrs(directory, tree.xattrs_of(descriptor), changes)
        for name in sorted(map(os.fsencode, os.listdir(descriptor))):
            path = directory + b"/" + name if directory else name
            status = tree.status(descriptor, name)
            if status is None:
                continue
            if name.startswith(whiteout.PREFIX):
                changes.add(path, ChangeKind.EXTRA, "it is a whiteout that was not translated for overlayfs")
            if stat.S_ISSOCK(status.st_mode):
                changes.add(path, ChangeKind.TYPE, "it is a socket, which no layer has")
            if stat.S_ISDIR(status.st_mode):
                left.append(path)
            else:
                _check_xattrs(path, tree.xattrs(descriptor, name), changes)


def _check_xattrs(path: bytes, xattrs: dict[bytes, bytes], changes: Changes) -> None:
    for name, value in xattrs.items():
        if not name.startswith(whiteout.OVERLAY_XATTRS):
            continue
        if (name, value) not in _LAYERS_OWN:
            changes.add(path, ChangeKind.XATTR, f"{name.decode(errors='backslashreplace')} steers overlayfs")
