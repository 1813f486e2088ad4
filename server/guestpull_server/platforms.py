"""Platforms: how they are written, and which of them runs what was built for which."""

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
_LAST_CHOICE = 1_000_000  # farther than any variant
_VARIANT = re.compile(r"v([0-9]{1,4})")
_PLATFORM = re.compile(r"([a-z0-9_.-]+)/([a-z0-9_.-]+)(?:/([a-z0-9_.-]+))?")


@dataclass(frozen=True, slots=True)
class Platform:
    """An operating system and a CPU, in Go's words (GOOS, GOARCH, variant), as image indexes use them."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read `os/architecture[/variant]`.

        Raises:
            InvalidPlatform: it is not of that form.
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
        """Whether an image is for this platform, by what its config says: the one rule, wherever it comes from.

        Variants are not compared: configs leave them out, or have them wrong, more often than not. Those of old
        images leave the architecture out as well.
        """
        also = _ALSO_RUNS.get(self.architecture)
        return built_for.os == self.os and built_for.architecture in ("", self.architecture, also)

    def distance(self, offered: Platform) -> int | None:
        """How far an offered platform is from this one: 0 is the same; None cannot run, as far as it says.

        The exact variant is nearest, then the next older one; the 32-bit sibling is the last choice. Follows
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
        """How much older the variant of the same architecture is; None if it is newer, or no number."""
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
