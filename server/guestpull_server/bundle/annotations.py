"""Converts the image's Labels, and fields without another place in config.json, to annotations (conversion.md).

Runtimes act on some annotations: crun opens the files that `run.oci.hooks.stdout` names and loads the libraries
of `run.oci.seccomp.plugins`, runc passes `org.systemd.property.*` to the host's systemd, Kata takes settings of
its hypervisor from `io.katacontainers.config.*`. An image must not control these, so labels with such names are
omitted, as conversion.md allows, and logged. The caller may set such annotations. (Docker and containerd
convert no labels, against the advice of conversion.md.)
"""

from __future__ import annotations

import logging
from typing import Final

import msgspec

from guestpull_server.models import ImageConfig

_log = logging.getLogger(__name__)

_PREFIX: Final = "org.opencontainers.image."

# The potentiallyUnsafeConfigAnnotations of `runc features` and `crun features`, and those that Kata, gVisor and
# libkrun read. A name that ends with a dot or a slash is a prefix.
_STEERING: Final = (
    "bundle",
    "cdi.k8s.io/",
    "dev.gvisor.",
    "io.katacontainers.",
    "io.kubernetes.cri-o.",
    "io.kubernetes.cri.",
    "io.kubernetes.docker.type",
    "io.kubernetes.sandbox.id",
    "krun.",
    "module.wasm.image/variant",
    "org.criu.config",
    "org.systemd.property.",
    "run.oci.",
)
_STEERING_PREFIXES: Final = tuple(name for name in _STEERING if name.endswith((".", "/")))
_MAX_LOGGED_LABELS: Final = 10


def annotations_of(config: ImageConfig, bundle_path: str) -> dict[str, str]:
    """The annotations of a container. Labels override fields; labels that control the runtime are omitted."""
    process = config.process
    fields = {
        "os": config.os,
        "architecture": config.architecture,
        "variant": config.variant,
        "os.version": config.os_version,
        "os.features": msgspec.json.encode(config.os_features).decode() if config.os_features else "",
        "author": config.author,
        "created": config.created,
        "stopSignal": process.stop_signal,
        "exposedPorts": ",".join(sorted(process.exposed_ports or {})),
    }
    annotations = {f"{_PREFIX}{name}": value for name, value in fields.items() if value}
    labels = process.labels or {}
    steering = sorted(filter(_steers, labels))
    if steering:
        names = ", ".join(steering[:_MAX_LOGGED_LABELS])
        more = ", …" if len(steering) > _MAX_LOGGED_LABELS else ""
        _log.warning(
            "omitted labels that would control the runtime",
            extra={"fields": {"bundle": bundle_path, "labels": names + more}},
        )
    return annotations | {name: value or "" for name, value in labels.items() if not _steers(name)}


def _steers(label: str) -> bool:
    return label in _STEERING or label.startswith(_STEERING_PREFIXES)
