"""Reads and writes a bundle's config.json."""

from __future__ import annotations

import json
import os
from typing import Final

from guestpull_client.agent.spec import Json, JsonObject
from guestpull_client.errors import FailedPrecondition

CONFIG: Final = "config.json"


def read_specification(bundle: str) -> JsonObject:
    """Read the runtime specification of a bundle.

    Raises:
        FailedPrecondition: config.json is missing or unreadable.
    """
    path = os.path.join(bundle, CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            document: Json = json.load(file)
    except OSError as error:
        raise _unusable(path, error.strerror or "cannot open it") from None
    except (ValueError, RecursionError) as error:
        raise _unusable(path, str(error)) from None
    if not isinstance(document, dict):
        raise _unusable(path, "not a JSON object")
    return document


def write_specification(bundle: str, specification: JsonObject) -> None:
    """Replace a bundle's config.json atomically.

    Raises:
        FailedPrecondition: config.json cannot be written.
    """
    path = os.path.join(bundle, CONFIG)
    temporary = f"{path}.merged"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(specification, file, indent=2)
        os.replace(temporary, path)
    except OSError as error:
        raise _unusable(path, error.strerror or "cannot write it") from None


def _unusable(path: str, problem: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path}: {problem}. Run the agent on the service's machine, as root if the service runs as root.",
        "NO_RUNTIME_CONFIG",
        {"path": path},
    )
