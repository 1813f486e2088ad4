"""A simulated registry with faults that tests switch on.

    with RegistrySimulator() as registry:
        shop = image(layer(*files("srv", count=100)))
        reference = registry.push("shop:1.0", shop)          # "127.0.0.1:43210/shop:1.0"
        registry.fault(shop.layers[0], Cut(after=0.5), times=1)

        ...pull it...

        assert registry.bytes_sent(shop.layers[0]) == shop.layers[0].size
        assert [request.status for request in registry.requests_for(shop.layers[0])] == [200, 206]

It is a real HTTP server on 127.0.0.1 that follows the distribution specification for pulls, including ranges
and token authentication. A `Fault` of faults.py gets the response that the registry would send, and sends
something else. A fault applies to a blob or a manifest (the object of `support.images`, or its digest), to a
tag (`"manifests/1.0"`), to `"token"` or to `"v2"`, and ends after `times` requests.
"""

from __future__ import annotations

import base64
import functools
import json
import secrets
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Final, Protocol, Self, TypeAlias
from urllib.parse import parse_qs, urlsplit

import trustme

from support.images import Image, Index, Layer, sha256
from support.waiting import PATIENCE

Target: TypeAlias = Layer | Image | Index | str


# -- responses --------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """The response that the registry would send; a fault may alter or replace it."""

    status: int
    body: bytes = field(default=b"", repr=False)
    headers: dict[str, str] = field(default_factory=dict)
    whole: bytes = field(default=b"", repr=False)  # the blob; `body` is the requested range of it


