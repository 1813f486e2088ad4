"""The endpoints of a reference: mirrors first, then the registry.

Follows containers-registries.conf(5), as image-rs does. The `registry` entry with the longest matching prefix can
rewrite the location, block it, or list mirrors. Entries come from `registry_config` or from the file at
`registry_configuration_uri`. `unqualified-search-registries` is accepted but ignored: a short name means Docker
Hub, as for Docker, so that a name means the same image on every machine.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

import msgspec

from guestpull_server.config import Configuration, Mirror, Registry, RegistryConfig
from guestpull_server.errors import InvalidConfiguration, InvalidReference, RegistryBlocked
from guestpull_server.registry.reference import DOCKER_HUB, Reference
from guestpull_server.registry.urls import is_loopback

_DOCKER_HUB_API: Final = "registry-1.docker.io"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The API of a registry for one repository.

    Attributes:
        name: host and repository as in references and credentials; Docker Hub's host is `docker.io`.
        host: the `host[:port]` to connect to.
        repository: the path after `/v2/`.
        insecure: allow plain HTTP and unverified certificates. Plain HTTP is always allowed on loopback.
        is_mirror: whether it is a mirror of the registry in the reference.
    """

    name: str
    host: str
    repository: str
    insecure: bool = False
    is_mirror: bool = False

    @property
    def is_loopback(self) -> bool:
        """Whether the host is this machine."""
        return is_loopback(self.host)


class Endpoints:
    """The registry configuration.

    Raises:
        InvalidConfiguration: the file at `registry_configuration_uri` cannot be read.
    """

    def __init__(self, configuration: Configuration) -> None:
        self._config = _load(configuration)

    def of(self, reference: Reference) -> tuple[Endpoint, ...]:
        """Return the endpoints for a reference in the order to try them; the last is the registry.

        Raises:
            RegistryBlocked: the configuration blocks the registry.
            InvalidReference: a location of the configuration turns it into an invalid reference.
        """
        entry = self._entry(reference)
        if entry is None:
            return (_endpoint(reference.name),)
        length, registry = entry
        if registry.blocked:
            raise RegistryBlocked(str(reference), _prefix(registry))
        mirrors = [
            _relocated(reference, length, mirror.location, insecure=mirror.insecure, is_mirror=True)
            for mirror in registry.mirror
            if _serves(registry, mirror, reference)
        ]
        return (*mirrors, _relocated(reference, length, registry.location, insecure=registry.insecure))

    def _entry(self, reference: Reference) -> tuple[int, Registry] | None:
        """Return the entry with the longest matching prefix, and how much of the name the prefix covers."""
        found: tuple[int, Registry] | None = None
        for registry in self._config.registry:
            length = _matched(_prefix(registry), reference)
            if length and (found is None or len(_prefix(registry)) > len(_prefix(found[1]))):
                found = length, registry
        return found


def _load(configuration: Configuration) -> RegistryConfig:
    if configuration.registry_config is not None:
        return _checked(configuration.registry_config, "the configuration", "registry_config.registry")
    uri = configuration.registry_configuration_uri
    if not uri:
        return RegistryConfig()
    path = file_of_uri(uri, "registry_configuration_uri")
    try:
        with open(path, "rb") as file:
            return _checked(msgspec.convert(tomllib.load(file), type=RegistryConfig), path, "registry")
    except OSError as error:
        raise InvalidConfiguration(path, "", error.strerror or str(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(path, "", f"invalid TOML ({error})") from None
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at ")
        raise InvalidConfiguration(path, place.strip("`"), problem) from None


def _checked(config: RegistryConfig, path: str, place: str) -> RegistryConfig:
    """Return the settings without trailing slashes in names, as containers/image reads them.

    Raises:
        InvalidConfiguration: an entry has no name, or a URL as its name.
    """
    registries: list[Registry] = []
    for number, registry in enumerate(config.registry):
        where = f"{place}[{number}]"
        if not _prefix(registry):
            raise InvalidConfiguration(path, where, "an entry needs a prefix or a location")
        named = (registry.prefix, registry.location, *(mirror.location for mirror in registry.mirror))
        if any("://" in name for name in named):
            raise InvalidConfiguration(
                path, where, "expected host[:port][/path] without a scheme in prefix and location"
            )
        registries.append(
            msgspec.structs.replace(
                registry,
                prefix=_trimmed(registry.prefix),
                location=_trimmed(registry.location),
                mirror=[
                    msgspec.structs.replace(mirror, location=_trimmed(mirror.location))
                    for mirror in registry.mirror
                ],
            )
        )
    return msgspec.structs.replace(config, registry=registries)


def _trimmed(name: str) -> str:
    return name.rstrip("/") or name


def file_of_uri(uri: str, key: str) -> str:
    """Return the path of a file:// URI.

    Raises:
        InvalidConfiguration: the URI has another scheme, such as `kbs://`, which image-rs supports.
    """
    problem = f"unsupported URI {uri!r}: expected file:///path"
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise InvalidConfiguration("the configuration", key, problem) from None
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InvalidConfiguration("the configuration", key, problem)
    path = unquote(parts.path)
    if "\0" in path:
        raise InvalidConfiguration("the configuration", key, problem)
    return path


def _prefix(registry: Registry) -> str:
    return registry.prefix or registry.location


def _matched(prefix: str, reference: Reference) -> int:
    """Return how many characters of the reference's name a prefix matches; 0 if it does not match.

    Host names are case-insensitive, so that `blocked` cannot be circumvented with capital letters.
    """
    prefix, name = prefix.lower(), reference.name.lower()
    if prefix.startswith("*."):
        domain = name.partition("/")[0].partition(":")[0]
        return len(domain) if domain.endswith(prefix[1:]) else 0
    matches = bool(prefix) and (name == prefix or name.startswith((f"{prefix}/", f"{prefix}:")))
    return len(prefix) if matches else 0


def _serves(registry: Registry, mirror: Mirror, reference: Reference) -> bool:
    """Whether a mirror may serve this kind of reference. Tags of a mirror can be outdated, digests cannot."""
    if registry.mirror_by_digest_only:
        return reference.digest is not None
    match mirror.pull_from_mirror:
        case "all":
            return True
        case "digest-only":
            return reference.digest is not None
        case "tag-only":
            return reference.digest is None


def _relocated(
    reference: Reference, length: int, location: str, *, insecure: bool, is_mirror: bool = False
) -> Endpoint:
    if not location:
        return _endpoint(reference.name, insecure=insecure, is_mirror=is_mirror)
    text = location + reference.name[length:]
    problem = f"location {location!r} of the registry configuration rewrites it to {text!r}"
    try:
        relocated = Reference.parse(text)
    except InvalidReference as error:
        raise InvalidReference(str(reference), f"{problem}: {error.problem}") from None
    if not text.startswith((f"{relocated.host}/", "index.docker.io/")):
        raise InvalidReference(str(reference), f"{problem}, which has no registry host")
    return _endpoint(relocated.name, insecure=insecure, is_mirror=is_mirror)


def _endpoint(name: str, *, insecure: bool = False, is_mirror: bool = False) -> Endpoint:
    host, _, repository = name.partition("/")
    api = _DOCKER_HUB_API if host == DOCKER_HUB else host
    return Endpoint(name, api, repository, insecure, is_mirror)
