"""The server's life: take the work directory over, listen, serve, and end within a grace time.

The order of the start matters. The layer workers' fork server comes first (`Puller.open`), because a process
that runs gRPC must not fork. The addresses come last: whoever can connect finds all of it ready.
"""

from __future__ import annotations

import signal
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from guestpull_protos import image_service_pb2 as pb
from guestpull_protos import image_service_pb2_grpc as pb_grpc
from guestpull_server.config import Configuration
from guestpull_server.errors import AddressInUse, CallerNotAllowed, InvalidRequest
from guestpull_server.puller import Puller
from guestpull_server.service.addresses import Address, TcpAddress, UnixAddress
from guestpull_server.service.gate import Gate
from guestpull_server.service.log import LIFE, facts
from guestpull_server.service.pool import AnsweringThreads
from guestpull_server.service.servicer import ImageServicer
from guestpull_server.service.sockets import HiddenSocket
from guestpull_server.service.status import status_of

SERVICE: Final = pb.DESCRIPTOR.services_by_name["ImageService"].full_name
STORE_HEALTH: Final = "guestpull.store"
"""The health service's name for the work directory: NOT_SERVING where it was found damaged."""

_ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_LAST_ANSWER_SECONDS: Final = 2.0  # for an answer that was given to find its way to its caller
_THREADS_FOR_OTHERS: Final = 32  # beside those that pulls may occupy: lists, health, removals
_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # else a second daemon could listen at the same port
    ("grpc.max_receive_message_length", 1024 * 1024),
)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for TCP: the server's chain and key, and the authorities of client certificates."""

    certificate: str
    key: str
    client_authorities: str


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """How to serve. `grace_seconds` is what calls get to finish once the daemon is told to end."""

    addresses: Sequence[Address]
    grace_seconds: float = 10.0
    tls: TlsFiles | None = None


