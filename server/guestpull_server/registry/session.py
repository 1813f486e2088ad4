"""Requests of one caller to one endpoint, with authentication, redirects and retries.

Failed connections and the status codes 408, 425, 429 and 5xx are retried with exponential backoff and jitter, or
after Retry-After, within `limits.max_attempts` and the deadline of the request. Other failures are final.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

import urllib3

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Limits
from guestpull_server.errors import (
    AccessDenied,
    GuestpullError,
    RateLimited,
    RegistryUnavailable,
    Unauthenticated,
)
from guestpull_server.models import KiB, without_password
from guestpull_server.registry.authentication import Authorization
from guestpull_server.registry.deadlines import Body, TransportError
from guestpull_server.registry.endpoints import Endpoint
from guestpull_server.registry.failures import is_final, plain
from guestpull_server.registry.transport import Transport
from guestpull_server.registry.urls import is_loopback, is_usable, origin

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_WORTH_A_RETRY: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_FIRST_DELAY: Final = 0.25  # seconds; doubles with each attempt
_MOST_ATTEMPTS_AT_A_MIRROR: Final = 2  # the next endpoint is faster than a mirror that is down
_MAX_TOKEN_BYTES: Final = 256 * KiB
_PIECE_BYTES: Final = 64 * KiB


_T = TypeVar("_T")


class TooLong(Exception):
    """The body exceeds its limit."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """A failed attempt that is worth a retry."""

    problem: str
    status: int = 0
    retry_after: float | None = None


class Session:
    """Requests on behalf of one caller.

    Attributes:
        reference: the image, as errors name it.
        endpoint: the registry or mirror.
        max_attempts: the maximum number of attempts for one request.
    """

    def __init__(
        self,
        reference: str,
        endpoint: Endpoint,
        authorization: Authorization,
        transport: Transport,
        limits: Limits,
    ) -> None:
        self.reference = reference
        self.endpoint = endpoint
        self._authorization = authorization
        self._transport = transport
        self._limits = limits
        self.max_attempts = (
            min(limits.max_attempts, _MOST_ATTEMPTS_AT_A_MIRROR)
            if endpoint.is_mirror
            else limits.max_attempts
        )

    @property
    def host(self) -> str:
        """The registry's host, for errors."""
        return self.endpoint.host

    def get(
        self, path: str, headers: Mapping[str, str], cancellation: Cancellation
    ) -> urllib3.BaseHTTPResponse:
        """GET `/v2/<repository>/<path>`.

        Returns a response with status 200, 206, 404 or 416 and an unread body, which the caller must close.

        Raises:
            Unauthenticated: credentials are missing or were rejected.
            AccessDenied: the registry denied access.
            RateLimited: the status is still 429 after all retries.
            RegistryUnavailable: the registry does not respond, or its response is unusable.
            Cancelled: the request was cancelled.
            DeadlineExceeded: the deadline of the request passed.
        """
        return self._retrying(lambda: self._attempt(path, headers, cancellation), cancellation)

    def document(
        self, path: str, headers: Mapping[str, str], limit: int, cancellation: Cancellation
    ) -> tuple[urllib3.BaseHTTPResponse, bytes]:
        """Like `get`, and read the body if the status is 200. Retry if the body breaks off.

        Raises:
            TooLong: the body is longer than `limit` bytes.
            GuestpullError: as `get`.
        """

        def attempt() -> tuple[urllib3.BaseHTTPResponse, bytes] | _Failure:
            response = self._attempt(path, headers, cancellation)
            if isinstance(response, _Failure):
                return response
            if response.status != HTTPStatus.OK:
                response.close()
                return response, b""
            try:
                return response, self._body(response, limit, cancellation)
            except TransportError as error:
                return _Failure(plain(error))

        return self._retrying(attempt, cancellation)

    def _body(self, response: urllib3.BaseHTTPResponse, limit: int, cancellation: Cancellation) -> bytes:
        received = bytearray()
        with Body(response, cancellation, self._limits) as body:
            while piece := body.read(_PIECE_BYTES):
                received += piece
                if len(received) > limit:
                    raise TooLong
        return bytes(received)

    def backoff(self, attempt: int, cancellation: Cancellation) -> None:
        """Wait after a failed attempt, counted from 1: exponential backoff with full jitter."""
        longest = min(self._limits.max_retry_delay, _FIRST_DELAY * 2 ** (attempt - 1))
        cancellation.sleep(random.uniform(0, longest))

    def _retrying(self, attempt_once: Callable[[], _T | _Failure], cancellation: Cancellation) -> _T:
        attempt = 1
        while True:
            outcome = attempt_once()
            if not isinstance(outcome, _Failure):
                return outcome
            if attempt >= self.max_attempts:
                raise self._given_up(outcome, attempt)
            self._wait(outcome, attempt, cancellation)
            attempt += 1

    def _wait(self, failure: _Failure, attempt: int, cancellation: Cancellation) -> None:
        if not failure.retry_after:  # absent or 0: a retry at once would be faster than the backoff
            self.backoff(attempt, cancellation)
            return
        remaining = cancellation.remaining()
        if remaining is not None and failure.retry_after > remaining:
            raise self._given_up(failure, attempt)
        cancellation.sleep(min(failure.retry_after, self._limits.max_retry_delay))

    def _given_up(self, failure: _Failure, attempts: int) -> GuestpullError:
        if failure.status == HTTPStatus.TOO_MANY_REQUESTS:
            seconds = f"{failure.retry_after:.0f}" if failure.retry_after else ""
            return RateLimited(self.reference, self.host, seconds)
        return RegistryUnavailable(self.reference, self.host, failure.problem, attempts)

    def _attempt(
        self, path: str, headers: Mapping[str, str], cancellation: Cancellation
    ) -> urllib3.BaseHTTPResponse | _Failure:
        """Send one request, with authentication and redirects."""
        base_url = self._transport.base_url(self.endpoint, cancellation)
        url = f"{base_url}/v2/{self.endpoint.repository}/{path}"
        sent = self._authorization.header
        response = self._follow(url, headers, sent, cancellation)
        # the token can have expired, so renew it once; a second 401 is final
        if isinstance(response, urllib3.BaseHTTPResponse) and response.status == HTTPStatus.UNAUTHORIZED:
            response.close()
            challenges = response.headers.getlist("WWW-Authenticate")
            self._authorization.answer(
                base_url, challenges, sent, lambda url, headers: self._token(url, headers, cancellation)
            )
            response = self._follow(url, headers, self._authorization.header, cancellation)
        return response if isinstance(response, _Failure) else self._checked(response, path)

    def _checked(self, response: urllib3.BaseHTTPResponse, path: str) -> urllib3.BaseHTTPResponse | _Failure:
        status = response.status
        if status in (200, 206, 404, 416):
            return response
        response.close()
        if status == HTTPStatus.UNAUTHORIZED:
            raise Unauthenticated(self.reference, self.host, self._authorization.with_credentials)
        if status == HTTPStatus.FORBIDDEN:
            raise AccessDenied(self.reference, self.host)
        problem = f"status {status} for GET {path.partition('/')[0]}"
        if status == HTTPStatus.BAD_REQUEST:  # the server can have switched to TLS
            self._transport.forget_scheme(self.endpoint)
        if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            problem = "the proxy requires credentials (407); add them to its URL in image_pull_proxy"
        if status in _WORTH_A_RETRY or status > HTTPStatus.INTERNAL_SERVER_ERROR:
            return _Failure(problem, status, _retry_after(response))
        raise RegistryUnavailable(self.reference, self.host, problem, 1)

    def _follow(
        self, url: str, headers: Mapping[str, str], authorization: str | None, cancellation: Cancellation
    ) -> urllib3.BaseHTTPResponse | _Failure:
        """Send one request and follow redirects. Do not send the Authorization header to other hosts."""
        home = origin(url)
        for _ in range(self._limits.max_redirects + 1):
            own = origin(url) == home
            sent = dict(headers)
            if own and authorization is not None:
                sent["Authorization"] = authorization
            try:
                insecure = self.endpoint.insecure and own
                response = self._transport.get(url, sent, cancellation, insecure=insecure)
            except TransportError as error:
                self._transport.forget_scheme(self.endpoint)
                problem = self._problem(url, error, own=own)
                if is_final(error):
                    raise RegistryUnavailable(self.reference, self.host, problem, 1) from None
                return _Failure(problem)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                if not own and response.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                    # do not answer the challenge of another host, which can name its own token server
                    response.close()
                    raise AccessDenied(self.reference, urlsplit(url).netloc)
                return response
            response.close()
            url = self._redirected(url, location)
        problem = f"more than {self._limits.max_redirects} redirects"
        raise RegistryUnavailable(self.reference, self.host, problem, 1)

    def _problem(self, url: str, error: Exception, *, own: bool) -> str:
        """Describe a failure, with the redirect and the proxy that led to it."""
        proxy = self._transport.proxy_of(url)
        where = "" if own else f"redirect to {urlsplit(url).netloc}: "
        return f"{where}{plain(error)}{'' if proxy is None else f', via proxy {proxy}'}"

    def _redirected(self, url: str, location: str) -> str:
        try:
            here, target = urlsplit(url), urlsplit(urljoin(url, location))
            usable = is_usable(target)
        except ValueError:
            usable = False
        if not usable:
            # the query can be a signature, which is a secret
            shown = without_password(location.partition("?")[0][:200])
            problem = f"redirect to an unusable URL {shown!r}"
        elif here.scheme == "https" and target.scheme == "http" and not _are_loopback(here, target):
            problem = f"redirect from HTTPS to plain HTTP at {target.netloc}"
        else:
            return target.geturl()
        raise RegistryUnavailable(self.reference, self.host, problem, 1)

    def _token(self, url: str, headers: Mapping[str, str], cancellation: Cancellation) -> bytes:
        """Send a request to a token server, with the same rules."""
        server = urlsplit(url).netloc

        def attempt() -> bytes | _Failure:
            response = self._follow(url, {}, headers.get("Authorization"), cancellation)
            if isinstance(response, _Failure):
                return _Failure(f"token server {server}: {response.problem}")
            status = response.status
            if status == HTTPStatus.OK:
                try:
                    return self._body(response, _MAX_TOKEN_BYTES, cancellation)
                except TooLong:
                    return _Failure(f"token server {server}: response too large")
                except TransportError as error:
                    return _Failure(f"token server {server}: {plain(error)}")
            response.close()
            if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.BAD_REQUEST):
                raise Unauthenticated(self.reference, server, "Authorization" in headers)
            return _Failure(f"token server {server}: status {status}", status, _retry_after(response))

        return self._retrying(attempt, cancellation)


def _are_loopback(*urls: SplitResult) -> bool:
    return all(is_loopback(url.netloc) for url in urls)


def _retry_after(response: urllib3.BaseHTTPResponse) -> float | None:
    """Return Retry-After in seconds, from a number or a date (RFC 9110, section 10.2.3)."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal() and len(value) < 10:
        return float(value)
    try:
        when = parsedate_to_datetime(value)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):  # not a date, or out of range
        return None
