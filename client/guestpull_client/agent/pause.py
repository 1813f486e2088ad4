"""A pod's sandbox container: its image is not pulled, the guest brings it (Kata's `unpack_pause_image`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Final

from guestpull_client.agent.files import read_specification
from guestpull_client.agent.spec import part, texts
from guestpull_client.errors import FailedPrecondition

PAUSE_BUNDLE: Final = "/pause_bundle"
"""Where a Kata guest image has it."""

_CONTAINER_TYPES: Final = ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType")


def is_sandbox(metadata: Mapping[str, object]) -> bool:
    """Whether the image's metadata, or a specification's annotations, say so."""
    return any(metadata.get(key) == "sandbox" for key in _CONTAINER_TYPES)


def unpack_pause_image(pause_bundle: str, bundle: str) -> str:
    """Copy the guest's pause bundle, its config.json and its one program; returns the rootfs.

    Raises:
        FailedPrecondition: the guest has no usable one.
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
        f"the pause image {pause_bundle} cannot be used: {problem}. "
        "A sandbox needs the guest's own; name it with --pause-bundle.",
        "NO_PAUSE_IMAGE",
        {"pause_bundle": pause_bundle},
    )
