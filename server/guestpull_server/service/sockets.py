"""The unix socket that callers find, and who may connect to it.

Who may call is decided by the socket's owner, group and mode, as with Docker. gRPC binds the socket in a private
directory beside its path; it gets its group and mode there, and is renamed into place when the server runs. So
nobody ever finds it half-made, or with another mode than it is to have.
"""

from __future__ import annotations

import grp
import os
import shutil
import socket
import stat
import tempfile
from contextlib import suppress

from guestpull_server.errors import AddressInUse, NoSuchGroup

_OWNER_ALONE = 0o600
_OWNER_AND_GROUP = 0o660


class SocketFile:
    """A path at which gRPC is to listen.

    Args:
        path: absolute. A stale socket there is replaced.
        group: whose members may call, by name or number; empty: nobody but the owner, and root.

    Raises:
        AddressInUse: a daemon listens there, or the path cannot be used.
        NoSuchGroup: this machine has no such group.
    """

    def __init__(self, path: str, group: str) -> None:
        self._path = path
        self._group = _group_id(group) if group else None
        self._published: os.stat_result | None = None
        directory = os.path.dirname(path)
        try:
            os.makedirs(directory, mode=0o755, exist_ok=True)
            _refuse_live(path)
            self._private = tempfile.mkdtemp(prefix=".", dir=directory)
            # gRPC deletes the path that it was given when it ends: the descriptor must stay open until then
            self._descriptor = os.open(self._private, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self._refused(error) from None

    @property
    def target(self) -> str:
        """What gRPC is to listen at. A short path, because the length of a socket's path is limited."""
        return f"unix:/proc/self/fd/{self._descriptor}/socket"

    def publish(self) -> None:
        """Give the socket that gRPC has bound its group, its mode and its path.

        Raises:
            AddressInUse: the operating system refuses.
        """
        bound = os.path.join(self._private, "socket")
        try:
            if self._group is not None:
                os.chown(bound, -1, self._group)
            os.chmod(bound, _OWNER_ALONE if self._group is None else _OWNER_AND_GROUP)
            self._published = os.lstat(bound)
            os.rename(bound, self._path)
            os.rmdir(self._private)
        except OSError as error:
            raise self._refused(error) from None

    def remove(self) -> None:
        """Delete the socket, unless another daemon has put its own there meanwhile. Harmless to repeat."""
        with suppress(OSError):
            if self._published is not None and os.path.samestat(os.lstat(self._path), self._published):
                os.unlink(self._path)

    def close(self) -> None:
        """Remove the socket and what else is left. gRPC must have ended."""
        self.remove()
        shutil.rmtree(self._private, ignore_errors=True)  # what is left of a start that failed
        os.close(self._descriptor)

    def _refused(self, error: OSError) -> AddressInUse:
        return AddressInUse(f"unix://{self._path}", error.strerror or str(error))


def _group_id(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise NoSuchGroup(group) from None


def _refuse_live(path: str) -> None:
    address = f"unix://{path}"
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise AddressInUse(address, "there is a file of that name that is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a daemon that has more callers than it can take is alive, too
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return
        except BlockingIOError:
            pass
    raise AddressInUse(address, "a daemon listens there")
