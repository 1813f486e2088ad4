"""What conversion.md makes annotations of: the image's Labels, and fields that have no other place.

A label is the image's, and a runtime acts upon some annotations: crun opens the files that `run.oci.hooks.stdout`
names and loads the libraries of `run.oci.seccomp.plugins`, runc hands `org.systemd.property.*` to the machine's
systemd, Kata takes a hypervisor's settings from `io.katacontainers.config.*`. No image may decide that, so labels
of such names are left out, as conversion.md allows, and the log says which. (Docker and containerd make no label
an annotation, which conversion.md advises against.) The caller may set them: they are the pod's to decide.
"""

from __future__ import annotations

import logging
from typing import Final

import msgspec

from guestpull_server.models import ImageConfig

_log = logging.getLogger(__name__)

_PREFIX: Final = "org.opencontainers.image."

# What runtimes themselves declare (potentiallyUnsafeConfigAnnotations of `runc features` and `crun features`), and
# what Kata, gVisor and libkrun read. A name that ends with a dot or a slash stands for all that begin with it.
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
_MOST_TOLD: Final = 10


def annotations_of(config: ImageConfig, bundle_path: str) -> dict[str, str]:
    """The annotations of a container: labels win over fields, those that would steer its runtime are left out."""
    process = config.process
    said = {
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
    annotations = {f"{_PREFIX}{name}": value for name, value in said.items() if value}
    labels = process.labels or {}
    steering = sorted(filter(_steers, labels))
    if steering:
        told = ", ".join(steering[:_MOST_TOLD]) + (", …" if len(steering) > _MOST_TOLD else "")
        _log.warning(
            "labels that would steer the runtime are no annotations",
            extra={"fields": {"bundle": bundle_path, "labels": told}},
        )
    return annotations | {name: value or "" for name, value in labels.items() if not _steers(name)}


def _steers(label: str) -> bool:
    return label in _STEERING or label.startswith(_STEERING_PREFIXES)
