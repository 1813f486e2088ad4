"""HTTP connections to registries: pools, TLS, proxies, deadlines.

`Transport.get` sends one request without retries, redirects or authentication, which session.py adds. One deadline
bounds the request from name resolution to the end of the response header, and cancellation ends it at once.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.client import BadStatusLine, RemoteDisconnected
from typing import Final
from urllib.parse import unquote, urlsplit

import urllib3

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Configuration
from guestpull_server.errors import InvalidConfiguration
from guestpull_server.registry.connections import Pool, TlsPool, TlsSocket
from guestpull_server.registry.deadlines import Deadline, TransportError
from guestpull_server.registry.endpoints import Endpoint
from guestpull_server.registry.proxies import Proxies
from guestpull_server.version import __version__

_USER_AGENT: Final = f"guestpull/{__version__}"
_PROBE_SECONDS: Final = 3.0


class Transport:
    """All connections to registries. Thread-safe.

    Raises:
        InvalidConfiguration: `extra_root_certificates` or a proxy is invalid.
    """

    def __init__(self, configuration: Configuration) -> None:
        limits = configuration.limits
        self._limits = limits
        self._timeout = urllib3.Timeout(connect=limits.connect_timeout, read=limits.read_timeout)
        self._kept_connections = limits.max_concurrent_pulls + limits.max_concurrent_layers
        self._proxies = Proxies(configuration)
        self._extra_certificates = configuration.extra_root_certificates
        _add(self._extra_certificates, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))  # to report errors early
        self._lock = threading.Lock()
        self._managers: dict[tuple[str, bool, str | None], urllib3.PoolManager] = {}
        self._schemes: dict[tuple[str, bool], str] = {}

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            for manager in self._managers.values():
                manager.clear()

    def base_url(self, endpoint: Endpoint, cancellation: Cancellation) -> str:
        """Return `scheme://host` of an endpoint: https, or http if it is allowed and the server uses it."""
        if not endpoint.insecure and not endpoint.is_loopback:
            return f"https://{endpoint.host}"
        key = (endpoint.host, endpoint.insecure)
        scheme = self._schemes.get(key)
        if scheme is None:
            scheme, certain = self._probed_scheme(endpoint, cancellation)
            if certain:
                self._schemes[key] = scheme
        return f"{scheme}://{endpoint.host}"

    def proxy_of(self, url: str) -> str | None:
        """Return the `host:port` of the proxy for a URL; None if there is none."""
        proxy = self._proxies.for_url(url)
        return None if proxy is None else urlsplit(proxy).netloc.rpartition("@")[2]

    def forget_scheme(self, endpoint: Endpoint) -> None:
        """Probe the scheme of an endpoint again, because the server failed and can have changed."""
        self._schemes.pop((endpoint.host, endpoint.insecure), None)

    def get(
        self,
        url: str,
        headers: Mapping[str, str],
        cancellation: Cancellation,
        *,
        insecure: bool = False,
        seconds: float | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """Send a GET request; returns after the response header, with the body unread.

        Args:
            url: an absolute http or https URL.
            headers: sent in addition to the default ones.
            cancellation: of the request. Read the body through `Body`, which observes it as well.
            insecure: do not verify the certificate.
            seconds: the timeout; None for `limits.connect_timeout` plus `limits.read_timeout`.

        Raises:
            TransportError: the request failed or timed out.
            Cancelled: the request was cancelled.
            DeadlineExceeded: the deadline of the request passed.
        """
        cancellation.check()
        manager = self._manager(urlsplit(url).scheme, insecure, self._proxies.for_url(url))
        deadline = Deadline(cancellation)
        deadline.start(seconds or self._limits.connect_timeout + self._limits.read_timeout)
        try:
            return manager.request(
                "GET",
                url,
                headers={"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", **headers},
                timeout=self._timeout,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
        except TransportError:
            cancellation.check()
            if deadline.passed:
                raise TimeoutError from None
            raise
        finally:
            deadline.close()

    def _manager(self, scheme: str, insecure: bool, proxy: str | None) -> urllib3.PoolManager:
        with self._lock:
            key = (scheme, insecure, proxy)
            manager = self._managers.get(key)
            if manager is None:
                manager = self._managers[key] = self._new_manager(*key)
            return manager

    def _new_manager(self, scheme: str, insecure: bool, proxy: str | None) -> urllib3.PoolManager:
        context: ssl.SSLContext | None = None
        if scheme == "https":
            context = _unverifying_context() if insecure else self._verifying_context()
        if proxy is None:
            manager = urllib3.PoolManager(maxsize=self._kept_connections, ssl_context=context)
        else:
            manager = urllib3.ProxyManager(
                proxy,
                maxsize=self._kept_connections,
                proxy_headers=_proxy_headers(proxy),
                proxy_ssl_context=self._verifying_context() if proxy.startswith("https:") else None,
                ssl_context=context,
            )
        manager.pool_classes_by_scheme = {"http": Pool, "https": TlsPool}
        return manager

    def _verifying_context(self) -> ssl.SSLContext:
        """Load the system's and the extra certificates. Done on first use, because it takes 30 ms."""
        context = ssl.create_default_context()
        _add(self._extra_certificates, context)
        context.sslsocket_class = TlsSocket
        return context

    # -- http or https --------------------------------------------------------------------------------------

    def _probed_scheme(self, endpoint: Endpoint, cancellation: Cancellation) -> tuple[str, bool]:
        """Probe whether a server uses TLS; returns the scheme, and whether the result is certain.

        With an explicit port, try plain HTTP first: a TLS server answers at once with an alert, a reset or a 400,
        whereas some plain HTTP servers wait for the end of a line after a TLS greeting. Without a port, or through
        a proxy, try https first.
        """
        is_direct = self._proxies.for_url(f"http://{endpoint.host}") is None
        own_port = is_direct and urlsplit(f"//{endpoint.host}").port is not None
        first = "http" if own_port else "https"
        other = "https" if first == "http" else "http"
        try:
            response = self.get(
                f"{first}://{endpoint.host}/v2/",
                {},
                cancellation,
                insecure=endpoint.insecure,
                seconds=_PROBE_SECONDS,
            )
        except TransportError as error:
            if _uses_other_scheme(first, error):
                return other, True
            untrusted = isinstance(error, urllib3.exceptions.SSLError)  # the request itself reports it
            unreachable = own_port and not isinstance(error, urllib3.exceptions.ProtocolError)
            return (first if untrusted or unreachable else other), False
        response.close()
        # many TLS servers answer plain HTTP with 400
        return (
            (other, True) if first == "http" and response.status == HTTPStatus.BAD_REQUEST else (first, True)
        )


def _uses_other_scheme(scheme: str, error: Exception) -> bool:
    """Whether a server's answer shows that it uses the other scheme."""
    if scheme == "http":
        reason = error.args[-1] if isinstance(error, urllib3.exceptions.ProtocolError) else None
        return isinstance(reason, BadStatusLine) and not isinstance(reason, RemoteDisconnected)
    return isinstance(error, urllib3.exceptions.SSLError) and "certificate" not in str(error).lower()


def _unverifying_context() -> ssl.SSLContext:
    urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # the configuration says `insecure`
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.sslsocket_class = TlsSocket
    return context


def _add(certificates: Sequence[str], context: ssl.SSLContext) -> None:
    for number, certificate in enumerate(certificates):
        try:
            # bundles often have the owners' names between the certificates
            context.load_verify_locations(cadata=certificate.encode("ascii", "ignore").decode())
        except (ssl.SSLError, ValueError) as error:
            place, problem = f"extra_root_certificates[{number}]", f"invalid PEM certificate ({error})"
            raise InvalidConfiguration("the configuration", place, problem) from None


def _proxy_headers(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return urllib3.make_headers(proxy_basic_auth=pair)
