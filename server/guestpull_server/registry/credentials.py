"""Who we are at a registry: the caller's auth_info, or what the credentials file says.

The file (`authenticated_registry_credentials_uri`) is containers-auth.json(5), which is Docker's config.json:
the entry with the longest matching name wins. Credential helpers are programs, and are not run.
"""

from __future__ import annotations

import base64
import binascii

import msgspec

from guestpull_server.config import Configuration
from guestpull_server.errors import InvalidConfiguration
from guestpull_server.models import Credentials
from guestpull_server.registry.endpoints import file_of_uri
from guestpull_server.registry.reference import DOCKER_HUB, Reference


class _Entry(msgspec.Struct, frozen=True):
    auth: str = ""


class _AuthFile(msgspec.Struct, frozen=True):
    auths: dict[str, _Entry] = {}


class CredentialsFile:
    """The entries of the configured credentials file, read when it is first needed and again each time.

    The file is small, and may be put there after the daemon has started.
    """

    def __init__(self, configuration: Configuration) -> None:
        uri = configuration.authenticated_registry_credentials_uri
        self._path = file_of_uri(uri, "authenticated_registry_credentials_uri") if uri else None

    def find(self, reference: Reference) -> Credentials | None:
        """The credentials for a reference, if the file has any.

        Raises:
            InvalidConfiguration: the file cannot be read.
        """
        if self._path is None:
            return None
        try:
            with open(self._path, "rb") as file:
                auths = msgspec.json.decode(file.read(), type=_AuthFile).auths
        except OSError as error:
            raise InvalidConfiguration(self._path, "", error.strerror or str(error)) from None
        except msgspec.DecodeError:
            # the decoder's message might repeat a part of the file
            raise InvalidConfiguration(self._path, "", "it is no auth.json") from None
        best: tuple[int, _Entry] | None = None
        for key, entry in auths.items():
            name = _name(key)
            fits = reference.name == name or reference.name.startswith(f"{name}/")
            if fits and (best is None or len(name) > best[0]):
                best = len(name), entry
        return None if best is None else self._decoded(best[1])

    def _decoded(self, entry: _Entry) -> Credentials:
        try:
            user, colon, password = base64.b64decode(entry.auth, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            colon = ""
        if not colon:
            raise InvalidConfiguration(self._path or "", "auths", "an entry holds no base64 of user:password")
        return Credentials(user, password.rstrip("\0"))


def _name(key: str) -> str:
    """An entry's key as a name's beginning: Docker writes its hub's as a URL."""
    name = key.removeprefix("https://").removeprefix("http://").rstrip("/")
    for suffix in ("/v1", "/v2"):
        name = name.removesuffix(suffix)
    return DOCKER_HUB if name == "index.docker.io" else name
