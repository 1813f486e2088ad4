"""WWW-Authenticate headers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.registry.challenges import Challenge, parse_challenges


@pytest.mark.parametrize(
    ("header", "challenges"),
    [
        ("Basic", [Challenge("basic")]),
        ('Basic realm="a b"', [Challenge("basic", {"realm": "a b"})]),
        (
            'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push"',
            [
                Challenge(
                    "bearer",
                    {
                        "realm": "https://auth.docker.io/token",
                        "service": "registry.docker.io",
                        "scope": "repository:a/b:pull,push",
                    },
                )
            ],
        ),
        ('BEARER REALM="x"', [Challenge("bearer", {"realm": "x"})]),
        (
            "Bearer realm=https://host/token, service=s",
            [Challenge("bearer", {"realm": "https://host/token", "service": "s"})],
        ),
        (r'Basic realm="a \"quoted\" \\ b"', [Challenge("basic", {"realm": r'a "quoted" \ b'})]),
        (
            'Bearer realm="x" , Basic realm="y"',
            [Challenge("bearer", {"realm": "x"}), Challenge("basic", {"realm": "y"})],
        ),
        ("Negotiate, Basic", [Challenge("negotiate"), Challenge("basic")]),
        ("Negotiate YWJj/+==, Basic realm=x", [Challenge("negotiate"), Challenge("basic", {"realm": "x"})]),
        ('Bearer realm="first",realm="second"', [Challenge("bearer", {"realm": "first"})]),
        ("", []),
        ('="', []),
        ('Bearer realm="unterminated', [Challenge("bearer")]),
    ],
)
def test_a_header_is_read_as_rfc_9110_says(header: str, challenges: list[Challenge]) -> None:
    assert list(parse_challenges([header])) == challenges


def test_parameters_of_a_second_header_are_not_those_of_the_first() -> None:
    assert parse_challenges(["Bearer", 'realm="x"']) == (Challenge("bearer"),)


@given(st.lists(st.text(), max_size=3))
def test_any_text_can_be_read(headers: list[str]) -> None:
    parse_challenges(headers)


tokens = st.text("abcxyz-_.", min_size=1, max_size=6)
parameters = st.dictionaries(tokens, st.text(st.characters(min_codepoint=32, max_codepoint=126)), max_size=3)


@given(st.lists(st.builds(Challenge, tokens, parameters), min_size=1, max_size=3))
def test_what_is_written_by_the_grammar_is_read(challenges: list[Challenge]) -> None:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    header = ", ".join(
        f"{one.scheme} " + ", ".join(f"{name}={quoted(value)}" for name, value in one.parameters.items())
        for one in challenges
    )
    assert list(parse_challenges([header])) == challenges
