"""The service beyond one machine: both sides show certificates."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import trustme

from guestpull_client import Client, TlsFiles, Unavailable
from support.daemon import Daemon
from support.peers import run


class Authority:
    """A certificate authority, and files of what it issues."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._authority = trustme.CA()
        self._directory = directory
        self.file = str(directory / "authority.pem")
        self._authority.cert_pem.write_to_path(self.file)

    def issue(self, name: str) -> tuple[str, str]:
        """A certificate and its key."""
        issued = self._authority.issue_cert(name)
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return str(certificate), str(key)


def test_a_client_with_a_certificate_of_the_service_s_authority_is_served_and_no_other(
    disk: Path, tmp_path: Path
) -> None:
    ours, others = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    certificate, key = ours.issue("127.0.0.1")
    tls = ("--tls-certificate", certificate, "--tls-key", key, "--tls-client-authorities", ours.file)
    with Daemon(disk, options=("--listen", "127.0.0.1:0", *tls)) as daemon:
        port = daemon.await_log(r"127\.0\.0\.1:\d+")

        with Client(port[0], tls=TlsFiles(ours.file, *ours.issue("client"))) as client:
            assert client.images() == ()
        with (
            Client(port[0], tls=TlsFiles(ours.file, *others.issue("client"))) as client,
            pytest.raises(Unavailable, match="TLS"),
        ):
            client.images()
        with Client(port[0]) as client, pytest.raises(Unavailable, match="TLS"):
            client.images()
        with (
            Client(port[0], tls=TlsFiles(others.file, *ours.issue("client"))) as client,
            pytest.raises(Unavailable, match="unable to get local issuer certificate"),
        ):
            client.images()


def test_whoever_connects_by_no_tls_writes_nothing_into_the_log(disk: Path, tmp_path: Path) -> None:
    ours = Authority(tmp_path / "ours")
    certificate, key = ours.issue("127.0.0.1")
    tls = ("--tls-certificate", certificate, "--tls-key", key, "--tls-client-authorities", ours.file)
    with Daemon(disk, options=("--log-format", "json", "--listen", "127.0.0.1:0", *tls)) as daemon:
        port = daemon.await_log(r"127\.0\.0\.1:(\d+)")
        with socket.create_connection(("127.0.0.1", int(port[1]))) as caller:
            caller.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while caller.recv(4096):
                pass  # until the service has looked at it, and hung up
        daemon.stop()

        for line in daemon.log.read_text().splitlines():
            json.loads(line)


@pytest.mark.parametrize("wrong", ["certificate", "key", "client-authorities"])
@pytest.mark.parametrize("content", [None, "no PEM"])
def test_a_tls_file_that_cannot_be_used_is_named_in_one_line(
    disk: Path, tmp_path: Path, wrong: str, content: str | None
) -> None:
    ours = Authority(tmp_path / "ours")
    certificate, key = ours.issue("127.0.0.1")
    files = {"certificate": certificate, "key": key, "client-authorities": ours.file}
    files[wrong] = str(tmp_path / "wrong")
    if content is not None:
        (tmp_path / "wrong").write_text(content)
    options = [text for name, path in files.items() for text in (f"--tls-{name}", path)]
    command = ["serve", "--work-dir", str(disk / "work"), "--listen", "127.0.0.1:0", *options]
    ended = run(sys.executable, "-m", "guestpull_server.cli", *command, check=False)

    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert f"--tls-{wrong}" in ended.stderr
