"""Which of a layer's directories its tar has no entries for, said in a few bytes.

What is listed of them beside the layer decides what a mount shows of these directories, so that it is a part of
what is proved. The list may be long; the worker that proves the layer is told its fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def implied_fingerprint(paths: Iterable[bytes]) -> str:
    """The same for the same directories in whatever order, and for no others; never empty.

    Args:
        paths: of directories, from the layer's root on, which itself is b"".
    """
    return hashlib.sha256(b"".join(path + b"\0" for path in sorted(set(paths)))).hexdigest()
