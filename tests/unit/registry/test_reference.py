"""References: the distribution project's grammar, and Docker's short forms."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.errors import InvalidReference
from guestpull_server.registry import Reference

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"busybox:1.36@{DIGEST}", f"docker.io/library/busybox:1.36@{DIGEST}"),
        ("org/img", "docker.io/org/img:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/org/img", "docker.io/org/img:latest"),
        ("localhost/img", "localhost/img:latest"),
        ("localhost", "docker.io/library/localhost:latest"),
        ("localhost:5000/img", "localhost:5000/img:latest"),
        ("host:5000/img:1.0", "host:5000/img:1.0"),
        ("host:5000", "docker.io/library/host:5000"),
        ("quay.io/org/team/img", "quay.io/org/team/img:latest"),
        ("127.0.0.1:5000/a/b", "127.0.0.1:5000/a/b:latest"),
        ("[::1]:5000/img", "[::1]:5000/img:latest"),
        ("Registry/img", "Registry/img:latest"),
        ("a.b/c__d/e--f.g_h", "a.b/c__d/e--f.g_h:latest"),
        (f"{HEX}:latest", f"docker.io/library/{HEX}:latest"),
    ],
)
def test_a_reference_is_completed_as_docker_does(text: str, normalised: str) -> None:
    assert str(Reference.parse(text)) == normalised


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "repository is missing"),
        ("Busybox", "lower case"),
        ("quay.io/Org/img", "lower case"),
        (HEX, "image id"),
        ("img:", "invalid tag"),
        ("img:-1", "invalid tag"),
        ("img:" + "t" * 129, "invalid tag"),
        ("img@", "invalid digest"),
        ("img@sha256:abc", "invalid digest"),
        (f"img@{DIGEST.upper()}", "invalid digest"),
        (f"img@md5:{HEX[:32]}", "invalid digest"),
        ("a" * 256, "longer than 255"),
        ("https://quay.io/img", "invalid host"),
        ("-host.io/img", "invalid host"),
        ("host.io:99999/img", "invalid host"),
        ("[::::]:80/img", "invalid host"),
        ("quay.io/", "repository is missing"),
        ("quay.io//img", "invalid repository"),
        ("img/", "invalid repository"),
        ("a..b", "invalid repository"),
        ("a/../b", "invalid repository"),
        ("img name", "invalid repository"),
        ("img\n", "invalid repository"),
        ("img?x=1", "invalid repository"),
    ],
)
def test_what_is_no_reference_is_refused_with_what_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(InvalidReference) as raised:
        Reference.parse(text)
    assert problem in raised.value.problem


def test_a_name_may_have_255_characters() -> None:
    name = "a.io/" + "b" * 250
    assert Reference.parse(name).name == name


def test_a_tag_may_have_128_characters() -> None:
    assert Reference.parse("img:" + "t" * 128).tag == "t" * 128


def test_the_parts_of_a_reference() -> None:
    reference = Reference.parse(f"quay.io:443/org/img:1.0@{DIGEST}")

    assert reference.host == "quay.io:443"
    assert reference.repository == "org/img"
    assert reference.tag == "1.0"
    assert reference.digest == DIGEST


def test_a_reference_by_digest_alone_has_no_tag() -> None:
    assert Reference.parse(f"img@{DIGEST}").tag == ""


# -- for all -----------------------------------------------------------------------------------------------

alphanumeric = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=8)
components = st.builds(
    lambda parts, separator: separator.join(parts),
    st.lists(alphanumeric, min_size=1, max_size=3),
    st.sampled_from([".", "_", "__", "-", "---"]),
)
hosts = st.sampled_from(["", "docker.io/", "localhost/", "quay.io/", "host:5000/", "[fe80::1]:80/", "UPPER/"])
tags = st.sampled_from(["", ":1.0", ":_x", ":Latest"])
digests = st.sampled_from(["", f"@{DIGEST}", f"@sha512:{HEX * 2}"])
references = st.builds(
    lambda host, path, tag, digest: f"{host}{'/'.join(path)}{tag}{digest}",
    hosts,
    st.lists(components, min_size=1, max_size=4),
    tags,
    digests,
)


@given(references)
def test_the_normalised_form_means_the_same(text: str) -> None:
    reference = Reference.parse(text)
    assert Reference.parse(str(reference)) == reference


@given(
    st.text(alphabet=string.ascii_letters + string.digits + ":/@.-_[] \n%é", max_size=60)
    | st.text(max_size=60)
)
def test_any_text_is_a_reference_or_refused_by_name(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except InvalidReference:
        return
    assert Reference.parse(str(reference)) == reference
