"""Mount namespaces like those of container runtimes.

with MountNamespace(disk) as container:
    container.run("cat", f"{rootfs}/etc/passwd")
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from support.peers import run
from support.waiting import PATIENCE


class MountNamespace:
    """A process in a new mount namespace, which runs until this context manager is left.

    It has a copy of each mount of the host, except for overlays outside of `directory`: these are bundles of other
    tests, which could not release them.

    Args:
        directory: the directory below which overlays stay mounted.
        script: shell script that the process runs first.
        propagation: propagation of its mounts: `private`, `slave` or `shared`.
    """

    def __init__(self, directory: Path, script: str = ":", *, propagation: str = "private") -> None:
        self._directory = directory
        self._script = script
        self._propagation = propagation
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        script = f"echo ready && read go && {self._script} && echo ready && read end"
        command = ["unshare", "--mount", "--propagation", self._propagation, "sh", "-c", script]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._await_ready()
        others = self._overlays_of_others()
        if others and self._propagation != "shared":  # there it would unmount the host's
            # one whose directory was removed meanwhile is not mounted any more
            self._run("umount", "--lazy", *others, check=False)
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        self._await_ready()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """The id of its process."""
        assert self._process is not None
        return self._process.pid

    def run(self, *command: str) -> str:
        """Run a program in the namespace; return its output."""
        return self._run(*command, check=True)

    def end(self) -> None:
        """End the process; harmless to repeat."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.communicate(b"\n", timeout=PATIENCE)

    def _run(self, *command: str, check: bool) -> str:
        return run("nsenter", f"--mount=/proc/{self.pid}/ns/mnt", "--", *command, check=check).stdout

    def _await_ready(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def _overlays_of_others(self) -> list[str]:
        lines = Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()
        points = [line.split(" ")[4] for line in lines if " - overlay " in line]
        decoded = [point.encode().decode("unicode_escape") for point in points]
        return [point for point in decoded if point != "/" and not point.startswith(f"{self._directory}/")]
