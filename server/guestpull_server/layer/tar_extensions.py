"""What the headers in front of an entry say of it: pax records, GNU's long names.

A second extended header replaces the first, GNU's long names win over pax's (as Go's archive/tar has it).
"""

from __future__ import annotations

from typing import Final

from guestpull_server.layer.tar_fields import pax_records

_SPARSE: Final = b"GNU.sparse."
_REPEATED: Final = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
_XATTR: Final = b"SCHILY.xattr."


class Extensions:
    """What the headers in front of an entry say of it."""

    __slots__ = ("flat_sparse", "is_sparse", "long_link", "long_name", "records", "xattrs")

    def __init__(self) -> None:
        self.long_name: bytes | None = None
        self.long_link: bytes | None = None
        self.records: dict[bytes, bytes] = {}
        self.xattrs: tuple[tuple[bytes, bytes], ...] = ()
        self.is_sparse = False
        self.flat_sparse: list[bytes] = []  # records that repeat, version 0.0

    def read(self, content: bytes) -> None:
        """Take in an extended header, in place of one that was before it."""
        records = pax_records(content)
        self.records = dict(records)
        self.xattrs = ()
        if _XATTR in content:
            self.xattrs = tuple(
                (key[len(_XATTR) :], value) for key, value in self.records.items() if key.startswith(_XATTR)
            )
        self.is_sparse = _SPARSE in content
        self.flat_sparse = [value for key, value in records if key in _REPEATED] if self.is_sparse else []
