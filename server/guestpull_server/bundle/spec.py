"""The parts of the OCI runtime specification's config.json that we write (config.md and config-linux.md)."""

from __future__ import annotations

from typing import Self

import msgspec


class _Part(msgspec.Struct, frozen=True, rename="camel"):
    """A part of the document; encoded with the specification's names."""


class User(_Part, frozen=True):
    """`process.user`."""

    uid: int
    gid: int
    additional_gids: list[int] = []


class Capabilities(_Part, frozen=True):
    """`process.capabilities`; ambient and inheritable ones stay empty, as in Docker since CVE-2022-24769."""

    bounding: list[str]
    effective: list[str]
    permitted: list[str]

    @classmethod
    def all_of(cls, names: list[str]) -> Self:
        """The same capabilities in each set."""
        return cls(names, names, names)


class Rlimit(_Part, frozen=True):
    """One of `process.rlimits`."""

    type: str
    hard: int
    soft: int


class Process(_Part, frozen=True, kw_only=True):
    """`process`."""

    user: User
    args: list[str]
    env: list[str]
    cwd: str
    capabilities: Capabilities
    rlimits: list[Rlimit]
    terminal: bool = False
    no_new_privileges: bool = False


class Root(_Part, frozen=True):
    """`root`."""

    path: str
    readonly: bool = False


class Mount(_Part, frozen=True):
    """One of `mounts`."""

    destination: str
    type: str
    source: str
    options: list[str]


class Namespace(_Part, frozen=True):
    """One of `linux.namespaces`: a new namespace of a type."""

    type: str


class DeviceRule(_Part, frozen=True):
    """One of `linux.resources.devices`."""

    allow: bool
    access: str


class Resources(_Part, frozen=True):
    """`linux.resources`."""

    devices: list[DeviceRule]


class Linux(_Part, frozen=True):
    """`linux`."""

    resources: Resources
    namespaces: list[Namespace]
    masked_paths: list[str]
    readonly_paths: list[str]


class RuntimeConfig(_Part, frozen=True, kw_only=True):
    """The whole document."""

    oci_version: str = "1.0.2"
    process: Process
    root: Root
    hostname: str
    mounts: list[Mount]
    annotations: dict[str, str]
    linux: Linux
