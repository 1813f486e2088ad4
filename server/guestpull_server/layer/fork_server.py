"""The small process that forks a layer worker for each layer.

A process that runs gRPC must not fork: its threads' locks would be copied as they are. So the daemon starts
this one beside itself, by exec, before anything else; it has one thread, has loaded all that a worker needs,
and does nothing but fork. It ends when the daemon's end of its socket closes, and its workers die with it.

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

_MOST_DESCRIPTORS: Final = 5  # the socket for the report, three of the ring, the file for the record


def serve(requests: socket.socket) -> None:
    """Fork a worker for each request, until the socket closes.

    Returns in the workers, too, when they are done.
    """
    # the kernel reaps the workers; the daemon knows by their pidfd and by their report how they ended
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the daemon's to act upon
    server = os.getpid()
    gc.collect()
    gc.freeze()  # a worker that collects garbage would copy these pages
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, _MOST_DESCRIPTORS)
        if not message:
            return
        if not descriptors:  # too many are open; the daemon sees its socket closed
            continue
        report_descriptor, *others = descriptors
        report_socket = socket.socket(fileno=report_descriptor)
        try:
            child = os.fork()
        except OSError as error:
            refused = Refused("start a layer worker", error.strerror or str(error), full=False)
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
            memory, announced, give_back, *record = descriptors
            ring = RingReader(memory, announced, give_back)
            worker.run(request, ring, report_socket, record[0] if record else None, server)
        case VerifyRequest():
            verifier.run(request, report_socket, server)


def main() -> None:
    """Serve on the socket whose number is the argument, and end without any clean-up of Python's."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the daemon waits for it, and blocks it
    with suppress(ConnectionError):
        serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)


if __name__ == "__main__":
    main()
