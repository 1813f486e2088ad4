"""Starts the service, serves until SIGTERM, and shuts down within a grace period.

The order of the start matters. `Puller.open` starts the layer workers' fork server first, because a process that
runs gRPC must not fork. The sockets are published last, so that clients connect only when everything is ready.

gRPC runs in an event loop (grpc.aio), so that streams and calls that wait for their clients do not occupy
threads.
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
"""The work directory's name in the health service. NOT_SERVING if it was found damaged."""

FORCED: Final = 1
"""The exit status if a call did not end in time."""

_STOP_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_UNDO_SECONDS: Final = 5.0  # for cancelled calls to undo their work
_LAST_ANSWER_SECONDS: Final = 2.0  # for the last responses to reach their callers
_LAST_RESORT_SECONDS: Final = 2.0  # after all of these, the process exits even if the event loop is stuck


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the server's certificate chain, its key, and the authorities that sign client certificates."""

    certificate: str
    key: str
    client_authorities: str


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """Options of `serve`.

    Attributes:
        addresses: where to listen.
        grace_seconds: how long calls may run after SIGTERM before they are cancelled.
        tls: TLS files for TCP addresses.
        insecure_tcp: whether to serve loopback TCP without TLS, to every user of the machine.
    """

    addresses: Sequence[Address]
    grace_seconds: float = 10.0
    tls: TlsFiles | None = None
    insecure_tcp: bool = False


def serve(configuration: Configuration, options: ServiceOptions, warnings: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT. Return after the shutdown.

    If a call does not end in time, exit the process with status `FORCED`. The state on disk is then that of a
    crash; the next start cleans it up.

    Args:
        configuration: configures the core.
        options: configures the service.
        warnings: logged first.

    Raises:
        MayNotMount: this process may not mount.
        AddressInUse: an address cannot be bound.
        InsecureAddress: the address needs TLS.
        NoSuchGroup: the group `socket_group` does not exist.
        InvalidRequest: a TLS file cannot be used.
        GuestpullError: what `Puller.open` raises.
    """
    # keep serving when the terminal closes: SIGHUP would end the process without cleanup
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # blocked until the event loop handles them
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
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
    stop = asyncio.Event()
    for number in _STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    calls = Calls(configuration.limits)
    health_service = Health({"": True, SERVICE: True, STORE_HEALTH: not puller.store.damaged})
    server = _server(configuration.limits)
    pb_grpc.add_ImageServiceServicer_to_server(ImageServicer(puller, calls), server)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    with ExitStack() as stack:
        addresses: list[str] = []
        sockets: list[SocketFile] = []
        for address in options.addresses:
            match address:
                case TcpAddress():
                    addresses.append(_listen_at_tcp(server, address, options))
                case UnixAddress(path):
                    sockets.append(_bind(server, stack, path, configuration.socket_group))
                    addresses.append(str(address))
        await server.start()
        for socket in sockets:
            socket.publish()
        seconds = round(time.monotonic() - started, 3)
        fields = log_fields(addresses=", ".join(addresses), work_dir=configuration.work_dir, seconds=seconds)
        LIFE.info("ready", extra=fields)
        notify("READY=1")
        await stop.wait()
        await _shut_down(server, health_service, sockets, calls, options.grace_seconds)


def _server(limits: Limits) -> grpc.aio.Server:
    return grpc.aio.server(
        options=(
            ("grpc.so_reuseport", 0),  # with it, a second daemon could listen at the same port
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
    """Listen at a TCP address. Return it with the actual port."""
    target, tls = str(address), options.tls
    if tls is None and not (address.is_loopback and options.insecure_tcp):
        raise InsecureAddress(target, loopback=address.is_loopback)
    credentials = _tls_credentials(tls) if tls is not None else None
    try:
        if credentials is None:
            port = server.add_insecure_port(target)
        else:
            port = server.add_secure_port(target, credentials)
    except RuntimeError as error:
        raise AddressInUse(
            target, f"the port is in use, or the host is not an address of this machine ({error})"
        ) from None
    if credentials is None:
        LIFE.warning(
            "--insecure-tcp: every user of this machine, and every container in its network namespace, can "
            "connect to %s:%d and become root",
            address.host,
            port,
        )
    return f"{address.host}:{port}"


def _tls_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    # check the files first: for a bad file, gRPC only reports that it cannot listen
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
    except OSError as error:  # ssl.SSLError is one
        remedy = "Give PEM files: a certificate chain, its unencrypted key, and the authorities of clients."
        raise InvalidRequest(options, error.strerror or str(error), remedy) from None


async def _shut_down(
    server: grpc.aio.Server,
    health_service: Health,
    sockets: Sequence[SocketFile],
    calls: Calls,
    grace_seconds: float,
) -> None:
    """Accept no more calls, wait for those in progress, and cancel them after the grace period."""
    notify("STOPPING=1")
    # exits from a C thread, even if the event loop or closing the store blocks
    last_resort = grace_seconds + _UNDO_SECONDS + _LAST_ANSWER_SECONDS + _LAST_RESORT_SECONDS
    faulthandler.dump_traceback_later(last_resort, exit=True)
    pulls = calls.pulls
    LIFE.info("ending", extra=log_fields(pulls_under_way=pulls, grace_seconds=grace_seconds))
    for socket in sockets:
        socket.remove()
    health_service.end()
    stopping = asyncio.create_task(server.stop(grace_seconds))
    await calls.idle(grace_seconds)
    cancelled = calls.pulls
    calls.cancel()
    stuck = await calls.idle(_UNDO_SECONDS)
    if stuck:
        for call in stuck:
            seconds = round(time.monotonic() - call.started, 3)
            fields = log_fields(request=call.id, rpc=call.rpc, **call.fields, seconds=seconds)
            LIFE.error("abandoned a call that does not end", extra=fields)
        LIFE.error("ended by force", extra=log_fields(calls_abandoned=len(stuck)))
        os._exit(FORCED)
    # do not wait longer for streams whose clients do not read
    await server.stop(min(grace_seconds, _LAST_ANSWER_SECONDS))
    await stopping
    LIFE.info("ended", extra=log_fields(pulls_finished=pulls - cancelled, pulls_cancelled=cancelled))
