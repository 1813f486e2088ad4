"""TLS or plain HTTP, certificates, redirects, proxies, retries, and the end of all waiting."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Self

import msgspec
import pytest

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import ProxyConfig, RegistryConfig
from guestpull_server.errors import (
    Cancelled,
    DeadlineExceeded,
    ImageNotFound,
    InvalidConfiguration,
    RateLimited,
    RegistryUnavailable,
)
from guestpull_server.registry import RegistryClient
from support.faults import (
    EndlessChunkHeader,
    EndlessTrailers,
    Headers,
    Pause,
    RedirectLoop,
    RedirectTo,
    Stall,
    Status,
)
from support.images import files, image, layer
from support.pulling import IMPATIENT, PATIENT, ClientOf, Pull
from support.simulator import Fault, RegistrySimulator, certificate_authority
from support.waiting import PATIENCE, end_of, until

LAYER = layer(*files("srv", count=10, size=20_000))
SHOP = image(LAYER)


@pytest.fixture
def secure() -> Iterator[RegistrySimulator]:
    with RegistrySimulator(tls=True) as simulator:
        simulator.push("shop:1.0", SHOP)
        yield simulator


@pytest.fixture
def certificate() -> str:
    return certificate_authority().cert_pem.bytes().decode()


def insecure(host: str) -> RegistryConfig:
    return msgspec.convert({"registry": [{"location": host, "insecure": True}]}, type=RegistryConfig)


class Listener:
    """Takes connections at a port of 127.0.0.1, each served by a thread of its own; a context manager."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        raise NotImplementedError


class Relay(Listener):
    """Hands connections on to another address.

    Args:
        target: where to.
        connects: it is a proxy, and the target is whatever CONNECT names.
    """

    def __init__(self, target: str, *, connects: bool = False) -> None:
        super().__init__()
        self.heads: list[str] = []
        self._target = target
        self._connects = connects

    def _serve(self, caller: socket.socket) -> None:
        if self._connects:
            head = b""
            while b"\r\n\r\n" not in head:
                head += caller.recv(1)
            self.heads.append(head.decode())
            caller.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        address, _, port = self._target.partition(":")
        callee = socket.create_connection((address, int(port)))
        for source, sink in ((caller, callee), (callee, caller)):
            threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError), source:
        while received := source.recv(65536):
            sink.sendall(received)
        sink.shutdown(socket.SHUT_WR)


# -- http or https -----------------------------------------------------------------------------------------


def test_a_certificate_that_a_known_authority_signed_is_trusted(
    secure: RegistrySimulator, client_of: ClientOf, certificate: str
) -> None:
    pull = Pull(client_of(extra_root_certificates=[certificate]))
    assert pull.resolve(f"{secure.host}/shop:1.0").image_id == SHOP.image_id
    assert pull.blob(f"{secure.host}/shop:1.0", LAYER) == LAYER.blob


def test_a_bundle_of_certificates_may_name_their_owners(
    secure: RegistrySimulator, client_of: ClientOf, certificate: str
) -> None:
    pull = Pull(client_of(extra_root_certificates=[f"# AC Raíz\n{certificate}"]))
    assert pull.resolve(f"{secure.host}/shop:1.0").image_id == SHOP.image_id


def test_a_certificate_that_nobody_known_signed_is_not(secure: RegistrySimulator, pull: Pull) -> None:
    with pytest.raises(RegistryUnavailable, match="certificate verify failed"):
        pull.resolve(f"{secure.host}/shop:1.0")


def test_a_certificate_that_is_refused_is_looked_at_once(secure: RegistrySimulator, pull: Pull) -> None:
    with pytest.raises(RegistryUnavailable, match="extra_root_certificates") as raised:
        pull.resolve(f"{secure.host}/shop:1.0")
    assert raised.value.attempts == 1


def test_a_certificate_for_another_host_is_not(client_of: ClientOf, certificate: str) -> None:
    with RegistrySimulator(tls=True, address="127.0.0.3") as other, Relay(other.host) as relay:
        other.push("shop:1.0", SHOP)
        with pytest.raises(RegistryUnavailable, match="certificate verify failed"):
            Pull(client_of(extra_root_certificates=[certificate])).resolve(f"{relay.host}/shop:1.0")


def test_an_insecure_registry_needs_no_certificate(secure: RegistrySimulator, client_of: ClientOf) -> None:
    pull = Pull(client_of(registry_config=insecure(secure.host)))
    assert pull.resolve(f"{secure.host}/shop:1.0").image_id == SHOP.image_id


