"""The unix socket's door."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from guestpull_server.errors import AddressInUse
from guestpull_server.service import gate as gate_module
from guestpull_server.service.gate import Gate
from guestpull_server.service.sockets import HiddenSocket, listen
from support.waiting import PATIENCE


class Echo:
    """A server behind the gate that says its name to whoever connects."""

    def __init__(self, name: bytes, directory: Path) -> None:
        self._name = name
        self._listener = socket.socket(socket.AF_UNIX)
        self.hidden = HiddenSocket(self._bind, str(directory))

    def _bind(self, address: str) -> int:
        self._listener.bind(address.removeprefix("unix:"))
        self._listener.listen()
        threading.Thread(target=self._answer, daemon=True).start()
        return 1

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(self._name + connection.recv(100))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hidden.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Echo]:
    echo = Echo(b"service ", tmp_path)
    yield echo
    echo.close()


@pytest.fixture
def refusal(tmp_path: Path) -> Iterator[Echo]:
    echo = Echo(b"refusal ", tmp_path)
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
        caller.settimeout(PATIENCE)
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


def test_many_callers_at_once_find_room_before_any_is_let_in(path: str) -> None:
    with listen(path, 0o600), ExitStack() as callers:
        for _ in range(400):
            caller = callers.enter_context(socket.socket(socket.AF_UNIX))
            caller.setblocking(False)
            caller.connect(path)


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


def test_hidden_sockets_leave_no_name_and_need_no_temporary_directory(
    service: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    deep = tmp_path / ("d" * 100)  # beyond what a socket's path may be
    deep.mkdir()

    echo = Echo(b"deep ", deep)

    assert os.listdir(deep) == []
    with echo.hidden.connect() as connection:
        connection.sendall(b"hello")
        assert connection.recv(100) == b"deep hello"
    echo.close()


@pytest.mark.parametrize("started", [0, 1])
def test_a_caller_for_whom_no_thread_can_be_had_is_turned_away_and_the_next_one_is_not(
    path: str, service: Echo, refusal: Echo, monkeypatch: pytest.MonkeyPatch, started: int
) -> None:
    gate = Gate(path, frozenset(), service.hidden, refusal.hidden)
    start = threading.Thread.start
    left = [started]

    def no_thread(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    with monkeypatch.context() as patching:
        patching.setattr(threading.Thread, "start", no_thread)
        with contextlib.suppress(ConnectionError):
            assert call(path, b"hello") == b""

    assert call(path, b"hello") == b"service hello"
    gate.hang_up(patience=PATIENCE)
    gate.close()


@pytest.fixture
def refused(path: str, service: Echo, refusal: Echo, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate that refuses whoever comes, and has little patience."""
    monkeypatch.setattr(gate_module, "_CREDENTIALS", _Somebody())
    monkeypatch.setattr(gate_module, "_SECONDS_FOR_REFUSAL", 0.5)
    gate = Gate(path, frozenset({4242}), service.hidden, refusal.hidden)
    yield gate
    gate.close()


class _Somebody:
    """What the kernel would say of a user who may not call."""

    size = 12

    def unpack(self, _credentials: bytes) -> tuple[int, int, int]:
        return 1, 65534, 65534


def connected(path: str) -> socket.socket:
    caller = socket.socket(socket.AF_UNIX)
    caller.settimeout(PATIENCE)
    caller.connect(path)
    return caller


def test_a_refused_caller_that_says_nothing_is_cut_in_time(refused: Gate, path: str) -> None:
    with connected(path) as silent:
        while silent.recv(100):  # what the refusal says to a caller that has gone
            pass


def threads_of_gates() -> int:
    return sum(thread.name == "gate" for thread in threading.enumerate())


def test_of_many_refused_callers_at_once_few_are_answered_and_the_rest_is_closed_at_once(
    path: str, service: Echo, refusal: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "_CREDENTIALS", _Somebody())
    monkeypatch.setattr(gate_module, "_SECONDS_FOR_REFUSAL", PATIENCE)
    gate = Gate(path, frozenset({4242}), service.hidden, refusal.hidden)
    before = threads_of_gates()
    with contextlib.ExitStack() as callers:
        waiting = [callers.enter_context(connected(path)) for _ in range(gate_module._MOST_REFUSED)]

        for _ in range(100):
            with connected(path) as one_too_many, contextlib.suppress(ConnectionResetError):
                assert one_too_many.recv(1) == b""

        assert threads_of_gates() <= before + 2 * gate_module._MOST_REFUSED
        waiting[0].sendall(b"hello")
        assert waiting[0].recv(100) == b"refusal hello"
    gate.close()


def test_refusals_are_told_but_not_as_often_as_they_can_be_had(
    refused: Gate, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gate_module, "_SECONDS_BETWEEN_COMPLAINTS", PATIENCE)
    for _ in range(50):
        with contextlib.suppress(OSError):
            call(path, b"hello")

    assert len([one for one in caplog.records if "refused" in one.getMessage()]) == 1


def test_a_user_who_may_call_has_so_many_connections_and_no_more(
    path: str, service: Echo, refusal: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "_CREDENTIALS", _Somebody())
    monkeypatch.setattr(gate_module, "_MOST_OF_A_USER", 2)
    gate = Gate(path, frozenset({65534}), service.hidden, refusal.hidden)
    first, second = connected(path), connected(path)

    with connected(path) as third, contextlib.suppress(ConnectionResetError):
        assert third.recv(1) == b""
    first.sendall(b"hello")
    assert first.recv(100) == b"service hello"
    second.close()
    assert first.recv(100) == b""
    first.close()
    gate.hang_up(patience=PATIENCE)

    assert call(path, b"again") == b"service again"
    gate.close()
