"""Extension headers, which describe the entry that follows: pax records, GNU's long names."""

from __future__ import annotations

from typing import Final

from guestpull_server.layer.tar_fields import pax_records

_SPARSE: Final = b"GNU.sparse."
_XATTR: Final = b"SCHILY.xattr."


class Extensions:
    """The extension headers of one entry."""

    __slots__ = ("is_sparse", "long_link", "long_name", "records", "xattrs")

    def __init__(self) -> None:
        self.long_name: bytes | None = None
        self.long_link: bytes | None = None
        self.records: dict[bytes, bytes] = {}
        self.xattrs: tuple[tuple[bytes, bytes], ...] = ()
        self.is_sparse = False

    def read_pax(self, content: bytes) -> None:
        """Read a pax extended header, which replaces an earlier one."""
        self.records = dict(pax_records(content))
        self.xattrs = ()
        if _XATTR in content:
            self.xattrs = tuple(
                (key[len(_XATTR) :], value) for key, value in self.records.items() if key.startswith(_XATTR)
            )
        self.is_sparse = _SPARSE in content and any(key.startswith(_SPARSE) for key in self.records)
