"""Image references in the grammar of the distribution project, with Docker's short names.

    busybox                        -> docker.io/library/busybox:latest
    org/img:1.0                    -> docker.io/org/img:1.0
    localhost/img, host:5000/img   -> unchanged, with :latest
    quay.io/org/img@sha256:...     -> unchanged, because a digest needs no tag

Follows `ParseDockerRef` of distribution/reference, but keeps the tag beside a digest. The same texts are accepted,
with the same meaning, as by docker, podman and containerd.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from guestpull_server.errors import InvalidDigest, InvalidReference
from guestpull_server.models import Digest, without_password

DOCKER_HUB: Final = "docker.io"
_DOCKER_HUB_ALIASES: Final = frozenset({"index.docker.io", DOCKER_HUB})
_OFFICIAL_IMAGES: Final = "library"
_MAX_NAME_LENGTH: Final = 255

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST: Final = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY: Final = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_IMAGE_ID: Final = re.compile(r"[a-f0-9]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A complete image reference: a host, a repository, and a tag, a digest, or both.

    `str(reference)` is the normalized form, which parses to an equal reference.
    """

    host: str
    repository: str
    tag: str
    digest: Digest | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse a reference, short or complete.

        Raises:
            InvalidReference: the text is not a reference.
        """
        if (shown := without_password(text)) != text:
            raise InvalidReference(shown, "a reference cannot contain a user and a password")
        name, _, digest_text = text.partition("@")
        try:
            digest = Digest(digest_text) if "@" in text else None
        except InvalidDigest as error:
            raise InvalidReference(text, f"invalid digest {error.digest!r}") from None
        name, tag = _split_tag(name)
        if tag is not None and _TAG.fullmatch(tag) is None:
            raise InvalidReference(text, f"invalid tag {tag!r} (at most 128 letters, digits, _ . -)")
        if _IMAGE_ID.fullmatch(text):
            raise InvalidReference(text, "an image id is not a reference")
        host, repository = _split_host(name)
        if not _is_host(host):
            raise InvalidReference(text, f"invalid host {host!r}")
        if _REPOSITORY.fullmatch(repository) is None:
            raise InvalidReference(text, _problem(repository))
        if len(host) + 1 + len(repository) > _MAX_NAME_LENGTH:
            raise InvalidReference(text, f"the name is longer than {_MAX_NAME_LENGTH} characters")
        if tag is None and digest is None:
            tag = "latest"
        return cls(host, repository, tag or "", digest)

    @classmethod
    def in_full(cls, text: str) -> str | None:
        """Return the normalized form of a reference; None if the text is not a reference."""
        try:
            return str(cls.parse(text))
        except InvalidReference:
            return None

    @property
    def name(self) -> str:
        """Host and repository, without tag and digest."""
        return f"{self.host}/{self.repository}"

    @property
    def target(self) -> str:
        """What to request from the registry: the digest, or the tag if there is no digest."""
        return self.digest or self.tag

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}@{self.digest}" if self.digest else f"{self.name}{tag}"


def _split_tag(name: str) -> tuple[str, str | None]:
    before, colon, after = name.rpartition(":")
    # the colon in host:5000/img separates the port
    return (before, after) if colon and "/" not in after else (name, None)


def _split_host(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    names_a_host = "." in first or ":" in first or first == "localhost" or first.lower() != first
    host, repository = (first, rest) if slash and names_a_host else (DOCKER_HUB, name)
    if host in _DOCKER_HUB_ALIASES:
        host = DOCKER_HUB
        if repository and "/" not in repository:
            repository = f"{_OFFICIAL_IMAGES}/{repository}"
    return host, repository


def _is_host(host: str) -> bool:
    if _HOST.fullmatch(host) is None:
        return False
    try:
        return urlsplit(f"//{host}").port != 0
    except ValueError:  # a port above 65535, or brackets around an invalid IPv6 address
        return False


def _problem(repository: str) -> str:
    if not repository:
        return "the repository is missing"
    if repository.lower() != repository:
        return "the repository must be lower case"
    return f"invalid repository {repository!r}"