def test_insecure_is_not_said_of_where_it_redirects_to(
    secure: RegistrySimulator, registry: RegistrySimulator, client_of: ClientOf
) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault(LAYER, RedirectTo(secure.url))
    with pytest.raises(RegistryUnavailable, match="certificate verify failed"):
        Pull(client_of(registry_config=insecure(registry.host))).blob(reference, LAYER)


def test_what_a_registry_speaks_is_asked_once(registry: RegistrySimulator, pull: Pull) -> None:
    for name in ("one", "two"):
        pull.resolve(registry.push(name, SHOP))
    assert len(registry.requests_for("v2")) == 1


def test_a_tls_registry_that_scolds_plain_http_is_spoken_to_by_tls(
    registry: RegistrySimulator, secure: RegistrySimulator, client_of: ClientOf, certificate: str
) -> None:
    # what nginx and Go's servers say at a TLS port; the TLS greeting that follows is no HTTP
    registry.fault("v2", Status(400))
    with pytest.raises(RegistryUnavailable, match="TLS"):
        Pull(client_of()).resolve(registry.push("shop:1.0", SHOP))


def test_a_registry_that_was_down_is_asked_again_what_it_speaks(
    registry: RegistrySimulator, client_of: ClientOf
) -> None:
    reference = registry.push("shop:1.0", SHOP)
    client = client_of()
    port = registry.host.partition(":")[2]
    elsewhere = reference.replace("127.0.0.1", "127.0.0.4")
    with pytest.raises(RegistryUnavailable):
        Pull(client).resolve(elsewhere)
    with RegistrySimulator(address="127.0.0.4", port=int(port), tls=True) as late:
        late.push("shop:1.0", SHOP)
        with pytest.raises(RegistryUnavailable, match="certificate"):
            Pull(client).resolve(elsewhere)


@pytest.mark.parametrize("tls", [True, False])
def test_a_registry_that_came_back_with_tls_or_without_is_asked_again_what_it_speaks(
    client_of: ClientOf, certificate: str, tls: bool
) -> None:
    client = client_of(extra_root_certificates=[certificate])
    with RegistrySimulator(tls=not tls) as before:
        reference = before.push("shop:1.0", SHOP)
        before.fault(SHOP.image_id, Headers((("Connection", "close"),)))
        Pull(client).resolve(reference)
    with RegistrySimulator(tls=tls, port=int(before.host.partition(":")[2])) as after:
        after.push("shop:1.0", SHOP)
        assert Pull(client).resolve(reference).image_id == SHOP.image_id


def test_a_certificate_of_the_configuration_that_is_none_is_named(client_of: ClientOf) -> None:
    with pytest.raises(InvalidConfiguration, match=r"extra_root_certificates\[0\]"):
        client_of(extra_root_certificates=["not a certificate"])


# -- redirects ---------------------------------------------------------------------------------------------


