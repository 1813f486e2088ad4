"""Bearer tokens and Basic: what an exchange with a registry carries, and how a refusal is answered.

Follows the distribution specification's "Token Authentication". Tokens are kept for as long as they last, by
host, repository and credentials: nobody profits from a token that another caller's password bought.
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
"""GETs an URL with headers, by the retry rules; returns the body, or raises a GuestpullError."""

_DEFAULT_TOKEN_SECONDS: Final = 60  # what the specification says where expires_in is missing
_MAX_TOKEN_SECONDS: Final = 3600
_RENEW_BEFORE_SECONDS: Final = 5
_MAX_CACHED: Final = 1000


class _TokenAnswer(msgspec.Struct, frozen=True):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


class Tokens:
    """Authorization headers that registries accepted, until they expire. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._headers: dict[tuple[str, ...], tuple[str, float]] = {}

    def get(self, key: tuple[str, ...]) -> str | None:
        """The header for a key, if it is still good."""
        with self._lock:
            header, expires = self._headers.get(key, ("", 0.0))
            return header if time.monotonic() < expires else None

    def put(self, key: tuple[str, ...], header: str, seconds: float) -> None:
        """Remember a header for so many seconds."""
        with self._lock:
            if len(self._headers) >= _MAX_CACHED:
                self._headers.clear()
            self._headers[key] = header, time.monotonic() + seconds - _RENEW_BEFORE_SECONDS

    def drop(self, key: tuple[str, ...], header: str) -> None:
        """Forget a header that was refused."""
        with self._lock:
            if self._headers.get(key, ("", 0.0))[0] == header:
                del self._headers[key]


class Authorization:
    """How one caller authenticates at one endpoint.

    Args:
        reference: what errors name.
        endpoint: where it is.
        credentials: finds the caller's; called once there is something to send, since what is here needs none.
        tokens: those that were given before.
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
        """Whether the caller, or the configuration, gave any."""
        return self._credentials is not None

    @property
    def header(self) -> str | None:
        """The Authorization header to send; None before the registry has asked for any.

        Raises:
            InvalidConfiguration: the credentials file cannot be read.
        """
        return self._tokens.get(self._key)

    def answer(
        self, base_url: str, challenges: Sequence[str], refused: str | None, fetch: FetchToken
    ) -> None:
        """Meet a 401: afterwards `header` is what the registry asked for.

        Args:
            base_url: of the registry; plain HTTP to a token server is acceptable only if it is plain itself.
            challenges: the WWW-Authenticate headers.
            refused: the header that was sent with the request that was answered so.
            fetch: how to ask the token server.

        Raises:
            Unauthenticated: there is nothing to answer with, or it was refused.
            RegistryUnavailable: the token server answers nonsense.
        """
        if refused is not None:
            self._tokens.drop(self._key, refused)
        by_scheme = {challenge.scheme: challenge for challenge in reversed(parse_challenges(challenges))}
        if "bearer" in by_scheme:
            self._fetch_token(base_url, by_scheme["bearer"], fetch)
        elif "basic" in by_scheme and self._credentials is not None:
            if refused is not None:
                raise self._refusal()
            self._tokens.put(self._key, _basic(self._credentials), float("inf"))
        else:
            raise self._refusal()

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
            problem = f"its token server {realm.netloc} gives no token"
            raise RegistryUnavailable(self._reference, self._endpoint.host, problem, 1)
        seconds = min(max(answer.expires_in or 0, _DEFAULT_TOKEN_SECONDS), _MAX_TOKEN_SECONDS)
        self._tokens.put(self._key, f"Bearer {token}", seconds)

    def _realm(self, base_url: str, challenge: Challenge) -> SplitResult:
        """The token server's URL, if credentials may be sent there."""
        text = challenge.parameters.get("realm", "")
        allowed = ("https",) if base_url.startswith("https:") else ("https", "http")
        try:
            realm = urlsplit(text)
            usable = realm.scheme in allowed and is_usable(realm)
        except ValueError:
            usable = False
        if not usable:
            named = without_password(text[:200])
            problem = f"it names the token server {named!r}, which is no {' or '.join(allowed)} URL"
            raise RegistryUnavailable(self._reference, self._endpoint.host, problem, 1)
        return realm

    def _refusal(self) -> Unauthenticated:
        return Unauthenticated(
            self._reference, self._endpoint.host, with_credentials=self._credentials is not None
        )


def _basic(credentials: Credentials) -> str:
    # an argument of a command line need not be UTF-8
    pair = f"{credentials.user}:{credentials.password}".encode(errors="surrogateescape")
    return f"Basic {base64.b64encode(pair).decode()}"


def _fingerprint(credentials: Credentials | None) -> str:
    """Tells credentials apart without keeping them."""
    return "" if credentials is None else hashlib.sha256(_basic(credentials).encode()).hexdigest()
