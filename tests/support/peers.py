"""Runs the standard tools for the same work: docker-registry, skopeo, umoci, grpcurl, runc.

with DockerRegistry(tmp_path) as registry:
    reference = registry.push("shop", "1.0", image(...))
    layout = skopeo_copy(f"docker://{reference}", f"oci:{tmp_path}/layout:1.0")
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from support.images import Image, Index, push
from support.waiting import PATIENCE, until


def run(*command: str, check: bool = True, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run a program; a failure shows its output."""
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)
    result = subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode(errors="replace")
    )
    if check and result.returncode != 0:
        raise AssertionError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stderr}")
    return result


class DockerRegistry:
    """Debian's docker-registry on a free port, as a context manager.

    Args:
        directory: holds its files.
        users: bcrypt hashes by user name, for Basic authentication; none for anonymous access.
    """

    def __init__(self, directory: Path, users: Mapping[str, str] | None = None) -> None:
        self.host = ""
        self._directory = directory
        self._users = users or {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        configuration: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "info"},
            "storage": {
                "filesystem": {"rootdirectory": str(self._directory / "blobs")},
                "delete": {"enabled": True},
            },
            "http": {"addr": "127.0.0.1:0"},
        }
        if self._users:
            htpasswd = self._directory / "htpasswd"
            htpasswd.write_text("".join(f"{name}:{hashed}\n" for name, hashed in self._users.items()))
            configuration["auth"] = {"htpasswd": {"realm": "test", "path": str(htpasswd)}}
        path = self._directory / "config.yml"
        path.write_text(json.dumps(configuration))  # JSON is YAML
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(["docker-registry", "serve", str(path)], stdout=log, stderr=log)
        self._wait()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE)

    def push(self, repository: str, tag: str, pushed: Image | Index) -> str:
        """Push an image; return its reference."""
        return push(f"http://{self.host}", repository, tag, pushed)

    def stop(self) -> None:
        """Stop it, so that nothing can be downloaded any more."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(PATIENCE)

    def _wait(self) -> None:
        """Wait until it reports its address."""

        def listens() -> bool:
            assert self._process is not None
            log = (self._directory / "log").read_text()
            assert self._process.poll() is None, f"docker-registry ended:\n{log}"
            found = re.search(r"listening on (127\.0\.0\.1:\d+)", log)
            self.host = found[1] if found else ""
            return found is not None

        until("docker-registry listens", listens)


def skopeo_copy(source: str, target: str, *options: str) -> None:
    """`skopeo copy` between registries and files, over plain HTTP."""
    run(
        "skopeo",
        "copy",
        "--quiet",
        "--insecure-policy",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
        *options,
        source,
        target,
    )


def umoci_unpack(layout: Path, tag: str, bundle: Path) -> Path:
    """Run `umoci unpack`; return the path of the rootfs."""
    run("umoci", "unpack", "--image", f"{layout}:{tag}", str(bundle))
    return bundle / "rootfs"


def unpacked_by_umoci(reference: str, directory: Path, *options: str) -> Path:
    """Unpack a registry's image with umoci; return the path of the rootfs."""
    directory.mkdir()
    skopeo_copy(f"docker://{reference}", f"oci:{directory}/layout:it", *options)
    return umoci_unpack(directory / "layout", "it", directory / "bundle")


class GrpcError(Exception):
    """A failed call, as printed by grpcurl."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        lines = [line.strip() for line in text.splitlines()]
        self.code = next((line.removeprefix("Code: ") for line in lines if line.startswith("Code: ")), "")
        self.message = next((line[9:] for line in lines if line.startswith("Message: ")), "")
        self.reason = next(
            (
                json.loads(line[line.index("{") :])["reason"]
                for line in lines
                if "google.rpc.ErrorInfo" in line
            ),
            "",
        )


def grpcurl(socket_path: str, method: str = "", request: Mapping[str, Any] | None = None) -> list[Any]:
    """Call a method with grpcurl and reflection; return the messages of the response.

    Raises:
        GrpcError: the call failed.
    """
    program = shutil.which("grpcurl", path=Path(sys.executable).parent)
    assert program is not None, "grpcurl is missing from the virtual environment"
    command = [program, "-plaintext", "-unix", "-d", json.dumps(request or {}), socket_path, method]
    done = run(*command, check=False)
    if done.returncode != 0:
        raise GrpcError(done.stderr)
    return _documents(done.stdout)


def grpcurl_list(address: str, *options: str) -> list[str]:
    """The names of the services, from reflection."""
    program = shutil.which("grpcurl", path=Path(sys.executable).parent)
    assert program is not None
    return run(program, "-plaintext", *options, address, "list").stdout.split()


def _documents(text: str) -> list[Any]:
    decoder = json.JSONDecoder()
    found: list[Any] = []
    rest = text.strip()
    while rest:
        document, end = decoder.raw_decode(rest)
        found.append(document)
        rest = rest[end:].strip()
    return found


def run_container(bundle: str, name: str, runtime: str = "runc") -> str:
    """Run a bundle unchanged until it exits; return its output."""
    command = [runtime, "run", "--bundle", bundle, name]
    if runtime == "crun" and Path("/sys/fs/cgroup/unified").is_mount():
        # crun refuses machines with both versions of cgroups; hide one of them
        script = 'umount /sys/fs/cgroup/unified && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", script, "crun", *command]
    return run(*command).stdout


def basic(user: str, password: str) -> str:
    """The value of an Authorization header."""
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


__all__: Sequence[str] = (
    "DockerRegistry",
    "GrpcError",
    "basic",
    "grpcurl",
    "grpcurl_list",
    "run",
    "run_container",
    "skopeo_copy",
    "umoci_unpack",
    "unpacked_by_umoci",
)