def test_an_endless_redirect_is_left(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", RedirectLoop())
    with pytest.raises(RegistryUnavailable, match="more than 5 redirects"):
        pull.resolve(reference)
    assert len(registry.requests_for("manifests/1.0")) == 1 + PATIENT.max_redirects


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_all_kinds_of_redirects_are_followed(registry: RegistrySimulator, pull: Pull, code: int) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.push("moved:1.0", SHOP)
    registry.fault("v2/shop/manifests/1.0", RedirectTo("/v2/moved/manifests/1.0", code=code))
    assert pull.resolve(reference).image_id == SHOP.image_id


@pytest.mark.parametrize(
    "location",
    ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://[::/x", "http://a:b@127.0.0.1/x", "http://host:0/x"],
)
def test_a_redirect_to_what_is_no_address_is_refused(
    registry: RegistrySimulator, pull: Pull, location: str
) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", RedirectTo(f"{location}?signature=hunter2"))
    with pytest.raises(RegistryUnavailable) as raised:
        pull.resolve(reference)
    assert "unusable URL" in raised.value.problem
    assert "hunter2" not in str(raised.value)


def test_a_password_in_a_redirect_is_not_repeated(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", RedirectTo("http://alice:hunter2@127.0.0.1/x"))
    with pytest.raises(RegistryUnavailable, match="unusable URL") as raised:
        pull.resolve(reference)
    assert "hunter2" not in str(raised.value)


def test_of_a_redirect_that_leads_nowhere_the_host_is_named(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", RedirectTo("http://127.0.0.1:1"))
    with pytest.raises(RegistryUnavailable, match=r"redirect to 127\.0\.0\.1:1: connection refused"):
        pull.resolve(reference)


@pytest.mark.parametrize("path", ["/v2/a b", "/v2/%zz", "/v2/\xe9", "/v2/\x7f", "/v2/\t\x01"])
def test_a_redirect_to_a_strange_path_is_followed(registry: RegistrySimulator, pull: Pull, path: str) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", RedirectTo(path))
    with pytest.raises(ImageNotFound):
        pull.resolve(reference)


def test_a_redirect_from_tls_to_plain_http_is_refused(
    secure: RegistrySimulator, client_of: ClientOf, certificate: str
) -> None:
    secure.fault("manifests/1.0", RedirectTo("http://plain.example/v2/shop/manifests/1.0"))
    with pytest.raises(RegistryUnavailable, match="from HTTPS to plain HTTP"):
        Pull(client_of(extra_root_certificates=[certificate])).resolve(f"{secure.host}/shop:1.0")


# -- retries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "retry_after",
    [
        "0",
        "1",
        formatdate(time.time() - 100, usegmt=True),
        "soon",
        "-1",
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT",
        "Mon, 99999999999999999999 Jan 2026 00:00:00 GMT",
        "Wed, 21 Oct 0001 00:00:00 +2359",
        "Wed, 21 Oct 2015 07:28:00 +9999999999",
    ],
)
def test_retry_after_is_waited_for_as_far_as_allowed(
    registry: RegistrySimulator, pull: Pull, retry_after: str
) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Status(503, retry_after), times=1)
    assert pull.resolve(reference).image_id == SHOP.image_id


class Recorded(Cancellation):
    """A cancellation that remembers how long was waited."""

    def __init__(self) -> None:
        super().__init__("pull")
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        super().sleep(seconds)


@pytest.mark.parametrize("retry_after", ["0", formatdate(time.time() - 100, usegmt=True)])
def test_a_retry_after_that_is_over_makes_no_attempt_come_sooner(
    registry: RegistrySimulator, client: RegistryClient, retry_after: str
) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Status(429, retry_after))
    cancellation = Recorded()
    with pytest.raises(RateLimited, match="Pull again later"):
        Pull(client, cancellation).resolve(reference)
    assert all(cancellation.slept)


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(
    registry: RegistrySimulator, client_of: ClientOf
) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Status(429, retry_after="50"))
    soon = Cancellation("pull", time.monotonic() + 45)
    client = client_of(limits=msgspec.structs.replace(PATIENT, max_retry_delay=60))
    with pytest.raises(RateLimited, match="50 seconds"):
        Pull(client, soon).resolve(reference)
    assert soon.remaining() != 0


@pytest.mark.parametrize(
    "fault", [EndlessTrailers(seconds=0.02), EndlessChunkHeader(after=0.5, seconds=0.02)]
)
def test_a_manifest_whose_framing_never_ends_is_asked_for_again_and_given_up(
    registry: RegistrySimulator, impatient_pull: Pull, fault: Fault
) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", fault)
    with pytest.raises(RegistryUnavailable, match="read timed out; 4 attempts"):
        impatient_pull.resolve(reference)
    assert len(registry.requests_for("manifests/1.0")) == 4


# -- nothing waits for ever --------------------------------------------------------------------------------


