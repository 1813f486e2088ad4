"""HTTP as registries need it: pooled connections, TLS or plain by the endpoint's rules, proxies, and an end.

`Transport.get` makes one exchange: no retries, no redirects, no authentication; these are the room's other
modules. What it adds to urllib3 is that nothing waits for ever: an exchange, from connecting to the last byte
of the response's header, has one deadline, and ends at once when the caller leaves.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from guestpull_server import __version__
from guestpull_server.config import Configuration, ProxyConfig
from guestpull_server.errors import InvalidConfiguration
from guestpull_server.models import Cancellation
from guestpull_server.registry.endpoints import Endpoint, is_loopback

TransportError = (HTTPError, OSError, ValueError)
"""What an exchange, or reading from its response, may raise where the network or the server fails."""

_USER_AGENT: Final = f"guestpull/{__version__}"
_CONNECTIONS_PER_HOST: Final = 16
_PROBE_SECONDS: Final = 3.0
_PROBE: Final = b"GET /v2/ HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"

_watched = threading.local()


class _Watch:
    """Shuts the sockets of one exchange down at its deadline, or when the caller leaves."""

    def __init__(self, cancellation: Cancellation, seconds: float) -> None:
        self._cancellation = cancellation
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._over = False
        remaining = cancellation.remaining()
        self._timer = threading.Timer(seconds if remaining is None else min(seconds, remaining), self._end)
        self._timer.daemon = True

    def attach(self, connected: socket.socket) -> None:
        # a duplicate: wrapping a socket in TLS takes the descriptor away from the one that was wrapped
        duplicate = socket.socket(fileno=os.dup(connected.fileno()))
        with self._lock:
            self._sockets.append(duplicate)
            over = self._over
        if over:
            self._end()

    def __enter__(self) -> Self:
        _watched.watch = self
        self._withdraw = self._cancellation.on_cancel(self._end)
        self._timer.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        _watched.watch = None
        self._timer.cancel()
        self._withdraw()
        with self._lock:
            for duplicate in self._sockets:
                duplicate.close()
            self._sockets.clear()

    def _end(self) -> None:
        with self._lock:
            self._over = True
            for one in self._sockets:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)


def _attach_to_watch(connected: socket.socket | None) -> None:
    watch: _Watch | None = getattr(_watched, "watch", None)
    if watch is not None and connected is not None:
        watch.attach(connected)


class _Connection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        made = super()._new_conn()
        _attach_to_watch(made)
        return made

    def putrequest(
        self, method: str, url: str, skip_host: bool = False, skip_accept_encoding: bool = False
    ) -> None:
        _attach_to_watch(self.sock)  # of a connection that is used again
        super().putrequest(method, url, skip_host, skip_accept_encoding)


class _TlsConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        made = super()._new_conn()
        _attach_to_watch(made)
        return made

    def putrequest(
        self, method: str, url: str, skip_host: bool = False, skip_accept_encoding: bool = False
    ) -> None:
        _attach_to_watch(self.sock)
        super().putrequest(method, url, skip_host, skip_accept_encoding)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class Transport:
    """All connections to registries. Thread-safe.

    Raises:
        InvalidConfiguration: `extra_root_certificates` or a proxy cannot be used.
    """

    def __init__(self, configuration: Configuration) -> None:
        limits = configuration.limits
        self._limits = limits
        self._timeout = urllib3.Timeout(connect=limits.connect_timeout, read=limits.read_timeout)
        self._proxies = _Proxies(configuration.image_pull_proxy)
        self._verified = _verifying_context(configuration.extra_root_certificates)
        self._unverified = ssl.create_default_context()
        self._unverified.check_hostname = False
        self._unverified.verify_mode = ssl.CERT_NONE
        self._lock = threading.Lock()
        self._managers: dict[tuple[bool, str | None], urllib3.PoolManager] = {}
        self._schemes: dict[tuple[str, bool], str] = {}

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            for manager in self._managers.values():
                manager.clear()

    def base_url(self, endpoint: Endpoint) -> str:
        """`scheme://host` of an endpoint: https, or http where the rules allow it and the server wants it."""
        if not endpoint.insecure and not endpoint.is_loopback:
            return f"https://{endpoint.host}"
        key = (endpoint.host, endpoint.insecure)
        scheme = self._schemes.get(key)
        if scheme is None:
            scheme, certain = _probed_scheme(endpoint.host)
            if certain:
                self._schemes[key] = scheme
        return f"{scheme}://{endpoint.host}"

    def get(
        self, url: str, headers: Mapping[str, str], cancellation: Cancellation, *, insecure: bool = False
    ) -> urllib3.BaseHTTPResponse:
        """One GET; returns with the response's header, its body unread.

        Args:
            url: absolute, http or https.
            headers: added to the usual ones.
            cancellation: ends the exchange; reading the body is the caller's to watch.
            insecure: do not verify the certificate.

        Raises:
            TransportError: there was no response in time.
            Cancelled: the caller left.
            DeadlineExceeded: its time ran out.
        """
        cancellation.check()
        manager = self._manager(insecure, self._proxies.for_url(url))
        limits = self._limits
        try:
            with _Watch(cancellation, limits.connect_timeout + limits.read_timeout):
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
            raise

    def _manager(self, insecure: bool, proxy: str | None) -> urllib3.PoolManager:
        with self._lock:
            manager = self._managers.get((insecure, proxy))
            if manager is None:
                context = self._unverified if insecure else self._verified
                if proxy is None:
                    manager = urllib3.PoolManager(maxsize=_CONNECTIONS_PER_HOST, ssl_context=context)
                else:
                    manager = urllib3.ProxyManager(proxy, maxsize=_CONNECTIONS_PER_HOST, ssl_context=context)
                manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
                self._managers[insecure, proxy] = manager
            return manager


@contextmanager
def ended_by(cancellation: Cancellation, response: urllib3.BaseHTTPResponse) -> Iterator[None]:
    """Have a response's body end when the caller leaves: whoever reads it then gets an error at once."""

    def end() -> None:
        with suppress(*TransportError):
            response.shutdown()

    withdraw = cancellation.on_cancel(end)
    try:
        yield
    finally:
        withdraw()


