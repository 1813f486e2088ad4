"""Basic and Bearer authentication at registries.

Follows "Token Authentication" of the distribution specification. Tokens are cached until they expire, by host,
repository and credentials, so that no caller uses a token that another caller's credentials obtained.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias
from urllib.parse import SplitResult, urlencode, urlsplit

import msgspec

from guestpull_server.errors import RegistryUnavailable, Unauthenticated
from guestpull_server.models import Credentials, without_password
from guestpull_server.registry.challenges import Challenge, parse_challenges
from guestpull_server.registry.endpoints import Endpoint
from guestpull_server.registry.urls import is_usable

FetchToken: TypeAlias = Callable[[str, dict[str, str]], bytes]
"""Sends a GET request with headers, with retries; returns the body or raises a GuestpullError."""

_DEFAULT_TOKEN_SECONDS: Final = 60  # the specification's default for expires_in
_MAX_TOKEN_SECONDS: Final = 3600
_RENEW_BEFORE_SECONDS: Final = 5
_MAX_CACHED: Final = 1000


class _TokenAnswer(msgspec.Struct, frozen=True):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


class Tokens:
    """A cache of Authorization headers. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._headers: dict[tuple[str, ...], tuple[str, float]] = {}

    def get(self, key: tuple[str, ...]) -> str | None:
        """Return the header for a key; None if there is none or it expired."""
        with self._lock:
            header, expires = self._headers.get(key, ("", 0.0))
            return header if time.monotonic() < expires else None

    def put(self, key: tuple[str, ...], header: str, seconds: float) -> None:
        """Cache a header for a number of seconds."""
        with self._lock:
            if len(self._headers) >= _MAX_CACHED:
                self._headers.clear()
            self._headers[key] = header, time.monotonic() + seconds - _RENEW_BEFORE_SECONDS

    def drop(self, key: tuple[str, ...], header: str) -> None:
        """Remove a header that the registry rejected."""
        with self._lock:
            if self._headers.get(key, ("", 0.0))[0] == header:
                del self._headers[key]


class Authorization:
    """Authentication of one caller at one endpoint.

    Args:
        reference: the image, as errors name it.
        endpoint: the registry or mirror.
        credentials: finds the credentials. Called before the first request, not for images of the store.
        tokens: the cache.
    """

    def __init__(
        self,
        reference: str,
        endpoint: Endpoint,
        credentials: Callable[[], Credentials | None],
        tokens: Tokens,
    ) -> None:
        self._reference = reference
        self._endpoint = endpoint
        self._find_credentials = credentials
        self._tokens = tokens

    @functools.cached_property
    def _credentials(self) -> Credentials | None:
        return self._find_credentials()

    @functools.cached_property
    def _key(self) -> tuple[str, ...]:
        return self._endpoint.host, self._endpoint.repository, _fingerprint(self._credentials)

    @property
    def with_credentials(self) -> bool:
        """Whether the caller or the configuration has credentials."""
        return self._credentials is not None

    @property
    def header(self) -> str | None:
        """The Authorization header to send; None until the registry has asked for one.

        Raises:
            InvalidConfiguration: the credentials file cannot be read.
        """
        return self._tokens.get(self._key)

    def answer(
        self, base_url: str, challenges: Sequence[str], rejected: str | None, fetch: FetchToken
    ) -> None:
        """Answer a 401 response: afterwards `header` is what the registry asked for.

        Args:
            base_url: of the registry. A token server may use plain HTTP only if the registry does.
            challenges: the WWW-Authenticate headers.
            rejected: the Authorization header of the request, if it had one.
            fetch: sends the request to the token server.

        Raises:
            Unauthenticated: there are no credentials, or they were rejected.
            RegistryUnavailable: the token server's response is unusable.
        """
        if rejected is not None:
            self._tokens.drop(self._key, rejected)
        by_scheme = {challenge.scheme: challenge for challenge in reversed(parse_challenges(challenges))}
        if "bearer" in by_scheme:
            self._fetch_token(base_url, by_scheme["bearer"], fetch)
        elif "basic" in by_scheme and self._credentials is not None:
            if rejected is not None:
                raise self._unauthenticated()
            self._tokens.put(self._key, _basic(self._credentials), float("inf"))
        else:
            raise self._unauthenticated()

    def _fetch_token(self, base_url: str, challenge: Challenge, fetch: FetchToken) -> None:
        realm = self._realm(base_url, challenge)
        asked = {"service": challenge.parameters.get("service", "")}
        asked["scope"] = challenge.parameters.get("scope") or f"repository:{self._endpoint.repository}:pull"
        headers: dict[str, str] = {}
        if self._credentials is not None:
            asked["account"] = self._credentials.user
            headers["Authorization"] = _basic(self._credentials)
        query = urlencode({name: value for name, value in asked.items() if value})
        url = realm._replace(query="&".join(part for part in (realm.query, query) if part)).geturl()
        body = fetch(url, headers)
        try:
            answer = msgspec.json.decode(body, type=_TokenAnswer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            answer = _TokenAnswer()
        token = answer.token or answer.access_token
        if not token or not token.isascii() or not token.isprintable():
            problem = f"no token in the response of token server {realm.netloc}"
            raise RegistryUnavailable(self._reference, self._endpoint.host, problem, 1)
        seconds = min(max(answer.expires_in or 0, _DEFAULT_TOKEN_SECONDS), _MAX_TOKEN_SECONDS)
        self._tokens.put(self._key, f"Bearer {token}", seconds)

    def _realm(self, base_url: str, challenge: Challenge) -> SplitResult:
        """Return the token server's URL if credentials may be sent there."""
        text = challenge.parameters.get("realm", "")
        allowed = ("https",) if base_url.startswith("https:") else ("https", "http")
        try:
            realm = urlsplit(text)
            usable = realm.scheme in allowed and is_usable(realm)
        except ValueError:
            usable = False
        if not usable:
            named = without_password(text[:200])
            problem = f"invalid token server {named!r}: expected an {' or '.join(allowed)} URL"
            raise RegistryUnavailable(self._reference, self._endpoint.host, problem, 1)
        return realm

    def _unauthenticated(self) -> Unauthenticated:
        return Unauthenticated(
            self._reference, self._endpoint.host, with_credentials=self._credentials is not None
        )


def _basic(credentials: Credentials) -> str:
    # command line arguments can contain bytes that are not UTF-8
    pair = f"{credentials.user}:{credentials.password}".encode(errors="surrogateescape")
    return f"Basic {base64.b64encode(pair).decode()}"


def _fingerprint(credentials: Credentials | None) -> str:
    """Identify credentials without storing them."""
    return "" if credentials is None else hashlib.sha256(_basic(credentials).encode()).hexdigest()
