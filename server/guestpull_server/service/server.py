"""The server's life: take the work directory over, listen, serve, and end within a grace time.

The order of the start matters. The layer workers' fork server comes first (`Puller.open`), because a process that
runs gRPC must not fork. The addresses come last: whoever can connect finds everything ready.

gRPC runs in an event loop (grpc.aio), so that streams and calls which wait for their clients cost no thread.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from guestpull_protos import image_service_pb2 as pb
from guestpull_protos import image_service_pb2_grpc as pb_grpc
from guestpull_server.config import Configuration, Limits
from guestpull_server.errors import AddressInUse, InsecureAddress, InvalidRequest
from guestpull_server.puller import Puller
from guestpull_server.service.addresses import Address, TcpAddress, UnixAddress
from guestpull_server.service.calls import Calls
from guestpull_server.service.health import Health
from guestpull_server.service.log import LIFE, log_fields
from guestpull_server.service.notify import notify
from guestpull_server.service.servicer import ImageServicer
from guestpull_server.service.sockets import SocketFile
from guestpull_server.snapshot import check_may_mount
from guestpull_server.upkeep import in_background

SERVICE: Final = pb.DESCRIPTOR.services_by_name["ImageService"].full_name
STORE_HEALTH: Final = "guestpull.store"
"""The health service's name for the work directory: NOT_SERVING where it was found damaged."""

FORCED: Final = 1
"""The exit status where something did not end in time."""

_ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_UNDO_SECONDS: Final = 5.0  # for cancelled calls to undo what they did
_LAST_ANSWER_SECONDS: Final = 2.0  # for an answer that was given to find its way to its caller
_LAST_RESORT_SECONDS: Final = 2.0  # more, until the process ends even if the event loop is stuck


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for TCP: the server's chain and key, and the authorities of client certificates."""

    certificate: str
    key: str
    client_authorities: str


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """How to serve.

    Attributes:
        addresses: where to listen.
        grace_seconds: what calls get to finish once the daemon is told to end.
        tls: for TCP.
        insecure_tcp: whether loopback TCP is served without TLS, to every user of the machine.
    """

    addresses: Sequence[Address]
    grace_seconds: float = 10.0
    tls: TlsFiles | None = None
    insecure_tcp: bool = False


