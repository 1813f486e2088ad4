"""A bundle's config.json, read and written."""

from __future__ import annotations

import json
import os
from typing import Final

from guestpull_client.agent.spec import Json, JsonObject
from guestpull_client.errors import FailedPrecondition

CONFIG: Final = "config.json"


def read_specification(bundle: str) -> JsonObject:
    """The runtime specification of a bundle.

    Raises:
        FailedPrecondition: there is none that can be read.
    """
    path = os.path.join(bundle, CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            document: Json = json.load(file)
    except OSError as error:
        raise _unusable(path, error.strerror or "it cannot be opened") from None
    except (ValueError, RecursionError) as error:
        raise _unusable(path, str(error)) from None
    if not isinstance(document, dict):
        raise _unusable(path, "it is no JSON object")
    return document


def write_specification(bundle: str, specification: JsonObject) -> None:
    """Replace a bundle's config.json, all of it at once.

    Raises:
        FailedPrecondition: it cannot be written.
    """
    path = os.path.join(bundle, CONFIG)
    temporary = f"{path}.merged"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(specification, file, indent=2)
        os.replace(temporary, path)
    except OSError as error:
        raise _unusable(path, error.strerror or "it cannot be written") from None


def _unusable(path: str, problem: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path}: {problem}. The agent must run where the service does, and may need to be root.",
        "NO_RUNTIME_CONFIG",
        {"path": path},
    )