@pytest.fixture
def deaf() -> Iterator[str]:
    """A host to which no connection ever comes about: its queue is full, and nobody takes from it."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        address = listening.getsockname()
        waiting = [socket.socket() for _ in range(8)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        yield f"127.0.0.1:{address[1]}"
        for one in waiting:
            one.close()


def test_a_host_that_takes_no_connection_is_given_up(deaf: str, client_of: ClientOf) -> None:
    once = msgspec.structs.replace(PATIENT, connect_timeout=0.1, max_attempts=1)
    with pytest.raises(RegistryUnavailable, match="connection timed out"):
        Pull(client_of(limits=once)).resolve(f"{deaf}/shop:1.0")


class Trickle(Listener):
    """Sends a beginning and then single bytes, each soon enough, for ever."""

    def __init__(self, beginning: bytes) -> None:
        super().__init__()
        self._beginning = beginning

    def _serve(self, caller: socket.socket) -> None:
        with contextlib.suppress(OSError), caller:
            caller.sendall(self._beginning)
            while not select.select([caller], [], [], 0.01)[0] or caller.recv(65536):
                caller.sendall(b"y")


TLS_RECORD = b"\x16\x03\x03\x40\x00"  # of a handshake, 16 KiB long


def test_a_tls_handshake_that_trickles_is_given_up(
    impatient_pull: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_name = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda _host, port, **settings: resolve_name("127.0.0.1", port, **settings)
    )
    with Trickle(TLS_RECORD) as server, pytest.raises(RegistryUnavailable, match="timed out; 4 attempts"):
        impatient_pull.resolve(f"trickle.example:{server.host.partition(':')[2]}/shop:1.0")


@pytest.mark.parametrize(
    ("scheme", "beginning"),
    [("http", b"HTTP/1.1 200 Connected\r\nX-Slow: "), ("https", TLS_RECORD)],
)
def test_a_proxy_that_trickles_is_given_up(client_of: ClientOf, scheme: str, beginning: bytes) -> None:
    with Trickle(beginning) as proxy:
        proxied = ProxyConfig(https_proxy=f"{scheme}://{proxy.host}")
        client = client_of(limits=IMPATIENT, image_pull_proxy=proxied)
        with pytest.raises(RegistryUnavailable, match="timed out, via proxy"):
            Pull(client, Cancellation("pull", time.monotonic() + PATIENCE)).resolve("shop.example/shop:1.0")


def cancelled_while_it_resolves(
    client: RegistryClient, reference: str, it_waits: Callable[[], object]
) -> BaseException:
    """Resolve, cancel once `it_waits` has returned, and return what was raised."""
    raised: list[BaseException] = []
    cancellation = Cancellation("pull")

    def resolve() -> None:
        try:
            Pull(client, cancellation).resolve(reference)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            raised.append(error)

    thread = threading.Thread(target=resolve)
    thread.start()
    it_waits()
    cancellation.cancel()
    end_of(thread)
    return raised[0]


def connecting_to(host: str) -> int:
    """How many sockets of this machine wait for their connection to a `127.0.0.1:port`."""
    peer = f"0100007F:{int(host.partition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return sum(row[2:4] == [peer, "02"] for row in rows)  # TCP_SYN_SENT


def test_cancelling_ends_the_wait_for_a_connection(deaf: str, client: RegistryClient) -> None:
    before = connecting_to(deaf)

    def it_waits() -> None:
        until("the client connects", lambda: connecting_to(deaf) > before)

    assert isinstance(cancelled_while_it_resolves(client, f"{deaf}/shop:1.0", it_waits), Cancelled)


def test_cancelling_ends_the_wait_for_an_answer(registry: RegistrySimulator, client: RegistryClient) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Pause(PATIENCE))

    def it_waits() -> None:
        registry.await_request("manifests/1.0")

    assert isinstance(cancelled_while_it_resolves(client, reference, it_waits), Cancelled)


def test_cancelling_ends_the_wait_for_a_body(registry: RegistrySimulator, client: RegistryClient) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Stall(after=0.5))

    def it_waits() -> None:
        until("half of the body is sent", lambda: registry.bytes_sent("manifests/1.0"))

    assert isinstance(cancelled_while_it_resolves(client, reference, it_waits), Cancelled)


def test_cancelling_ends_the_wait_for_tls(client: RegistryClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        resolve_name = socket.getaddrinfo
        address, port = silent.getsockname()

        def here(_host: str, port: int, **settings: int) -> object:
            return resolve_name(address, port, **settings)

        monkeypatch.setattr(socket, "getaddrinfo", here)
        accepted: list[socket.socket] = []

        def it_waits() -> None:
            accepted.append(silent.accept()[0])
            assert accepted[0].recv(1) == b"\x16"  # the greeting of TLS

        raised = cancelled_while_it_resolves(client, f"silent.example:{port}/shop:1.0", it_waits)
        accepted[0].close()
    assert isinstance(raised, Cancelled)


def test_cancelling_ends_the_wait_for_a_name_server(
    client: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, never = threading.Event(), threading.Event()
    resolve_name = socket.getaddrinfo

    def slow(host: str, port: int, *, flags: int = 0, **settings: int) -> object:
        if not flags & socket.AI_NUMERICHOST:
            asked.set()
            never.wait(2 * PATIENCE)
        return resolve_name(host, port, flags=flags | socket.AI_NUMERICHOST, **settings)

    def it_waits() -> None:
        assert asked.wait(PATIENCE)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    raised = cancelled_while_it_resolves(client, "slow.example/shop:1.0", it_waits)
    never.set()
    assert isinstance(raised, Cancelled)


def test_a_name_that_no_name_server_can_be_asked_for_does_not_exist(pull: Pull) -> None:
    with pytest.raises(RegistryUnavailable, match="cannot be resolved"):
        pull.resolve(f"{'a' * 64}.example/shop:1.0")


def test_a_name_that_does_not_exist_is_said_to(client_of: ClientOf, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_args: object, **_settings: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(RegistryUnavailable, match="cannot be resolved"):
        Pull(client_of()).resolve("no-such-host.example/shop:1.0")


def test_a_deadline_ends_the_wait_for_a_connection(deaf: str, client_of: ClientOf) -> None:
    soon = Cancellation("pull", time.monotonic() + 0.2)
    with pytest.raises(DeadlineExceeded):
        Pull(client_of(), soon).resolve(f"{deaf}/shop:1.0")


def test_a_caller_that_has_left_costs_no_request(registry: RegistrySimulator, client_of: ClientOf) -> None:
    gone = Cancellation("pull")
    gone.cancel()
    with pytest.raises(Cancelled):
        Pull(client_of(), gone).resolve(registry.push("shop:1.0", SHOP))
    assert registry.requests == []


# -- proxies -----------------------------------------------------------------------------------------------


def test_a_plain_registry_is_reached_through_the_http_proxy(
    registry: RegistrySimulator, client_of: ClientOf
) -> None:
    registry.push("shop:1.0", SHOP)
    proxied = ProxyConfig(http_proxy=f"http://alice:wonder%40land@{registry.host}", https_proxy=None)
    client = client_of(image_pull_proxy=proxied, registry_config=insecure("shop.example:80"))

    assert Pull(client).resolve("shop.example:80/shop:1.0").image_id == SHOP.image_id
    asked = registry.requests_for("manifests/1.0")[0]
    assert asked.path.startswith("http://shop.example")
    assert asked.headers["proxy-authorization"] == "Basic YWxpY2U6d29uZGVyQGxhbmQ="


def test_a_tls_registry_is_reached_through_a_tunnel_of_the_https_proxy(
    secure: RegistrySimulator, client_of: ClientOf, certificate: str
) -> None:
    with Relay(secure.host, connects=True) as proxy:
        proxied = ProxyConfig(https_proxy=f"http://alice:secret@{proxy.host}")
        pull = Pull(client_of(image_pull_proxy=proxied, extra_root_certificates=[certificate]))
        assert pull.resolve("shop.example/shop:1.0").image_id == SHOP.image_id
        assert pull.blob("shop.example/shop:1.0", LAYER) == LAYER.blob
    assert proxy.heads[0].startswith("CONNECT shop.example:443 ")
    assert "Basic YWxpY2U6c2VjcmV0" in proxy.heads[0]


def test_a_proxy_that_is_gone_is_named(client_of: ClientOf, certificate: str) -> None:
    with Relay("127.0.0.1:1") as gone:
        proxied = ProxyConfig(https_proxy=f"http://alice:secret@{gone.host}")
    with pytest.raises(RegistryUnavailable, match="proxy") as raised:
        Pull(client_of(image_pull_proxy=proxied)).resolve("shop.example/shop:1.0")
    assert "secret" not in str(raised.value)


def test_of_a_proxy_that_refuses_a_tunnel_its_answer_and_its_name_are_told(
    registry: RegistrySimulator, client_of: ClientOf
) -> None:
    proxied = ProxyConfig(https_proxy=f"http://alice:secret@{registry.host}")
    with pytest.raises(RegistryUnavailable) as raised:
        Pull(client_of(image_pull_proxy=proxied)).resolve("shop.example/shop:1.0")
    assert "failed: 501" in raised.value.problem
    assert raised.value.problem.endswith(f"via proxy {registry.host}")


def test_a_proxy_that_wants_credentials_is_not_taken_for_the_registry(
    registry: RegistrySimulator, client_of: ClientOf
) -> None:
    registry.fault("manifests/1.0", Status(407))
    proxied = ProxyConfig(http_proxy=registry.url)
    client = client_of(image_pull_proxy=proxied, registry_config=insecure("shop.example:80"))
    with pytest.raises(RegistryUnavailable, match="proxy requires credentials"):
        Pull(client).resolve("shop.example:80/shop:1.0")
