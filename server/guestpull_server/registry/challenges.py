"""WWW-Authenticate: what a registry wants to know (RFC 9110, section 11.6.1)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME: Final = re.compile(rf"[\s,]*({_TOKEN})(?:[ \t]+|$|(?=,))")
_PARAMETER: Final = re.compile(rf'[\s,]*({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))')
_ESCAPE: Final = re.compile(r"\\(.)")
_MAX_HEADER_LENGTH: Final = 8192


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate: its scheme, in lower case, and its parameters."""

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)


def parse_challenges(headers: Iterable[str]) -> tuple[Challenge, ...]:
    """All challenges of the headers; what cannot be read is left out."""
    challenges: list[Challenge] = []
    for header in headers:
        position = 0
        text = header[:_MAX_HEADER_LENGTH]
        while position < len(text):
            parameter = _PARAMETER.match(text, position)
            if parameter is not None and challenges:
                value = parameter[3] if parameter[2] is None else _ESCAPE.sub(r"\1", parameter[2])
                challenges[-1].parameters.setdefault(parameter[1].lower(), value)
                position = parameter.end()
                continue
            scheme = _SCHEME.match(text, position)
            if scheme is None:
                break
            challenges.append(Challenge(scheme[1].lower()))
            position = scheme.end()
    return tuple(challenges)
