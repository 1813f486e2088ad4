"""The unix socket of the service."""

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
    # the paths of pytest's directories can be too long for a socket
    directory = os.open(tmp_path, os.O_PATH)
    yield f"/proc/self/fd/{directory}/run/guestpull.sock"
    os.close(directory)


@pytest.fixture
def exits() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def serve(exits: ExitStack, path: str, group: str = "") -> tuple[SocketFile, socket.socket]:
    """Bind a listener at a socket file as gRPC does."""
    file = SocketFile(path, group)
    exits.callback(file.close)
    listener = exits.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(file.target.removeprefix("unix:"))
    listener.listen()
    return file, listener


def connects(path: str, listener: socket.socket) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        listener.settimeout(PATIENCE)
        accepted, _ = listener.accept()
        accepted.close()
    return True


def test_publish_moves_a_listening_socket_with_its_mode_into_place(exits: ExitStack, path: str) -> None:
    file, listener = serve(exits, path)
    assert not os.path.exists(path)

    file.publish()

    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    assert connects(path, listener)
    assert os.listdir(os.path.dirname(path)) == ["guestpull.sock"]


def test_the_socket_is_in_a_private_directory_until_published(exits: ExitStack, path: str) -> None:
    serve(exits, path)

    (private,) = os.listdir(os.path.dirname(path))

    assert stat.S_IMODE(os.stat(f"{os.path.dirname(path)}/{private}").st_mode) == 0o700


def test_the_socket_belongs_to_the_group(exits: ExitStack, path: str) -> None:
    file, _ = serve(exits, path, str(os.getegid()))

    file.publish()

    status = os.lstat(path)
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, os.getegid())


def test_an_unknown_group_is_refused(path: str) -> None:
    with pytest.raises(NoSuchGroup):
        SocketFile(path, "no-such-group")

    assert not os.path.exists(os.path.dirname(path))


def test_a_stale_socket_is_replaced(exits: ExitStack, path: str) -> None:
    os.makedirs(os.path.dirname(path))
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)

    file, listener = serve(exits, path)
    file.publish()

    assert connects(path, listener)


def test_a_live_socket_is_refused_and_still_works(exits: ExitStack, path: str) -> None:
    file, listener = serve(exits, path)
    file.publish()

    with pytest.raises(AddressInUse, match="listens there"):
        SocketFile(path, "")

    listener.settimeout(PATIENCE)
    listener.accept()[0].close()  # the connection of the check
    assert connects(path, listener)


def test_a_file_that_is_not_a_socket_is_not_replaced(path: str) -> None:
    os.makedirs(os.path.dirname(path))
    Path(path).write_text("content")

    with pytest.raises(AddressInUse, match="not a socket"):
        SocketFile(path, "")

    assert Path(path).read_text() == "content"
    assert os.listdir(os.path.dirname(path)) == ["guestpull.sock"]


def test_remove_keeps_the_socket_of_another_daemon(exits: ExitStack, path: str) -> None:
    first, _ = serve(exits, path)
    first.publish()
    os.unlink(path)
    second, listener = serve(exits, path)
    second.publish()

    first.remove()

    assert connects(path, listener)


def test_remove_deletes_the_socket(exits: ExitStack, path: str) -> None:
    file, _ = serve(exits, path)
    file.publish()

    file.remove()

    assert os.listdir(os.path.dirname(path)) == []


def test_close_before_publish_leaves_nothing(path: str) -> None:
    with ExitStack() as exits:
        serve(exits, path)

    assert os.listdir(os.path.dirname(path)) == []
