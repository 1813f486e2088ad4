"""Where a reference's image is fetched from: mirrors first, then the registry itself.

Follows containers-registries.conf(5), as image-rs does: the `registry` entry with the longest matching prefix
may rewrite the location, block it, or name mirrors; its settings come inline (`registry_config`) or from a file
(`registry_configuration_uri`).
"""

from __future__ import annotations

import ipaddress
import tomllib
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import msgspec

from guestpull_server.config import Configuration, Registry, RegistryConfig
from guestpull_server.errors import InvalidConfiguration, InvalidReference, RegistryBlocked
from guestpull_server.registry.reference import DOCKER_HUB, Reference

_DOCKER_HUB_API: Final = "registry-1.docker.io"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A registry's API for one repository.

    `insecure`: plain HTTP and unverified certificates are acceptable. Loopback counts as such for HTTP alone.
    """

    host: str
    repository: str
    insecure: bool

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether `host[:port]` is this machine."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Endpoints:
    """The registry configuration, applied.

    Raises:
        InvalidConfiguration: `registry_configuration_uri` names what cannot be read.
    """

    def __init__(self, configuration: Configuration) -> None:
        self._config = _load(configuration)

    def of(self, reference: Reference) -> tuple[Endpoint, ...]:
        """All endpoints for a reference, in the order in which they are to be tried.

        Raises:
            RegistryBlocked: the configuration blocks it.
            InvalidReference: a location of the configuration makes no reference of it.
        """
        registry = self._entry(reference)
        if registry is None:
            return (_endpoint(reference.host, reference.repository, insecure=False),)
        prefix = registry.prefix or registry.location
        if registry.blocked:
            raise RegistryBlocked(str(reference), prefix)
        mirrors = [
            _relocated(reference, prefix, mirror.location, mirror.insecure) for mirror in registry.mirror
        ]
        return (*mirrors, _relocated(reference, prefix, registry.location, registry.insecure))

    def _entry(self, reference: Reference) -> Registry | None:
        matching = [
            (len(registry.prefix or registry.location), registry)
            for registry in self._config.registry
            if _matches(registry.prefix or registry.location, reference)
        ]
        return max(matching, key=lambda found: found[0])[1] if matching else None


def _load(configuration: Configuration) -> RegistryConfig:
    if configuration.registry_config is not None:
        return configuration.registry_config
    uri = configuration.registry_configuration_uri
    if not uri:
        return RegistryConfig()
    path = file_of_uri(uri, "registry_configuration_uri")
    try:
        with open(path, "rb") as file:
            return msgspec.convert(tomllib.load(file), type=RegistryConfig)
    except OSError as error:
        raise InvalidConfiguration(path, "", error.strerror or str(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(path, "", f"it is no TOML ({error})") from None
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at ")
        raise InvalidConfiguration(path, place.strip("`"), problem) from None


def file_of_uri(uri: str, key: str) -> str:
    """The path of a file:// URI.

    Raises:
        InvalidConfiguration: it is of another kind; image-rs would ask a key broker for `kbs://`.
    """
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InvalidConfiguration(
            "the configuration", key, f"{uri!r} is no file:///path; others are not supported"
        )
    return parts.path


def _matches(prefix: str, reference: Reference) -> bool:
    if prefix.startswith("*."):
        return reference.host.partition(":")[0].endswith(prefix[1:])
    name = reference.name
    return bool(prefix) and (name == prefix or name.startswith((f"{prefix}/", f"{prefix}:")))


def _relocated(reference: Reference, prefix: str, location: str, insecure: bool) -> Endpoint:
    if not location or prefix.startswith("*."):
        name = reference.name
    else:
        name = location + reference.name.removeprefix(prefix)
    host, slash, repository = name.partition("/")
    if not slash or not repository:
        raise InvalidReference(str(reference), f"location {location!r} leaves no repository of it")
    return _endpoint(host, repository, insecure=insecure)


def _endpoint(host: str, repository: str, *, insecure: bool) -> Endpoint:
    return Endpoint(_DOCKER_HUB_API if host == DOCKER_HUB else host, repository, insecure)
