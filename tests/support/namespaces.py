"""Mount namespaces besides the host's, as container runtimes make them.

with MountNamespace() as elsewhere:  # it has a copy of every mount of the host
    elsewhere.run("cat", f"{rootfs}/etc/passwd")
"""

from __future__ import annotations

import subprocess
from types import TracebackType
from typing import Self

from support.peers import run
from support.waiting import PATIENCE


class MountNamespace:
    """A process in a mount namespace of its own, which lives until this context manager is left.

    Args:
        script: what it does first, in a shell.
        propagation: how its mounts relate to the host's: `private`, `slave` or `shared`.
    """

    def __init__(self, script: str = ":", *, propagation: str = "private") -> None:
        self._script = script
        self._propagation = propagation
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        script = f"{self._script} && echo ready && read end"
        command = ["unshare", "--mount", "--propagation", self._propagation, "sh", "-c", script]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process is not None
        return self._process.pid

    def run(self, *command: str) -> str:
        """Run a program in it; returns what it printed."""
        return run("nsenter", f"--mount=/proc/{self.pid}/ns/mnt", "--", *command).stdout

    def end(self) -> None:
        """End it; harmless to repeat."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.communicate(b"\n", timeout=PATIENCE)
