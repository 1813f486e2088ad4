"""Translates Kata's spelling of a runtime specification to that of the OCI runtime specification.

The messages of agent.proto are the structures of the runtime specification with Go's names, such as
`OCI.Process.NoNewPrivileges`. Depending on the writer of the JSON (protobuf's mapping, serde, a person), names
are in Go's spelling, in snake_case, with an underscore after keywords (`type_`), or as specified. Absent parts
may be null, and 64-bit numbers may be strings.
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
_LISTS_OF_CPUS: Final = frozenset({"cpus", "mems"})  # in these, "0" is a list, not a number


def camel(name: str) -> str:
    """Translate a field's name to the specification's: `UIDMappings`, `uid_mappings` -> `uidMappings`."""
    joined = _UNDERSCORE.sub(lambda match: match[1].upper(), name.strip("_"))
    first = _LEADING_CAPITALS.match(joined)
    return first[0].lower() + joined[first.end() :] if first else joined


def normalised(document: JsonObject) -> JsonObject:
    """Translate a message to the specification's names and types, without nulls."""
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
    """An object within an object; empty if it is absent or of another type."""
    value = document.get(name)
    return value if isinstance(value, dict) else {}


def texts(document: JsonObject, name: str) -> list[str]:
    """A list of strings within an object; empty if it is absent or of another type."""
    value = document.get(name)
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def text(document: JsonObject, name: str) -> str:
    """A string within an object; empty if it is absent or of another type."""
    value = document.get(name)
    return value if isinstance(value, str) else ""
