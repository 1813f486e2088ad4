"""The small process that forks a layer worker for each layer.

A process that runs gRPC must not fork: its threads' locks would be copied as they are. So the daemon starts
this one beside itself, by exec, before anything else; it has one thread, has loaded all that a worker needs,
and does nothing but fork. It ends when the daemon's end of its socket closes, and its workers die with it.

    python -m guestpull_server.layer.fork_server <number of the inherited socket>
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from contextlib import suppress

import msgspec

from guestpull_server.layer import worker
from guestpull_server.layer.messages import MAX_REQUEST_BYTES, UnpackRequest


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
        message, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 2)
        if not message:
            return
        pipe, report_descriptor = descriptors
        report_socket = socket.socket(fileno=report_descriptor)
        child = os.fork()
        if child == 0:
            requests.close()
            worker.run(msgspec.json.decode(message, type=UnpackRequest), pipe, report_socket, server)
            return
        os.close(pipe)
        with report_socket, suppress(OSError):  # the worker is gone already, or the daemon is
            pidfd = os.pidfd_open(child)
            try:
                socket.send_fds(report_socket, [b"p"], [pidfd])
            finally:
                os.close(pidfd)


def main() -> None:
    """Serve on the socket whose number is the argument, and end without any clean-up of Python's."""
    with suppress(ConnectionError):
        serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)


if __name__ == "__main__":
    main()
