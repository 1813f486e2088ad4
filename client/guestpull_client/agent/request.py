r"""Parses a CreateContainerRequest of Kata's agent.proto, as image_pull_handler.rs does.

{"container_id": "c1",
 "storages": [{"driver": "image_guest_pull", "source": "quay.io/org/img:1.0", "fstype": "overlay",
               "driver_options": ["image_guest_pull={\"metadata\": {}}"],
               "mount_point": "/run/kata-containers/c1/rootfs"}],
 "OCI": {"Process": {"Args": ["serve"], "Cwd": "/"}, "Annotations": {}}}
"""

from __future__ import annotations

import json
import re
from typing import Final

from guestpull_client.agent.container import Container
from guestpull_client.agent.spec import Json, JsonObject, normalised, part, text, texts
from guestpull_client.errors import InvalidArgument

GUEST_PULL: Final = "image_guest_pull"

_CONTAINER_ID: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_MAX_ID_LETTERS: Final = 200  # the id becomes a directory's name, and part of a cgroup's


def check_container_id(container_id: str) -> str:
    """Return a container id that is valid by Kata's verify_id, and so is safe as a directory's name.

    Raises:
        InvalidArgument: the id is invalid.
    """
    if len(container_id) > _MAX_ID_LETTERS or not _CONTAINER_ID.fullmatch(container_id):
        raise InvalidArgument(
            f"Invalid container id {container_id[:_MAX_ID_LETTERS]!r}: expected 2 to {_MAX_ID_LETTERS} of the "
            "characters a-z, A-Z, 0-9, '_', '.', '-', the first a letter or digit.",
            "INVALID_CONTAINER_ID",
        )
    return container_id


def container_of_request(request: str | bytes) -> tuple[Container, tuple[str, ...]]:
    """Parse a request; return its container and a warning for each storage that is skipped.

    Raises:
        InvalidArgument: the request is malformed, or has not exactly one image to pull.
    """
    message = _message(request)
    storages = message.get("storages")
    pulls: list[JsonObject] = []
    warnings: list[str] = []
    for storage in storages if isinstance(storages, list) else []:
        if not isinstance(storage, dict):
            raise _wrong("a storage is not a JSON object")
        if text(storage, "driver") == GUEST_PULL:
            pulls.append(storage)
        else:
            warnings.append(
                f"skipped storage {text(storage, 'mountPoint')!r}: "
                f"driver {text(storage, 'driver')!r} is not supported"
            )
    if len(pulls) != 1:
        raise _wrong(f"it has {len(pulls)} storages of driver {GUEST_PULL}, and needs exactly one")
    if not text(pulls[0], "source"):
        raise _wrong(f"the storage of driver {GUEST_PULL} has no source, which names the image")
    container = Container(
        container_id=check_container_id(text(message, "containerId")),
        image=text(pulls[0], "source"),
        specification=part(message, "oci"),
        metadata=_metadata(pulls[0]),
    )
    return container, tuple(warnings)


def _message(request: str | bytes) -> JsonObject:
    try:
        document: Json = json.loads(request)
        if isinstance(document, dict):
            return normalised(document)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"it is not JSON: {error}") from None
    raise _wrong("it is not a JSON object")


def _metadata(storage: JsonObject) -> dict[str, str]:
    """The image's metadata from Kata's shim: `{"metadata": {...}}` after the driver option's `=`."""
    for option in texts(storage, "driverOptions"):
        name, _, value = option.partition("=")
        if name != GUEST_PULL:
            continue
        try:
            volume: Json = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _wrong(f"driver option {GUEST_PULL} is not JSON: {error}") from None
        if isinstance(volume, dict):
            metadata = part(volume, "metadata")
            return {key: entry for key, entry in metadata.items() if isinstance(entry, str)}
    raise _wrong(f'the storage has no driver option {GUEST_PULL}={{"metadata": {{}}}}')


def _wrong(problem: str) -> InvalidArgument:
    return InvalidArgument(
        f"Invalid request: {problem}. Pass a CreateContainerRequest of Kata's agent.proto in JSON.",
        "INVALID_CONTAINER_REQUEST",
        {"problem": problem},
    )
