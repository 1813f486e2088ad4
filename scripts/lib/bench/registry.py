"""Runs Debian's docker-registry with a permanent directory, and pushes to it."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from bench.layers import Blob
from bench.place import Cgroup, Refusal

MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_PATIENCE: Final = 20.0  # seconds until it must answer


class Registry:
    """A docker-registry on a loopback port, as a context manager.

    Args:
        directory: holds its blobs, permanently; also an attribute.
        cgroup: counts the CPU time of its processes.
    """

    def __init__(self, directory: Path, cgroup: Cgroup) -> None:
        self.directory = directory
        self._cgroup = cgroup
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        """Its address for references."""
        return f"127.0.0.1:{self._port}"

    @property
    def cpu_seconds(self) -> float:
        """User and system time that it has used."""
        return self._cgroup.cpu_seconds

    def blob_path(self, digest: str) -> Path:
        """The file of a blob."""
        algorithm, _, hexadecimal = digest.partition(":")
        blobs = self.directory / "docker/registry/v2/blobs"
        return blobs / algorithm / hexadecimal[:2] / hexadecimal / "data"

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        configuration = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self.directory)}},
            "http": {"addr": self.host},
        }
        path = self.directory / f"config-{self._port}.yml"
        path.write_text(json.dumps(configuration))  # JSON is YAML
        command = self._cgroup.command(["docker-registry", "serve", path])
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + _PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise Refusal("docker-registry does not start")
            time.sleep(0.02)
        path.unlink()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(_PATIENCE)

    def push_blob(self, repository: str, blob: Blob) -> None:
        """Push a blob from its file."""
        connection = http.client.HTTPConnection(self.host)
        connection.request("POST", f"/v2/{repository}/blobs/uploads/", headers={"Content-Length": "0"})
        answer = connection.getresponse()
        answer.read()
        location = urlsplit(answer.headers["Location"])
        with blob.path.open("rb") as file:
            headers = {"Content-Length": str(blob.size), "Content-Type": "application/octet-stream"}
            url = f"{location.path}?{location.query}&digest={blob.digest}"
            connection.request("PUT", url, body=file, headers=headers)
            _expect_created(connection.getresponse(), f"push of {blob.path.name}")
        connection.close()

    def push_manifest(self, repository: str, tag: str, manifest: bytes) -> None:
        """Push a manifest after its blobs."""
        connection = http.client.HTTPConnection(self.host)
        path = f"/v2/{repository}/manifests/{tag}"
        connection.request("PUT", path, body=manifest, headers={"Content-Type": MANIFEST})
        _expect_created(connection.getresponse(), f"push of {repository}:{tag}")
        connection.close()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(self.host, timeout=5)
        try:
            connection.request("GET", "/v2/")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


def _expect_created(answer: http.client.HTTPResponse, doing: str) -> None:
    body = answer.read()
    if answer.status != 201:
        raise Refusal(f"{doing}: the registry answered {answer.status} {body[:300]!r}")
