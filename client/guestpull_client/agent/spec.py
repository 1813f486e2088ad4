"""A runtime spec as Kata spells it -> as the runtime specification does.

agent.proto's messages are the runtime specification's structures with Go's names: `OCI.Process.NoNewPrivileges`.
Depending on who wrote the JSON (protobuf's own mapping, serde, a person), names come in Go's spelling, in
snake_case, with an underscore against keywords (`type_`), or right; absent parts are null; 64-bit numbers are
texts.
"""

from __future__ import annotations

import re
from typing import Final, TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = "dict[str, Json]"

_LEADING_CAPITALS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]")
_UNDERSCORE: Final = re.compile(r"_+([a-z0-9])")
_NUMBER: Final = re.compile(r"-?[0-9]{1,20}")
_NAMED_BY_USERS: Final = frozenset({"annotations", "sysctl", "unified", "metadata"})
_NUMERIC_PARTS: Final = frozenset({"rlimits", "resources"})
_LISTS_OF_CPUS: Final = frozenset({"cpus", "mems"})  # "0" is a list here, not a number


def camel(name: str) -> str:
    """A field's name in the runtime specification's spelling: `UIDMappings`, `uid_mappings` -> `uidMappings`."""
    joined = _UNDERSCORE.sub(lambda match: match[1].upper(), name.strip("_"))
    first = _LEADING_CAPITALS.match(joined)
    return first[0].lower() + joined[first.end() :] if first else joined


def normalised(document: JsonObject) -> JsonObject:
    """A message with the specification's names, without nulls, and with numbers where numbers belong."""
    return _fields(document, numeric=False)


def _fields(document: JsonObject, *, numeric: bool) -> JsonObject:
    fields: JsonObject = {}
    for name, value in document.items():
        if value is None:
            continue
        spelled = camel(name)
        if spelled in _NAMED_BY_USERS:
            fields[spelled] = value
        else:
            within = (numeric or spelled in _NUMERIC_PARTS) and spelled not in _LISTS_OF_CPUS
            fields[spelled] = _value(value, numeric=within)
    return fields


def _value(value: Json, *, numeric: bool) -> Json:
    match value:
        case dict():
            return _fields(value, numeric=numeric)
        case list():
            return [_value(one, numeric=numeric) for one in value]
        case str() if numeric and _NUMBER.fullmatch(value):
            return int(value)
        case _:
            return value


def part(document: JsonObject, name: str) -> JsonObject:
    """An object within an object; empty where it is absent or is none."""
    value = document.get(name)
    return value if isinstance(value, dict) else {}


def texts(document: JsonObject, name: str) -> list[str]:
    """A list of texts within an object; empty where it is absent or is none."""
    value = document.get(name)
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def text(document: JsonObject, name: str) -> str:
    """A text within an object; empty where it is absent or is none."""
    value = document.get(name)
    return value if isinstance(value, str) else ""
