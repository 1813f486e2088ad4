"""Credentials from the configured file (`authenticated_registry_credentials_uri`).

The format is containers-auth.json(5), the same as Docker's config.json. The entry with the longest matching name
wins. Credential helpers are not supported, because they are programs.
"""

from __future__ import annotations

import base64
import binascii

import msgspec

from guestpull_server.config import Configuration
from guestpull_server.errors import InvalidConfiguration
from guestpull_server.models import Credentials
from guestpull_server.registry.endpoints import Endpoint, file_of_uri
from guestpull_server.registry.reference import DOCKER_HUB


class _Entry(msgspec.Struct, frozen=True):
    auth: str = ""


class _AuthFile(msgspec.Struct, frozen=True):
    auths: dict[str, _Entry] = {}


class CredentialsFile:
    """The configured credentials file, read for each request because it can change after the start.

    Raises:
        InvalidConfiguration: the URI does not name a file.
    """

    def __init__(self, configuration: Configuration) -> None:
        uri = configuration.authenticated_registry_credentials_uri
        self._path = file_of_uri(uri, "authenticated_registry_credentials_uri") if uri else None

    def find(self, endpoint: Endpoint) -> Credentials | None:
        """Return the credentials for an endpoint; None if the file has none.

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
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            # the decoder's message can contain a part of the file
            raise InvalidConfiguration(self._path, "", "not a valid auth.json") from None
        matching = [
            (key, entry) for key, entry in auths.items() if entry.auth and _covers(key, endpoint.name)
        ]
        if not matching:
            return None
        return _decoded(max(matching, key=lambda found: len(_name(found[0])))[1], self._path)


def _covers(key: str, name: str) -> bool:
    prefix, name = _name(key).lower(), name.lower()
    return name == prefix or name.startswith(f"{prefix}/")


def _name(key: str) -> str:
    """Return the prefix of names that an entry's key stands for. Docker writes Docker Hub's key as a URL."""
    name = key.removeprefix("https://").removeprefix("http://").rstrip("/")
    for suffix in ("/v1", "/v2"):
        name = name.removesuffix(suffix)
    return DOCKER_HUB if name in ("index.docker.io", "registry-1.docker.io") else name


def _decoded(entry: _Entry, path: str) -> Credentials:
    try:
        user, colon, password = base64.b64decode(entry.auth, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        colon = ""
    if not colon:
        raise InvalidConfiguration(path, "auths", "an entry is not the base64 of user:password")
    # old versions of Docker pad with zeros
    return Credentials(user, password.rstrip("\0"))
