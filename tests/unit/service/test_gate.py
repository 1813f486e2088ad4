"""The unix socket's door."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpull_server.errors import AddressInUse
from guestpull_server.service.gate import Gate, HiddenSocket


class Echo:
    """A server behind the gate that says its name to whoever connects."""

    def __init__(self, name: bytes) -> None:
        self._name = name
        self._listener = socket.socket(socket.AF_UNIX)
        self.hidden = HiddenSocket(self._bind)

    def _bind(self, address: str) -> int:
        self._listener.bind(address.removeprefix("unix:"))
        self._listener.listen()
        threading.Thread(target=self._answer, daemon=True).start()
        return 1

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    connection.sendall(self._name + connection.recv(100))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hidden.close()


@pytest.fixture
def service() -> Iterator[Echo]:
    echo = Echo(b"service ")
    yield echo
    echo.close()


@pytest.fixture
def refusal() -> Iterator[Echo]:
    echo = Echo(b"refusal ")
    yield echo
    echo.close()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    # pytest's directories may be longer than a socket's path may be
    directory = os.open(tmp_path, os.O_PATH)
    yield f"/proc/self/fd/{directory}/run/guestpull.sock"
    os.close(directory)


def call(path: str, text: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(10)
        caller.connect(path)
        caller.sendall(text)
        answer = b""
        while piece := caller.recv(100):
            answer += piece
        return answer


def test_the_owner_reaches_the_service_through_a_socket_of_mode_0600(
    path: str, service: Echo, refusal: Echo
) -> None:
    gate = Gate(path, frozenset(), service.hidden, refusal.hidden)

    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert call(path, b"hello") == b"service hello"
    gate.close()
    assert not os.path.exists(path)


def test_a_stale_socket_is_replaced(path: str, service: Echo, refusal: Echo) -> None:
    os.makedirs(os.path.dirname(path))
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)

    gate = Gate(path, frozenset(), service.hidden, refusal.hidden)

    assert call(path, b"hello") == b"service hello"
    gate.close()


def test_a_live_socket_is_refused_and_goes_on_living(path: str, service: Echo, refusal: Echo) -> None:
    gate = Gate(path, frozenset(), service.hidden, refusal.hidden)

    with pytest.raises(AddressInUse, match="listens there"):
        Gate(path, frozenset(), service.hidden, refusal.hidden)

    assert call(path, b"still here") == b"service still here"
    gate.close()


def test_a_file_that_is_no_socket_is_never_replaced(path: str, service: Echo, refusal: Echo) -> None:
    os.makedirs(os.path.dirname(path))
    Path(path).write_text("precious")

    with pytest.raises(AddressInUse, match="no socket"):
        Gate(path, frozenset(), service.hidden, refusal.hidden)

    assert Path(path).read_text() == "precious"


def test_closing_leaves_a_socket_alone_that_is_another_daemons_by_now(
    path: str, service: Echo, refusal: Echo
) -> None:
    gate = Gate(path, frozenset(), service.hidden, refusal.hidden)
    os.unlink(path)
    other = Gate(path, frozenset(), service.hidden, refusal.hidden)

    gate.close()

    assert call(path, b"mine") == b"service mine"
    other.close()


def test_with_allowed_uids_others_may_connect_to_be_told_no(path: str, service: Echo, refusal: Echo) -> None:
    gate = Gate(path, frozenset({4242}), service.hidden, refusal.hidden)

    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
    gate.close()