def _verifying_context(extra_certificates: list[str]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for number, certificate in enumerate(extra_certificates):
        try:
            context.load_verify_locations(cadata=certificate)
        except (ssl.SSLError, ValueError) as error:
            place = f"extra_root_certificates[{number}]"
            raise InvalidConfiguration(
                "the configuration", place, f"it is no PEM certificate ({error})"
            ) from None
    return context


class _Proxies:
    """Which proxy an URL goes through: the configuration's, else the environment's; loopback never does."""

    def __init__(self, configured: ProxyConfig | None) -> None:
        if configured is None:
            self._by_scheme = getproxies_environment()
        else:
            by_scheme = {
                "https": configured.https_proxy,
                "http": configured.http_proxy,
                "no": configured.no_proxy,
            }
            self._by_scheme = {scheme: proxy for scheme, proxy in by_scheme.items() if proxy}
        for scheme in ("http", "https"):
            proxy = self._by_scheme.get(scheme)
            if proxy is not None and urlsplit(proxy).scheme not in ("http", "https"):
                # no repr of it: it may hold a password
                raise InvalidConfiguration("the configuration", f"{scheme}_proxy", "it is no http(s):// URL")

    def for_url(self, url: str) -> str | None:
        parts = urlsplit(url)
        if is_loopback(parts.netloc) or _bypassed(parts.netloc, self._by_scheme.get("no", "")):
            return None
        return self._by_scheme.get(parts.scheme)


def _bypassed(host: str, no_proxy: str) -> bool:
    """Whether no_proxy, a comma-separated list of hosts and domains, names a host; `*` names all."""
    name = urlsplit(f"//{host}").hostname or ""
    domains = [domain.strip().lower().lstrip(".") for domain in no_proxy.split(",")]
    return "*" in domains or any(
        domain and (domain in (name, host.lower()) or name.endswith(f".{domain}")) for domain in domains
    )


def _probed_scheme(host: str) -> tuple[str, bool]:
    """Ask a server whether it speaks plain HTTP; returns the scheme to use, and whether that is certain.

    Plain HTTP is asked first: a TLS server answers it at once by an alert, a reset or a 400, whereas some plain
    servers wait for the end of a line that a TLS greeting never has.
    """
    parts = urlsplit(f"//{host}")
    answer = b""
    try:
        port = parts.port
        with socket.create_connection((parts.hostname or "", port or 80), _PROBE_SECONDS) as connection:
            connection.sendall(_PROBE % os.fsencode(host))
            while len(answer) < 12 and (more := connection.recv(12 - len(answer))):
                answer += more
    except TimeoutError:
        return "http", False
    except ConnectionResetError:
        return "https", True
    except (OSError, ValueError):
        # nobody is there, at least at port 80
        return ("http" if port is not None else "https"), False
    if answer.startswith(b"HTTP/1.") and answer[9:12] != b"400":
        return "http", True
    return "https", True
