"""The process that forks a layer worker for each layer.

A process that runs gRPC must not fork, because its threads' locks would be copied in whatever state they are. So
the daemon starts this process by exec, before anything else. It has one thread, has loaded everything that a
worker needs, and only forks. It ends when the daemon's end of its socket closes, and its workers end with it.

    python -P -m guestpull_server.layer.fork_server <number of the inherited socket>
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Final

import msgspec

from guestpull_server.layer import verifier, worker
from guestpull_server.layer.ring import RingReader
from guestpull_server.layer.worker_protocol import (
    MAX_REQUEST_BYTES,
    Refused,
    Request,
    UnpackRequest,
    VerifyRequest,
)

_MOST_DESCRIPTORS: Final = 5  # the socket for the report, three of the ring, the file for the tar-split


def serve(requests: socket.socket) -> None:
    """Fork a worker for each request, until the socket closes. Also returns in each worker when it is done."""
    # the kernel reaps the workers; the daemon sees by their pidfd and their report how they ended
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon handles Ctrl-C
    server = os.getpid()
    gc.collect()
    gc.freeze()  # garbage collection in a worker would copy these pages
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, _MOST_DESCRIPTORS)
        if not message:
            return
        if not descriptors:  # too many files are open; the daemon sees its socket close
            continue
        report_descriptor, *others = descriptors
        report_socket = socket.socket(fileno=report_descriptor)
        try:
            child = os.fork()
        except OSError as error:
            refused = Refused("starting a layer worker", error.strerror or str(error), full=False)
            with suppress(OSError):
                report_socket.sendall(b"-" + msgspec.json.encode(refused) + b"\n")
        else:
            if child == 0:
                requests.close()
                pidfd = os.pidfd_open(os.getpid())
                socket.send_fds(report_socket, [b"p"], [pidfd])
                os.close(pidfd)
                _work(message, report_socket, others, server)
                return
        report_socket.close()
        for descriptor in others:
            os.close(descriptor)


def _work(message: bytes, report_socket: socket.socket, descriptors: list[int], server: int) -> None:
    request = msgspec.json.decode(message, type=Request)
    match request:
        case UnpackRequest():
            memory, announced, give_back, *tar_split = descriptors
            ring = RingReader(memory, announced, give_back)
            worker.run(request, ring, report_socket, tar_split[0] if tar_split else None, server)
        case VerifyRequest():
            verifier.run(request, report_socket, server)


def main() -> None:
    """Serve on the socket whose number is the argument, and exit without Python's clean-up."""
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, {signal.SIGTERM}
    )  # inherited: the daemon blocks it and waits for it
    with suppress(ConnectionError):
        serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)


if __name__ == "__main__":
    main()
