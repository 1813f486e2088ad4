"""Which local image a text names, and how it is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import InvalidRequest
from guestpull_server.models import Credentials
from guestpull_server.registry.client import RegistryClient
from guestpull_server.registry.local.archive import Archive
from guestpull_server.registry.local.docker_archive import DockerArchiveImage
from guestpull_server.registry.local.files import Directory
from guestpull_server.registry.local.layout import LayoutImage
from guestpull_server.registry.reference import Reference
from guestpull_server.registry.source import ImageSource

_LOCAL: Final = ("oci:", "oci-archive:", "docker-archive:")


def is_local(text: str) -> bool:
    """Whether a text names a file or a directory of this machine, and not an image of a registry."""
    return text.startswith(_LOCAL)


@contextmanager
def open_source(
    text: str,
    registry: RegistryClient,
    credentials: Credentials | None,
    limits: Limits,
    scratch: str,
    cancellation: Cancellation,
) -> Iterator[ImageSource]:
    """Open whatever a text names: a local image, or one of a registry.

    Args:
        text: a reference, or one of the forms of this package's docstring.
        registry: for references.
        credentials: for references; see RegistryClient.image.
        limits: what an image may cost.
        scratch: a directory on the file system where compressed archives are inflated, to files without names.
        cancellation: ends the opening.

    Raises:
        InvalidReference: it is no reference, and no other form either.
        InvalidRequest: there is no such file, or several images in it and none of them named.
        GuestpullError: it cannot be read.
    """
    kind, _, rest = text.partition(":")
    path, _, wanted = rest.partition(":")
    match kind:
        case "oci":
            if not os.path.isdir(path):
                raise InvalidRequest(
                    text, f"{path} is no directory", "Name a directory with an OCI image layout."
                )
            yield LayoutImage(Directory(path), text, wanted, limits)
        case "oci-archive":
            with Archive.open(path, text, limits, scratch, cancellation) as archive:
                yield LayoutImage(archive, text, wanted, limits)
        case "docker-archive":
            with Archive.open(path, text, limits, scratch, cancellation) as archive:
                yield DockerArchiveImage(archive, text, wanted, limits)
        case _:
            yield registry.image(Reference.parse(text.removeprefix("docker://")), credentials)