class Exchange:
    """One request, and the connection for its response."""

    def __init__(
        self, registry: RegistrySimulator, handler: _Handler, request: Request, answer: Answer
    ) -> None:
        self.registry = registry
        self.request = request
        self.answer = answer
        self._handler = handler

    def send(self) -> None:
        """Send the response unchanged."""
        self.send_header()
        self.write(self.answer.body)

    def send_header(self, *, length: int | None = -1) -> None:
        """Send the status line and the headers.

        Args:
            length: the Content-Length, by default the body's; None to omit it.
        """
        self._handler.wfile.write(b"".join(self.header_lines(length=length)))

    def header_lines(self, *, length: int | None = -1) -> list[bytes]:
        """The lines of the header."""
        answer = self.answer
        self.request.status = answer.status
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        if length is None:
            del headers["Content-Length"]
            headers.setdefault("Connection", "close")
        elif length >= 0:
            headers["Content-Length"] = str(length)
        self._handler.close_connection = headers.get("Connection") == "close"
        lines = [f"HTTP/1.1 {answer.status} Simulated"] + [
            f"{name}: {value}" for name, value in headers.items()
        ]
        return [f"{line}\r\n".encode("latin-1") for line in [*lines, ""]]

    def write(self, content: bytes) -> None:
        """Send bytes of the body, or other bytes."""
        step = 256 * 1024
        for start in range(0, len(content), step):
            piece = content[start : start + step]
            # count first: a test may check as soon as it has read everything
            self.request.sent_bytes += len(piece)
            self._handler.wfile.write(piece)

    def write_raw(self, content: bytes) -> None:
        """Send bytes that are not part of the body."""
        self._handler.wfile.write(content)

    def hang_up(self, *, reset: bool = False) -> None:
        """Close the connection, or reset it."""
        connection = self._handler.connection
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        else:
            connection.shutdown(socket.SHUT_RDWR)
        self._handler.close_connection = True

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the time is over or the simulator is closed; return whether it is closed."""
        return self.registry.closing.wait(seconds)


class Fault(Protocol):
    """A fault; see faults.py."""

    def send(self, exchange: Exchange) -> None:
        """Respond to a request."""


# -- requests ---------------------------------------------------------------------------------------------


@dataclass
class Request:
    """A request and the status of its response; 0 if there is none yet."""

    path: str
    headers: Mapping[str, str]
    client_port: int
    status: int = 0
    sent_bytes: int = 0

    @property
    def authorization(self) -> str:
        """The Authorization header; empty if there is none."""
        return self.headers.get("authorization", "")


@dataclass(frozen=True)
class Basic:
    """The registry requires user and password in each request."""

    user: str = "alice"
    password: str = "wonderland"


@dataclass(frozen=True)
class Bearer:
    """The registry requires tokens of a token server: its own, unless `realm` names another.

    Attributes:
        user: the user who gets tokens; empty for everybody.
        password: the password of that user.
        realm: URL of the token server.
        key: the name of the token in the token server's response.
        uses: the number of requests for which a token is valid; 0 for any number.
    """

    user: str = ""
    password: str = ""
    realm: str = ""
    key: str = "token"
    uses: int = 0


Authentication: TypeAlias = Basic | Bearer | None


@functools.cache
def certificate_authority() -> trustme.CA:
    """The authority that signs the certificates of simulators; one for the whole process."""
    return trustme.CA()


class RegistrySimulator:
    """A simulated registry, as a context manager; see the module's docstring.

    Args:
        authentication: the authentication that it requires.
        tls: use HTTPS, with a certificate of `certificate_authority` for its address and shop.example.
        address: the address to listen at; another loopback address counts as another host.
        port: the port to listen at; 0 for a free one.

    Attributes:
        sends_content_digests: whether to send manifests with a Docker-Content-Digest.
        challenge: a WWW-Authenticate header to send instead of the correct one.
        requests: all requests, in order.
        realm_requests: the queries to the token server.
    """

    def __init__(
        self,
        *,
        authentication: Authentication = None,
        tls: bool = False,
        address: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.authentication = authentication
        self.sends_content_digests = True
        self.challenge = ""
        self.closing = threading.Event()
        self.requests: list[Request] = []
        self.realm_requests: list[dict[str, str]] = []
        self._lock = threading.Lock()
        self._came = threading.Condition(self._lock)
        self._blobs: dict[str, bytes] = {}
        self._manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self._faults: list[_Active] = []
        self._tokens: dict[str, int] = {}
        handler = type("_BoundHandler", (_Handler,), {"registry": self})
        self._server = _Server((address, port), handler)
        self.scheme: Final = "https" if tls else "http"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate_authority().issue_cert(address, "shop.example").configure_cert(context)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.host: Final = f"{address}:{self._server.server_port}"
        self.url: Final = f"{self.scheme}://{self.host}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.005,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def push(self, name: str, pushed: Image | Index) -> str:
        """Add an image as `repository[:tag]`; return its reference."""
        repository, _, tag = name.partition(":")
        self._blobs |= pushed.blobs
        for media_type, content in pushed.manifests:
            self._manifests[repository, sha256(content)] = media_type, content
        self._manifests[repository, tag or "latest"] = pushed.manifests[-1]
        return f"{self.host}/{repository}:{tag or 'latest'}"

    def put_manifest(self, name: str, media_type: str, content: bytes) -> str:
        """Add any bytes as the manifest of `repository:tag` and of their digest; return the reference."""
        repository, _, tag = name.partition(":")
        self._manifests[repository, tag or "latest"] = media_type, content
        self._manifests[repository, sha256(content)] = media_type, content
        return f"{self.host}/{repository}:{tag or 'latest'}"

    def put_blob(self, digest: str, blob: bytes) -> None:
        """Add any bytes as the blob of a digest."""
        self._blobs[digest] = blob

    def forget(self, target: Target) -> None:
        """Remove a blob."""
        del self._blobs[_key(target)]

    def fault(self, target: Target, fault: Fault, *, times: int | None = None) -> None:
        """Apply a fault to the next `times` requests for a target, or to all."""
        with self._lock:
            self._faults.append(_Active(_key(target), fault, times))

    def calm(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._faults.clear()

    def requests_for(self, target: Target) -> list[Request]:
        """The requests for a blob, a manifest or a tag."""
        return [request for request in self.requests if _is_for(request.path, _key(target))]

    def await_request(self, target: Target, count: int = 1) -> None:
        """Wait for a number of requests for a target.

        Raises:
            TimeoutError: they did not arrive within `PATIENCE`.
        """
        with self._came:
            if not self._came.wait_for(lambda: len(self.requests_for(target)) >= count, PATIENCE):
                raise TimeoutError

    def bytes_sent(self, target: Target) -> int:
        """The number of body bytes sent for a target, over all requests."""
        return sum(request.sent_bytes for request in self.requests_for(target))

    def revoke_tokens(self) -> None:
        """Make all issued tokens invalid."""
        with self._lock:
            self._tokens.clear()

    # -- answers --------------------------------------------------------------------------------------------

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        """The response without a fault."""
        parts = urlsplit(path)
        if parts.path == "/token":
            return self._token(parse_qs(parts.query), headers)
        if not self._admits(headers.get("authorization", "")):
            return self._challenge(parts.path)
        pieces = parts.path.strip("/").split("/")
        if pieces == ["v2"]:
            return Answer(200, b"{}")
        if len(pieces) < 4 or pieces[0] != "v2":
            return _error(404, "NAME_UNKNOWN")
        repository, kind, name = "/".join(pieces[1:-2]), pieces[-2], pieces[-1]
        if kind == "manifests":
            return self._manifest(repository, name)
        return self._blob(name, headers)

    def take_fault(self, path: str) -> Fault | None:
        """The next fault for a path."""
        with self._lock:
            for active in self._faults:
                if active.times != 0 and _is_for(path, active.key):
                    if active.times is not None:
                        active.times -= 1
                    return active.fault
        return None

    def record(self, request: Request) -> None:
        """Record a request."""
        with self._came:
            self.requests.append(request)
            self._came.notify_all()

    def _manifest(self, repository: str, name: str) -> Answer:
        found = self._manifests.get((repository, name))
        if found is None:
            return _error(404, "MANIFEST_UNKNOWN")
        media_type, content = found
        headers = {"Content-Type": media_type}
        if self.sends_content_digests:
            headers["Docker-Content-Digest"] = sha256(content)
        return Answer(200, content, headers, content)

    def _blob(self, digest: str, headers: Mapping[str, str]) -> Answer:
        blob = self._blobs.get(digest)
        if blob is None:
            return _error(404, "BLOB_UNKNOWN")
        wanted = headers.get("range", "")
        if not wanted.startswith("bytes="):
            return Answer(200, blob, {"Accept-Ranges": "bytes"}, blob)
        start = int(wanted.removeprefix("bytes=").partition("-")[0])
        return partial(blob, start)

    # -- who may ask ----------------------------------------------------------------------------------------

    def _admits(self, authorization: str) -> bool:
        match self.authentication:
            case None:
                return True
            case Basic(user, password):
                return authorization == _basic(user, password)
            case Bearer():
                token = authorization.removeprefix("Bearer ")
                with self._lock:
                    left = self._tokens.get(token)
                    if left is None:
                        return False
                    if left == 1:
                        del self._tokens[token]
                    elif left:
                        self._tokens[token] = left - 1
                    return True

    def _challenge(self, path: str) -> Answer:
        if self.challenge:
            challenge = self.challenge
        elif isinstance(self.authentication, Bearer):
            realm = self.authentication.realm or f"{self.url}/token"
            repository = path.removeprefix("/v2/").rpartition("/")[0].rpartition("/")[0]
            challenge = f'Bearer realm="{realm}",service="simulator",scope="repository:{repository}:pull"'
        else:
            challenge = 'Basic realm="simulator"'
        answer = _error(401, "UNAUTHORIZED")
        answer.headers["WWW-Authenticate"] = challenge
        return answer

    def _token(self, query: Mapping[str, list[str]], headers: Mapping[str, str]) -> Answer:
        self.realm_requests.append({name: values[0] for name, values in query.items()})
        bearer = self.authentication if isinstance(self.authentication, Bearer) else Bearer()
        if bearer.user and headers.get("authorization", "") != _basic(bearer.user, bearer.password):
            return _error(401, "UNAUTHORIZED")
        return Answer(200, json.dumps({bearer.key: self.give_token(bearer.uses), "expires_in": 300}).encode())

    def give_token(self, uses: int = 0) -> str:
        """Issue a token that the registry accepts."""
        token = secrets.token_hex(8)
        with self._lock:
            self._tokens[token] = uses
        return token


def partial(blob: bytes, start: int) -> Answer:
    """The response with a blob from an offset on."""
    if start >= len(blob):
        return _error(416, "RANGE_INVALID")
    content_range = f"bytes {start}-{len(blob) - 1}/{len(blob)}"
    return Answer(206, blob[start:], {"Content-Range": content_range}, blob)


@dataclass
class _Active:
    key: str
    fault: Fault
    times: int | None


def _key(target: Target) -> str:
    return target if isinstance(target, str) else target.digest


def _is_for(path: str, key: str) -> bool:
    return urlsplit(path).path.rstrip("/").endswith(f"/{key}")


def _basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def _error(status: int, code: str) -> Answer:
    body = json.dumps({"errors": [{"code": code, "message": "simulated"}]}).encode()
    return Answer(status, body, {"Content-Type": "application/json"})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect or do not speak HTTP."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    registry: RegistrySimulator

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.path, headers, self.client_address[1])
        self.registry.record(request)
        exchange = Exchange(self.registry, self, request, self.registry.answer(self.path, headers))
        # send a challenge unchanged: faults apply to the requested content
        fault = (
            None if exchange.answer.status == HTTPStatus.UNAUTHORIZED else self.registry.take_fault(self.path)
        )
        try:
            if fault is None:
                exchange.send()
            else:
                fault.send(exchange)
        except OSError:  # the client has disconnected
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
        """Log nothing."""
