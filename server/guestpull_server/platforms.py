"""Platforms: parsing, and which platform runs images built for which."""

from __future__ import annotations

import platform as host_platform
import re
from dataclasses import dataclass

from guestpull_server.errors import InvalidPlatform

_MACHINES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
    "i386": ("386", ""),
    "ppc64le": ("ppc64le", ""),
    "s390x": ("s390x", ""),
    "riscv64": ("riscv64", ""),
    "loongarch64": ("loong64", ""),
}
_DEFAULT_VARIANTS = {"arm64": "v8", "arm": "v7", "amd64": "v1"}
_ALSO_RUNS = {"arm64": "arm", "amd64": "386"}
_LAST_CHOICE = 1_000_000  # greater than the distance of any variant
_VARIANT = re.compile(r"v([0-9]{1,4})")
_PLATFORM = re.compile(r"([a-z0-9_.-]+)/([a-z0-9_.-]+)(?:/([a-z0-9_.-]+))?")


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system and a CPU with Go's names (GOOS, GOARCH, variant), as in image indexes."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Parse `os/architecture[/variant]`.

        Raises:
            InvalidPlatform: the text does not have that form.
        """
        match = _PLATFORM.fullmatch(text)
        if match is None:
            raise InvalidPlatform(text)
        return cls(match[1], match[2], match[3] or "")

    @classmethod
    def host(cls) -> Platform:
        """The platform that this process runs on."""
        machine = host_platform.machine()
        architecture, variant = _MACHINES.get(machine, (machine, ""))
        return cls("linux", architecture, variant)

    def runs(self, built_for: Platform) -> bool:
        """Whether this platform runs an image, given the platform in its config.

        Variants are not compared, because most configs omit them or have them wrong. Configs of old images also
        omit the architecture.
        """
        sibling = _ALSO_RUNS.get(self.architecture)
        return built_for.os == self.os and built_for.architecture in ("", self.architecture, sibling)

    def distance(self, offered: Platform) -> int | None:
        """The distance of an offered platform to this one: 0 if they are the same, None if it cannot run here.

        The same variant is nearest, then the next older one; the 32-bit sibling is the last choice. Follows
        containerd's `platforms.Only`.
        """
        if offered.os != self.os:
            return None
        if offered.architecture == self.architecture:
            return self._steps_down_to(offered)
        if offered.architecture != _ALSO_RUNS.get(self.architecture):
            return None
        newest = Platform(self.os, offered.architecture, "v8" if offered.architecture == "arm" else "")
        steps = newest._steps_down_to(offered)
        return None if steps is None else _LAST_CHOICE + steps

    def _steps_down_to(self, offered: Platform) -> int | None:
        """By how many versions the offered variant is older; None if it is newer or not a number."""
        default = _DEFAULT_VARIANTS.get(self.architecture, "")
        ours, theirs = self.variant or default, offered.variant or default
        if ours == theirs:
            return 0
        here, there = _VARIANT.fullmatch(ours), _VARIANT.fullmatch(theirs)
        if here is None or there is None or int(there[1]) > int(here[1]):
            return None
        return int(here[1]) - int(there[1])

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)
