"""What overlay/<id>/ says of its bundle: bundle.json.preparing while a pull makes it, bundle.json from then on."""

from __future__ import annotations

import os
import re
from typing import Final, Self

import msgspec

from guestpull_server.errors import InvalidDigest
from guestpull_server.models import Digest
from guestpull_server.store.files import NoFile, read_file

READY: Final = "bundle.json"
PREPARING: Final = "bundle.json.preparing"
_ID: Final = re.compile(r"[0-9a-f]{16}")


class FileIdentity(msgspec.Struct, frozen=True):
    """Tells a file from others that have its name: its inode, and when it was written, for inodes come again.

    Its device is left out: that has another number after a reboot.
    """

    inode: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The identity of a file with this status."""
        return cls(status.st_ino, status.st_mtime_ns)


class BundleFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """What such a file says; while a bundle is being prepared, its image is not known yet.

    Args:
        bundle_path: as the caller wrote it.
        made_directory: the bundle's directory was made by us.
        image_id: of the image.
        reference: of the image.
        layers: compressed digests of the layers that it is mounted from.
        real_path: the bundle's path without any link in it; empty in files of earlier versions.
        made_parents: how many directories above it were made by us, while it is being prepared.
        config: the config.json that we are about to write, while it is being prepared.
    """

    bundle_path: str
    made_directory: bool
    image_id: str = ""
    reference: str = ""
    layers: list[str] = []
    real_path: str = ""
    made_parents: int = 0
    config: FileIdentity | None = None


def is_bundle_directory(name: str) -> bool:
    """Whether a directory in overlay/ is one of ours, by its name."""
    return _ID.fullmatch(name) is not None


def read_bundle_file(overlay_directory: str, name: str) -> BundleFile | None:
    """A bundle's file; None where there is none, or none that can be used."""
    try:
        content = read_file(os.path.join(overlay_directory, name))
        found = msgspec.json.decode(content or b"", type=BundleFile)
        for digest in (found.image_id, *found.layers) if name == READY else ():
            Digest(digest)
    except (OSError, NoFile, msgspec.DecodeError, UnicodeDecodeError, InvalidDigest):
        return None
    paths = (found.bundle_path, found.real_path or found.bundle_path)
    return found if all(path.startswith("/") and "\0" not in path for path in paths) else None
