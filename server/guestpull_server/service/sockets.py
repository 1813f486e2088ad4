"""The unix socket of the service.

The socket's owner, group and mode decide who may connect, as with Docker. gRPC binds the socket in a private
directory beside its path. `publish` sets group and mode there, and renames the socket to its path once the
server runs. So callers never find a socket that does not accept connections or has another mode.
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
    """A unix socket at which gRPC listens.

    Args:
        path: the absolute path. A stale socket there is replaced.
        group: name or number of the group whose members may connect. Empty means only the owner and root may.

    Raises:
        AddressInUse: a daemon listens there, or the path cannot be used.
        NoSuchGroup: the group does not exist.
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
            # at its end gRPC deletes `target`, which leads through this descriptor: keep it open until then
            self._descriptor = os.open(self._private, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self._in_use(error) from None

    @property
    def target(self) -> str:
        """The address for gRPC. It is short because the length of a socket's path is limited."""
        return f"unix:/proc/self/fd/{self._descriptor}/socket"

    def publish(self) -> None:
        """Set group and mode of the socket that gRPC has bound, and rename it to its path.

        Raises:
            AddressInUse: the operating system refused it.
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
            raise self._in_use(error) from None

    def remove(self) -> None:
        """Delete the socket unless another daemon has replaced it. Idempotent."""
        with suppress(OSError):
            if self._published is not None and os.path.samestat(os.lstat(self._path), self._published):
                os.unlink(self._path)

    def close(self) -> None:
        """Remove the socket and the private directory. Call it after gRPC has ended."""
        self.remove()
        shutil.rmtree(self._private, ignore_errors=True)  # exists if `publish` was not reached
        os.close(self._descriptor)

    def _in_use(self, error: OSError) -> AddressInUse:
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
            raise AddressInUse(address, "the file at this path is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # do not wait for a daemon whose backlog is full
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return
        except BlockingIOError:
            pass
    raise AddressInUse(address, "a daemon listens there")
