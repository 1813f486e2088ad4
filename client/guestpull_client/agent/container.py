"""The story of a container whose image is pulled in the guest.

`/run/kata-containers/<container id>` is its bundle. The service pulls the image into it: it mounts rootfs and
writes config.json. The request's specification is merged with that one, the runtime runs it, and when it has
ended, or when anything failed or a signal came, the bundle is released.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from guestpull_client.agent.files import CONFIG, read_specification, write_specification
from guestpull_client.agent.merge import merged_specification
from guestpull_client.agent.pause import PAUSE_BUNDLE, is_sandbox, unpack_pause_image
from guestpull_client.agent.runtime import Runtime
from guestpull_client.agent.signals import Interrupted, Signals
from guestpull_client.agent.spec import JsonObject, part
from guestpull_client.errors import AlreadyExists, GuestpullError, NotFound
from guestpull_client.models import PullPolicy
from guestpull_client.text import is_terminal

if TYPE_CHECKING:
    from guestpull_client.client import Client

CONTAINER_BASE: Final = "/run/kata-containers"
"""Kata's: a container's bundle is the directory of its id in here."""

_SETTLE_SECONDS: Final = 0.2  # in which a service notices that a pull's caller has gone


@dataclass(frozen=True, slots=True)
class Container:
    """What is asked for. `specification` has the runtime specification's names, and may leave parts out."""

    container_id: str
    image: str
    specification: JsonObject = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How it is run."""

    auth: str = field(default="", repr=False)
    policy: PullPolicy = PullPolicy.UNSPECIFIED
    platform: str = ""
    runtime: str = "runc"
    bundle_root: str = CONTAINER_BASE
    pause_bundle: str = PAUSE_BUNDLE
    stop_seconds: float = 10.0
    keep: bool = False
    told: Callable[[str], None] | None = None
    """Called with what took how long, where that is wanted."""


def run_container(client: Client, container: Container, options: RunOptions) -> int:
    """Run a container to its end, in the main thread; returns its exit status, 128 + n where signal n came first.

    Raises:
        GuestpullError: it could not be started; nothing of it is left.
    """
    signals = Signals()
    started = time.monotonic()

    def tell(what: str) -> None:
        if options.told is not None:
            options.told(f"{what} {(time.monotonic() - started) * 1000:.0f} ms")

    with signals.heard():
        try:
            with _bundle(client, container, options, signals) as (bundle, specification):
                tell("pulled in")
                process = part(specification, "process")
                terminal = process.get("terminal") is True and is_terminal(sys.stdin)
                process["terminal"] = terminal
                write_specification(bundle, specification)
                status = Runtime(options.runtime, options.stop_seconds).run(
                    container.container_id,
                    bundle,
                    signals,
                    terminal=terminal,
                    running=(lambda: tell("running after")) if options.told is not None else None,
                )
                tell("ended after")
                return status
        except Interrupted as interruption:
            return 128 + interruption.number


@contextmanager
def _bundle(
    client: Client, container: Container, options: RunOptions, signals: Signals
) -> Iterator[tuple[str, JsonObject]]:
    """The container's bundle and its merged specification; released at the end of the block."""
    bundle = os.path.join(os.path.abspath(options.bundle_root), container.container_id)
    if os.path.lexists(os.path.join(bundle, CONFIG)):
        raise AlreadyExists(
            f"container {container.container_id} exists: {bundle} holds a {CONFIG}. "
            "Choose another id, or release that bundle first (guestpull release).",
            "CONTAINER_EXISTS",
            {"bundle_path": bundle},
        )
    if is_sandbox(container.metadata) or is_sandbox(part(container.specification, "annotations")):
        yield from _pause_bundle(bundle, container, options, signals)
    else:
        yield from _pulled_bundle(client, bundle, container, options, signals)


def _pulled_bundle(
    client: Client, bundle: str, container: Container, options: RunOptions, signals: Signals
) -> Iterator[tuple[str, JsonObject]]:
    try:
        pulled = client.pull(
            container.image, bundle, auth=options.auth, policy=options.policy, platform=options.platform
        )
    except BaseException as error:
        if not isinstance(error, GuestpullError):
            _release_what_came_too_late(client, bundle, signals)
        raise
    try:
        yield (
            bundle,
            merged_specification(container.specification, read_specification(bundle), pulled.rootfs_path),
        )
    finally:
        signals.ignore()
        if not options.keep:
            client.release_bundle(bundle)


def _release_what_came_too_late(client: Client, bundle: str, signals: Signals) -> None:
    """After a signal: the service may have finished the pull before it heard that nobody waits for it."""
    signals.ignore()
    with suppress(NotFound):
        client.release_bundle(bundle)
        return
    time.sleep(_SETTLE_SECONDS)
    with suppress(NotFound):
        client.release_bundle(bundle)


def _pause_bundle(
    bundle: str, container: Container, options: RunOptions, signals: Signals
) -> Iterator[tuple[str, JsonObject]]:
    """The guest's pause image: its process is the container's, whatever the request says (`get_process`)."""
    try:
        rootfs = unpack_pause_image(options.pause_bundle, bundle)
        pause = read_specification(bundle)
        specification = merged_specification(container.specification, pause, rootfs)
        yield bundle, specification | {"process": part(pause, "process")}
    finally:
        signals.ignore()
        if not options.keep:
            shutil.rmtree(bundle, ignore_errors=True)
