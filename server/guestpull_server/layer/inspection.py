"""Checks a directory without a tar-split, such as image-rs's, for what no unpacked layer can have.

This does not prove that the directory is the image's layer. It finds what would lead a mount of it astray.
"""

from __future__ import annotations

import os
import stat
from functools import partial
from typing import Final

from guestpull_server.cancellation import Cancellation
from guestpull_server.layer import whiteout
from guestpull_server.layer.changes import Change, ChangeKind, Changes
from guestpull_server.layer.tar_paths import joined
from guestpull_server.layer.unpacked_tree import UnpackedTree, find_changes

_OWN_XATTRS: Final = (
    (whiteout.OPAQUE_XATTR, whiteout.OPAQUE),
    (whiteout.HAS_WHITEOUTS_XATTR, whiteout.HAS_WHITEOUTS),
)


def inspect_layer(directory: str, *, cancellation: Cancellation | None = None) -> tuple[Change, ...]:
    """Find untranslated whiteouts, sockets, and xattrs that redirect overlayfs.

    Args:
        directory: the layer's directory.
        cancellation: checked now and then.

    Raises:
        StorageFailed: the directory cannot be read.
        Cancelled: the caller left.
        DeadlineExceeded: its time is up.
    """
    caller = cancellation or Cancellation("inspection of a layer")
    return find_changes(directory, partial(_walk, caller=caller))


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
            path = joined(directory, name)
            status = tree.status(descriptor, name)
            if status is None:
                continue
            if name.startswith(whiteout.PREFIX):
                changes.add(path, ChangeKind.EXTRA, "it is a whiteout that was not translated for overlayfs")
            if stat.S_ISSOCK(status.st_mode):
                changes.add(path, ChangeKind.TYPE, "it is a socket, which layers cannot have")
            if stat.S_ISDIR(status.st_mode):
                left.append(path)
            else:
                _check_xattrs(path, tree.xattrs(descriptor, name), changes)


def _check_xattrs(path: bytes, xattrs: dict[bytes, bytes], changes: Changes) -> None:
    for name, value in xattrs.items():
        if name.startswith(whiteout.OVERLAY_XATTRS) and (name, value) not in _OWN_XATTRS:
            shown_name = name.decode(errors="backslashreplace")
            changes.add(path, ChangeKind.XATTR, f"{shown_name} controls overlayfs")
