"""Sets up a pod's sandbox container from the guest's own pause image (Kata's `unpack_pause_image`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Final

from guestpull_client.agent.files import read_specification
from guestpull_client.agent.spec import part, texts
from guestpull_client.errors import FailedPrecondition

PAUSE_BUNDLE: Final = "/pause_bundle"
"""The pause bundle of a Kata guest image."""

_CONTAINER_TYPES: Final = ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType")


def is_sandbox(metadata: Mapping[str, object]) -> bool:
    """Whether an image's metadata or a specification's annotations describe a sandbox."""
    return any(metadata.get(key) == "sandbox" for key in _CONTAINER_TYPES)


def unpack_pause_image(pause_bundle: str, bundle: str) -> str:
    """Copy config.json and the program of the guest's pause bundle; return the path of the rootfs.

    Raises:
        FailedPrecondition: the pause bundle is missing or unusable.
    """
    specification = read_specification(pause_bundle)
    arguments = texts(part(specification, "process"), "args")
    if not arguments:
        raise _missing(pause_bundle, "its config.json has no arguments")
    program = os.path.normpath(arguments[0]).lstrip("/")
    rootfs = os.path.join(bundle, "rootfs")
    copy = os.path.join(rootfs, program)
    if program.startswith(".."):
        raise _missing(pause_bundle, f"its program is {arguments[0]!r}")
    try:
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        shutil.copy(os.path.join(pause_bundle, "config.json"), bundle)
        shutil.copy(os.path.join(pause_bundle, "rootfs", program), copy)
    except OSError as error:
        raise _missing(pause_bundle, f"{error.filename}: {error.strerror}") from None
    return rootfs


def _missing(pause_bundle: str, problem: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"Cannot use the pause image {pause_bundle}: {problem}. "
        "Name the guest's pause bundle with --pause-bundle.",
        "NO_PAUSE_IMAGE",
        {"pause_bundle": pause_bundle},
    )