def serve(configuration: Configuration, options: ServiceOptions, warnings: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT; returns when everything has ended.

    Args:
        configuration: of the core.
        options: of the service.
        warnings: what is to be told first.

    Raises:
        AddressInUse: an address cannot be listened at.
        InvalidRequest: a TLS file cannot be used.
        GuestpullError: what `Puller.open` raises.
    """
    # blocked in all threads, and waited for: a handler would run when this thread next gets to it, which is never
    # where the kernel gives the signal to another thread while this one sleeps
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    started = time.monotonic()
    with Puller.open(configuration, watch_bundles=True) as puller, ExitStack() as stack:
        for warning in (*warnings, *puller.store.warnings):
            LIFE.warning("%s", warning)
        status = _health(puller)
        server = _server(puller, configuration, status)
        listening = _listen(stack, server, configuration, options, puller.store.scratch)
        seconds = round(time.monotonic() - started, 3)
        told = facts(addresses=", ".join(listening.told), work_dir=configuration.work_dir, seconds=seconds)
        LIFE.info("ready", extra=told)
        signal.sigwait(_ENDING)
        _end(server, status, listening, puller, options.grace_seconds)


@dataclass(frozen=True, slots=True)
class _Listening:
    told: Sequence[str]
    gates: Sequence[Gate]


def _server(puller: Puller, configuration: Configuration, status: health.HealthServicer) -> grpc.Server:
    threads = configuration.limits.max_queued_pulls + _THREADS_FOR_OTHERS
    server = grpc.server(AnsweringThreads(threads, "rpc"), options=_OPTIONS)
    pb_grpc.add_ImageServiceServicer_to_server(ImageServicer(puller), server)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server


def _health(puller: Puller) -> health.HealthServicer:
    status = health.HealthServicer()
    serving = health_pb2.HealthCheckResponse.SERVING
    damaged = health_pb2.HealthCheckResponse.NOT_SERVING
    for name in ("", SERVICE):
        status.set(name, serving)
    status.set(STORE_HEALTH, damaged if puller.store.damaged else serving)
    return status


def _listen(
    stack: ExitStack,
    server: grpc.Server,
    configuration: Configuration,
    options: ServiceOptions,
    scratch: str,
) -> _Listening:
    """Start the server at all addresses, and say what they are in full."""
    told = [
        f"{address.host}:{_listen_at_tcp(server, address, options.tls)}"
        for address in options.addresses
        if isinstance(address, TcpAddress)
    ]
    sockets = [address for address in options.addresses if isinstance(address, UnixAddress)]
    gates: list[Gate] = []
    if sockets:
        service = HiddenSocket(server.add_insecure_port, scratch)
        refusal = stack.enter_context(_refusal_server(scratch))
        server.start()
        for socket in sockets:
            gate = Gate(socket.path, frozenset(configuration.allowed_uids), service, refusal)
            stack.callback(gate.close)
            gates.append(gate)
            told.append(str(socket))
    else:
        server.start()
    return _Listening(told, gates)


def _listen_at_tcp(server: grpc.Server, address: TcpAddress, tls: TlsFiles | None) -> int:
    where = str(address)
    if tls is None and not address.is_loopback:
        raise AddressInUse(
            where, "beyond this machine only TLS with client certificates is served (--tls-certificate...)"
        )
    credentials = _tls_credentials(tls) if tls is not None else None
    try:
        if credentials is None:
            return server.add_insecure_port(where)
        return server.add_secure_port(where, credentials)
    except RuntimeError as error:
        raise AddressInUse(where, f"it is taken, or not this machine's ({error})") from None


def _tls_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    # of a file that is wrong, gRPC says no more than that it cannot listen
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with _pem_errors("--tls-certificate, --tls-key"):
        context.load_cert_chain(tls.certificate, tls.key, password="")
    with _pem_errors("--tls-client-authorities"):
        context.load_verify_locations(tls.client_authorities)
    contents: list[bytes] = []
    for path in (tls.key, tls.certificate, tls.client_authorities):
        with open(path, "rb") as file:
            contents.append(file.read())
    key, certificate, authorities = contents
    return grpc.ssl_server_credentials([(key, certificate)], authorities, require_client_auth=True)


@contextmanager
def _pem_errors(options: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of ssl's, too
        remedy = (
            "Name PEM files: a chain, the key of its first certificate, without a password, and authorities."
        )
        raise InvalidRequest(options, error.strerror or str(error), remedy) from None


@contextmanager
def _refusal_server(scratch: str) -> Iterator[HiddenSocket]:
    """A server that answers PERMISSION_DENIED to whatever is called."""
    server = grpc.server(AnsweringThreads(1, "refusal"), handlers=[_Refusal()])
    socket = HiddenSocket(server.add_insecure_port, scratch)
    server.start()
    try:
        yield socket
    finally:
        server.stop(None)
        socket.close()


if TYPE_CHECKING:
    _AnyCall = grpc.GenericRpcHandler[bytes, bytes]
else:
    _AnyCall = grpc.GenericRpcHandler  # generic in its stubs only


class _Refusal(_AnyCall):
    def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(self._refuse)

    @staticmethod
    def _refuse(_request: bytes, context: grpc.ServicerContext) -> NoReturn:
        context.abort_with_status(status_of(CallerNotAllowed(), "-"))
        raise AssertionError("abort_with_status always raises")


def _end(
    server: grpc.Server,
    status: health.HealthServicer,
    listening: _Listening,
    puller: Puller,
    grace_seconds: float,
) -> None:
    """Take no more calls, let those under way finish, and cancel them when the grace time is over."""
    status.enter_graceful_shutdown()
    pulls = puller.admission.pulls
    LIFE.info("ending", extra=facts(pulls_under_way=pulls, grace_seconds=grace_seconds))
    for gate in listening.gates:
        gate.close()
    stopped = server.stop(grace_seconds)
    stopped.wait(grace_seconds)
    cancelled = puller.admission.pulls
    stopped.wait()
    puller.admission.wait_until_idle()
    for gate in listening.gates:
        gate.hang_up(_LAST_ANSWER_SECONDS)
    LIFE.info("ended", extra=facts(pulls_finished=pulls - cancelled, pulls_cancelled=cancelled))
