"""Runs a guestpulld as users do."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import grpc

from bench.place import Cgroup, Refusal
from guestpull_client import Client, GuestpullError

_PATIENCE: Final = 60.0  # seconds until it must serve
_LONG: Final = 600.0  # seconds that a call may take


class Daemon:
    """A serving guestpulld. Created by `serving`.

    Attributes:
        client: a client connected to it.
        start_seconds: time from the start of the process until it reports that it is serving.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], directory: Path, client: Client, seconds: float
    ) -> None:
        self._process = process
        self._directory = directory
        self._bundles = 0
        self._channel = grpc.insecure_channel(client.address, [("grpc.max_receive_message_length", -1)])
        self.client = client
        self.start_seconds = seconds

    def close(self) -> None:
        """Close the connections."""
        self._channel.close()
        self.client.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def list_layers(self) -> bytes:
        """Call ListLayers without decoding the response."""
        call = self._channel.unary_unary("/guestpull.v1.ImageService/ListLayers", None, None)
        answer: bytes = call(b"")
        return answer

    def new_bundle(self) -> str:
        """The path for a new bundle."""
        self._bundles += 1
        return str(self._directory / "bundles" / str(self._bundles))


@contextlib.contextmanager
def serving(directory: Path, cgroup: Cgroup, additional_stores: Sequence[Path] = ()) -> Iterator[Daemon]:
    """Run a guestpulld with work directory, socket and bundles below `directory` during a block.

    Args:
        directory: an empty directory, or one from an earlier call.
        cgroup: counts the CPU time of its processes.
        additional_stores: its read-only stores.

    Raises:
        Refusal: the daemon does not serve.
    """
    program = Path(sys.executable).with_name("guestpulld")
    path = directory / "guestpull.sock"
    command: list[str | Path] = [program, "serve", "--work-dir", directory / "work"]
    command += ["--listen", f"unix://{path}"]
    if additional_stores:
        configuration = directory / "config.json"
        configuration.write_text(
            json.dumps({"additional_stores": [str(store) for store in additional_stores]})
        )
        command += ["--config", configuration]
    log = directory / "log"
    with log.open("ab") as output:
        begun = time.monotonic()
        process = subprocess.Popen(cgroup.command(command), stdout=output, stderr=output)
    try:
        _wait(process, path, begun, log)
        client = Client(f"unix://{path}", timeout=_LONG)
        while not _is_healthy(client):
            if time.monotonic() - begun > _PATIENCE:
                raise Refusal(f"guestpulld is not healthy: {log.read_text()}")
            time.sleep(0.002)
        with contextlib.closing(Daemon(process, directory, client, time.monotonic() - begun)) as daemon:
            yield daemon
        process.terminate()
        process.wait(_PATIENCE)
    except (GuestpullError, subprocess.TimeoutExpired) as error:
        raise Refusal(f"{error}\nguestpulld's log:\n{log.read_text()[-2000:]}") from error
    finally:
        process.kill()
        process.wait(_PATIENCE)


def _wait(process: subprocess.Popen[bytes], path: Path, begun: float, log: Path) -> None:
    """Wait until the daemon listens. A gRPC call before that would add gRPC's delay before the next attempt."""
    while True:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(path))
            return
        if process.poll() is not None or time.monotonic() - begun > _PATIENCE:
            raise Refusal(f"guestpulld does not start: {log.read_text()}")
        time.sleep(0.001)


def _is_healthy(client: Client) -> bool:
    try:
        return client.is_healthy()
    except GuestpullError:
        return False
