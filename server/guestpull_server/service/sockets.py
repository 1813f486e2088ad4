"""Unix sockets as the gate needs them: one that everybody finds under its name, and ones that nobody does."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable
from typing import Final

from guestpull_server.errors import AddressInUse

_BACKLOG: Final = socket.SOMAXCONN  # gRPC takes a full one for a daemon that is not there


class HiddenSocket:
    """A unix socket that a server binds by name, and that has no name any more afterwards.

    Args:
        bind: has the server listen at an address.
        directory: where it has its name meanwhile; nobody else may look into it.
    """

    def __init__(self, bind: Callable[[str], int], directory: str) -> None:
        named = tempfile.mkdtemp(dir=directory)
        try:
            # reached by its descriptor, because a socket's path has a small limit; the server keeps that path
            self._directory = os.open(named, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                path = f"/proc/self/fd/{self._directory}/grpc"
                bind(f"unix:{path}")
                self._inode = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except BaseException:
                os.close(self._directory)
                raise
        finally:
            shutil.rmtree(named)

    def connect(self) -> socket.socket:
        """A new connection to it."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(f"/proc/self/fd/{self._inode}")
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._inode)
        os.close(self._directory)


def listen(path: str, mode: int) -> socket.socket:
    """A listening socket at a path. A stale socket is replaced, a live one is an error.

    The socket appears under its name with its mode set and listening: nobody ever finds it half-made.

    Raises:
        AddressInUse: a daemon listens there, or something is there that is no socket.
        OSError: the operating system refuses.
    """
    directory = os.path.dirname(path)
    os.makedirs(directory, mode=0o755, exist_ok=True)
    _refuse_live(path)
    listener = socket.socket(socket.AF_UNIX)
    unfinished = tempfile.mkdtemp(prefix=".", dir=directory)
    try:
        # a relative way to it, because a socket's path has a small limit
        inside = os.open(unfinished, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{inside}/socket")
        finally:
            os.close(inside)
        made = os.path.join(unfinished, "socket")
        os.chmod(made, mode)
        listener.listen(_BACKLOG)
        os.rename(made, path)
    except BaseException:
        listener.close()
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return listener


def _refuse_live(path: str) -> None:
    address = f"unix://{path}"
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise AddressInUse(address, "there is a file of that name, and it is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return
        except BlockingIOError:
            pass
    raise AddressInUse(address, "a daemon listens there")
