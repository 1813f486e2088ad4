"""Parser of WWW-Authenticate headers (RFC 9110, section 11.6.1)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME: Final = re.compile(rf"[\s,]*({_TOKEN})(?:[ \t]+|$|(?=,))")
# some servers omit the quotes around a URL, so accept any value without blanks and commas
_PARAMETER: Final = re.compile(rf'[\s,]*({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s,"=][^\s,"]*))')
_TOKEN68: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*[ \t]*(?=,|$)")
_ESCAPE: Final = re.compile(r"\\(.)")
_MAX_HEADER_LENGTH: Final = 8192


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge. The scheme and the parameter names are in lower case."""

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)


def parse_challenges(headers: Iterable[str]) -> tuple[Challenge, ...]:
    """Return the challenges of all headers. Malformed text and what follows it in a header is ignored."""
    return tuple(challenge for header in headers for challenge in _parse(header[:_MAX_HEADER_LENGTH]))


def _parse(header: str) -> list[Challenge]:
    challenges: list[Challenge] = []
    position = 0
    while position < len(header):
        parameter = _PARAMETER.match(header, position)
        if parameter is not None and challenges:
            value = parameter[3] if parameter[2] is None else _ESCAPE.sub(r"\1", parameter[2])
            challenges[-1].parameters.setdefault(parameter[1].lower(), value)
            position = parameter.end()
            continue
        scheme = _SCHEME.match(header, position)
        if scheme is None:
            break
        challenges.append(Challenge(scheme[1].lower()))
        position = scheme.end()
        credentials = _TOKEN68.match(
            header, position
        )  # of Negotiate and similar schemes, which are not supported
        if credentials is not None:
            position = credentials.end()
    return challenges
