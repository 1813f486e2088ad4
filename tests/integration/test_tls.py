"""The service beyond one machine: both sides show certificates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trustme

from guestpull_client import Client, TlsFiles, Unavailable
from support.daemon import Daemon


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
        port = re.search(r"127\.0\.0\.1:\d+", daemon.log.read_text())
        assert port is not None

        with Client(port[0], tls=TlsFiles(ours.file, *ours.issue("client"))) as client:
            assert client.images() == ()
        with (
            Client(port[0], tls=TlsFiles(ours.file, *others.issue("client"))) as client,
            pytest.raises(Unavailable),
        ):
            client.images()
        with Client(port[0]) as client, pytest.raises(Unavailable):
            client.images()