def serve(configuration: Configuration, options: ServiceOptions, warnings: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT; returns when everything has ended.

    Where something does not end in time, the process ends here, with the exit status `FORCED`. What is on disk
    is as after a crash: the next start takes care of it.

    Args:
        configuration: of the core.
        options: of the service.
        warnings: what is to be told first.

    Raises:
        MayNotMount: this process may not mount.
        AddressInUse: an address cannot be listened at.
        InsecureAddress: anybody could call at an address.
        NoSuchGroup: there is no `socket_group`.
        InvalidRequest: a TLS file cannot be used.
        GuestpullError: what `Puller.open` raises.
    """
    # a terminal that is closed is no reason to end, and least of all without cleaning up
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # until the event loop can act upon them
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    check_may_mount()
    started = time.monotonic()
    with Puller.open(configuration, background=in_background(configuration)) as puller:
        for warning in (*warnings, *puller.store.warnings):
            LIFE.warning("%s", warning)
        asyncio.run(_serve(puller, configuration, options, started))
    faulthandler.cancel_dump_traceback_later()


async def _serve(
    puller: Puller, configuration: Configuration, options: ServiceOptions, started: float
) -> None:
    told_to_end = asyncio.Event()
    for number in _ENDING:
        asyncio.get_running_loop().add_signal_handler(number, told_to_end.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    calls = Calls(configuration.limits)
    status = Health({"": True, SERVICE: True, STORE_HEALTH: not puller.store.damaged})
    server = _server(configuration.limits)
    pb_grpc.add_ImageServiceServicer_to_server(ImageServicer(puller, calls), server)
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    with ExitStack() as stack:
        told: list[str] = []
        sockets: list[SocketFile] = []
        for address in options.addresses:
            match address:
                case TcpAddress():
                    told.append(_listen_at_tcp(server, address, options))
                case UnixAddress(path):
                    sockets.append(_bind(server, stack, path, configuration.socket_group))
                    told.append(str(address))
        await server.start()
        for socket in sockets:
            socket.publish()
        seconds = round(time.monotonic() - started, 3)
        where = log_fields(addresses=", ".join(told), work_dir=configuration.work_dir, seconds=seconds)
        LIFE.info("ready", extra=where)
        notify("READY=1")
        await told_to_end.wait()
        await _end(server, status, sockets, calls, options.grace_seconds)


def _server(limits: Limits) -> grpc.aio.Server:
    return grpc.aio.server(
        options=(
            ("grpc.so_reuseport", 0),  # else a second daemon could listen at the same port
            ("grpc.max_receive_message_length", limits.max_request_bytes),
            ("grpc.max_concurrent_streams", limits.max_streams_per_connection),
            ("grpc.max_allowed_incoming_connections", limits.max_connections),
        )
    )


def _bind(server: grpc.aio.Server, stack: ExitStack, path: str, group: str) -> SocketFile:
    socket = SocketFile(path, group)
    stack.callback(socket.close)
    try:
        server.add_insecure_port(socket.target)
    except RuntimeError as error:
        raise AddressInUse(f"unix://{path}", str(error)) from None
    return socket


def _listen_at_tcp(server: grpc.aio.Server, address: TcpAddress, options: ServiceOptions) -> str:
    """Listen at a TCP address; returns it with its real port."""
    where, tls = str(address), options.tls
    if tls is None and not (address.is_loopback and options.insecure_tcp):
        raise InsecureAddress(where, loopback=address.is_loopback)
    credentials = _tls_credentials(tls) if tls is not None else None
    try:
        if credentials is None:
            port = server.add_insecure_port(where)
        else:
            port = server.add_secure_port(where, credentials)
    except RuntimeError as error:
        raise AddressInUse(where, f"it is taken, or not this machine's ({error})") from None
    if credentials is None:
        LIFE.warning(
            "--insecure-tcp: every user and every container with this machine's network can call at %s:%d, and "
            "whoever may call is root on this machine",
            address.host,
            port,
        )
    return f"{address.host}:{port}"


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


async def _end(
    server: grpc.aio.Server, status: Health, sockets: Sequence[SocketFile], calls: Calls, grace_seconds: float
) -> None:
    """Take no more calls, let those under way finish, and cancel them when the grace time is over."""
    notify("STOPPING=1")
    # runs without Python's help, for whatever may still keep this process: the event loop, or closing the store
    last_resort = grace_seconds + _UNDO_SECONDS + _LAST_ANSWER_SECONDS + _LAST_RESORT_SECONDS
    faulthandler.dump_traceback_later(last_resort, exit=True)
    pulls = calls.pulls
    LIFE.info("ending", extra=log_fields(pulls_under_way=pulls, grace_seconds=grace_seconds))
    for socket in sockets:
        socket.remove()
    status.end()
    stopping = asyncio.create_task(server.stop(grace_seconds))
    await calls.idle(grace_seconds)
    cancelled = calls.pulls
    calls.cancel()
    stuck = await calls.idle(_UNDO_SECONDS)
    if stuck:
        for call in stuck:
            seconds = round(time.monotonic() - call.begun, 3)
            told = log_fields(request=call.id, rpc=call.rpc, **call.asked, seconds=seconds)
            LIFE.error("a call does not end, and is abandoned", extra=told)
        LIFE.error("ended by force", extra=log_fields(calls_abandoned=len(stuck)))
        os._exit(FORCED)
    # streams that only wait for their client are not waited for
    await server.stop(min(grace_seconds, _LAST_ANSWER_SECONDS))
    await stopping
    LIFE.info("ended", extra=log_fields(pulls_finished=pulls - cancelled, pulls_cancelled=cancelled))
