"""A gRPC client that calls and then does not read: its HTTP/2 streams have a window of 0 bytes.

    with connected(socket) as connection:
        call_and_read_nothing(connection, "/grpc.health.v1.Health/Watch", request)

The service cannot send its responses until the connection is closed.
"""

from __future__ import annotations

import socket
import struct
from typing import Final

from google.protobuf.message import Message

from support.waiting import PATIENCE

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE: Final = 4


def connected(path: str) -> socket.socket:
    """A connection to a unix socket."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE)
    connection.connect(path)
    return connection


def call_and_read_nothing(connection: socket.socket, method: str, request: Message) -> None:
    """Call a method on a new connection, with a window of 0 bytes for its response."""
    message = request.SerializeToString()
    fields = [
        b"\x83\x86",  # :method POST, :scheme http
        b"\x04" + _text(method),  # :path
        b"\x01" + _text("localhost"),  # :authority
        b"\x0f\x10" + _text("application/grpc"),  # content-type
        b"\x00" + _text("te") + _text("trailers"),
    ]
    connection.sendall(
        _PREFACE
        + _frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, 0))
        + _frame(_HEADERS, _END_HEADERS, 1, b"".join(fields))
        + _frame(_DATA, _END_STREAM, 1, b"\0" + struct.pack(">I", len(message)) + message)
    )
    assert connection.recv(9), "the service closed the connection"
    connection.sendall(_frame(_SETTINGS, _ACK, 0, b""))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _text(text: str) -> bytes:
    assert len(text) < 127  # one byte of length
    return bytes([len(text)]) + text.encode()
