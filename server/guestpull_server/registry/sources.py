"""Opens the source that an image's name stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.models import Credentials
from guestpull_server.registry.client import RegistryClient
from guestpull_server.registry.image_source import ImageSource
from guestpull_server.registry.local import is_local, open_local
from guestpull_server.registry.reference import Reference


@contextmanager
def open_source(
    text: str,
    registry: RegistryClient,
    credentials: Credentials | None,
    limits: Limits,
    scratch: str,
    cancellation: Cancellation,
) -> Iterator[ImageSource]:
    """Open an image of a registry, or a local one.

    Args:
        text: a reference, with or without `docker://`, or a form of registry/local/.
        registry: for references.
        credentials: for references; see RegistryClient.image.
        limits: bounds on what is read.
        scratch: a directory on the file system where compressed archives are inflated to unnamed files.
        cancellation: of the request.

    Raises:
        InvalidReference: the text is neither a reference nor a local form.
        InvalidRequest: the file does not exist, or has several images and none was selected.
        GuestpullError: the source cannot be read.
    """
    if is_local(text):
        with open_local(text, limits, scratch, cancellation) as source:
            yield source
    else:
        yield registry.image(Reference.parse(text.removeprefix("docker://")), credentials)
