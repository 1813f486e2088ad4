"""The unix socket that callers find."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from guestpull_server.errors import AddressInUse, NoSuchGroup
from guestpull_server.service.sockets import SocketFile
from support.waiting import PATIENCE


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    # pytest's directories may be longer than a socket's path may be
    directory = os.open(tmp_path, os.O_PATH)
    yield f"/proc/self/fd/{directory}/run/guestpull.sock"
    os.close(directory)


@pytest.fixture
def listening() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def serve(listening: ExitStack, path: str, group: str = "") -> tuple[SocketFile, socket.socket]:
    """A socket file whose listener is bound as gRPC binds it."""
    file = SocketFile(path, group)
    listening.callback(file.close)
    listener = listening.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(file.target.removeprefix("unix:"))
    listener.listen()
    return file, listener


def reaches(path: str, listener: socket.socket) -> bool:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(path)
        listener.settimeout(PATIENCE)
        accepted, _ = listener.accept()
        accepted.close()
    return True


def test_the_socket_appears_listening_and_with_its_mode(listening: ExitStack, path: str) -> None:
    file, listener = serve(listening, path)
    assert not os.path.exists(path)

    file.publish()

    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    assert reaches(path, listener)
    assert os.listdir(os.path.dirname(path)) == ["guestpull.sock"]


def test_nobody_reaches_the_socket_before_it_has_its_mode(listening: ExitStack, path: str) -> None:
    serve(listening, path)

    (private,) = os.listdir(os.path.dirname(path))

    assert stat.S_IMODE(os.stat(f"{os.path.dirname(path)}/{private}").st_mode) == 0o700


def test_a_group_gets_the_socket_by_name_or_number(listening: ExitStack, path: str) -> None:
    file, _ = serve(listening, path, str(os.getegid()))

    file.publish()

    status = os.lstat(path)
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, os.getegid())


def test_a_group_that_is_not_there_is_refused(path: str) -> None:
    with pytest.raises(NoSuchGroup):
        SocketFile(path, "no-such-group")

    assert not os.path.exists(os.path.dirname(path))


def test_a_stale_socket_is_replaced(listening: ExitStack, path: str) -> None:
    os.makedirs(os.path.dirname(path))
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)

    file, listener = serve(listening, path)
    file.publish()

    assert reaches(path, listener)


def test_a_live_socket_is_refused_and_goes_on_living(listening: ExitStack, path: str) -> None:
    file, listener = serve(listening, path)
    file.publish()

    with pytest.raises(AddressInUse, match="listens there"):
        SocketFile(path, "")

    listener.settimeout(PATIENCE)
    listener.accept()[0].close()  # the question
    assert reaches(path, listener)


def test_a_file_that_is_not_a_socket_is_never_replaced(path: str) -> None:
    os.makedirs(os.path.dirname(path))
    Path(path).write_text("precious")

    with pytest.raises(AddressInUse, match="not a socket"):
        SocketFile(path, "")

    assert Path(path).read_text() == "precious"
    assert os.listdir(os.path.dirname(path)) == ["guestpull.sock"]


def test_removing_leaves_a_socket_alone_that_is_another_daemons_by_now(
    listening: ExitStack, path: str
) -> None:
    first, _ = serve(listening, path)
    first.publish()
    os.unlink(path)
    second, listener = serve(listening, path)
    second.publish()

    first.remove()

    assert reaches(path, listener)


def test_removing_takes_the_socket(listening: ExitStack, path: str) -> None:
    file, _ = serve(listening, path)
    file.publish()

    file.remove()

    assert os.listdir(os.path.dirname(path)) == []


def test_a_start_that_fails_before_the_socket_appears_leaves_nothing(path: str) -> None:
    with ExitStack() as listening:
        serve(listening, path)

    assert os.listdir(os.path.dirname(path)) == []
