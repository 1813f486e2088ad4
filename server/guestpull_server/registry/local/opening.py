"""Opens local images by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import InvalidRequest
from guestpull_server.registry.image_source import ImageSource
from guestpull_server.registry.local.archive import Archive
from guestpull_server.registry.local.docker_archive import DockerArchiveImage
from guestpull_server.registry.local.layout import LayoutImage
from guestpull_server.registry.local.tree import Directory

_LOCAL: Final = ("oci:", "oci-archive:", "docker-archive:")


def is_local(text: str) -> bool:
    """Whether a name stands for a local file or directory."""
    return text.startswith(_LOCAL)


@contextmanager
def open_local(text: str, limits: Limits, scratch: str, cancellation: Cancellation) -> Iterator[ImageSource]:
    """Open a local image; see registry.open_source."""
    kind, _, rest = text.partition(":")
    path, _, selected = rest.partition(":")
    if kind == "oci":
        if not os.path.isdir(path):
            raise InvalidRequest(
                text, f"{path} is not a directory", "Use a directory with an OCI image layout."
            )
        yield LayoutImage(Directory(path), text, selected, limits)
        return
    with Archive.open(path, text, limits, scratch, cancellation) as archive:
        image = LayoutImage if kind == "oci-archive" else DockerArchiveImage
        yield image(archive, text, selected, limits)
