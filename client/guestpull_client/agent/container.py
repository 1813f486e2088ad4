"""Runs one container whose image is pulled in the guest.

The container's bundle is `/run/kata-containers/<container id>`. The service pulls the image into it: it mounts
rootfs and writes config.json. The agent merges the request's specification into config.json and runs the
container with the runtime. It releases the bundle when the container exits, when a step fails, and when a
signal arrives.
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
"""Kata's directory of bundles, each named after its container id."""

_SETTLE_SECONDS: Final = 0.2  # time for the service to notice a cancelled pull


@dataclass(frozen=True, slots=True)
class Container:
    """The container to run. `specification` uses the runtime specification's names and may be incomplete."""

    container_id: str
    image: str
    specification: JsonObject = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to pull and run a container."""

    auth: str = field(default="", repr=False)
    policy: PullPolicy = PullPolicy.UNSPECIFIED
    platform: str = ""
    runtime: str = "runc"
    bundle_root: str = CONTAINER_BASE
    pause_bundle: str = PAUSE_BUNDLE
    stop_seconds: float = 10.0
    keep: bool = False
    report_time: Callable[[str], None] | None = None
    """Called with the time of each step, if not None."""


def run_container(client: Client, container: Container, options: RunOptions) -> int:
    """Run a container until it exits, and return its exit status, or 128 + n if signal n arrives before it runs.

    Call this in the main thread, where Python handles signals.

    Raises:
        GuestpullError: the container could not be started; its bundle is released.
    """
    signals = Signals()
    started = time.monotonic()

    def report(step: str) -> None:
        if options.report_time is not None:
            options.report_time(f"{step} {(time.monotonic() - started) * 1000:.0f} ms")

    with signals.installed():
        try:
            with _bundle(client, container, options, signals) as (bundle, specification):
                report("pulled in")
                process = part(specification, "process")
                terminal = process.get("terminal") is True and is_terminal(sys.stdin)
                process["terminal"] = terminal
                write_specification(bundle, specification)
                status = Runtime(options.runtime, options.stop_seconds).run(
                    container.container_id,
                    bundle,
                    signals,
                    terminal=terminal,
                    on_start=(lambda: report("running after")) if options.report_time is not None else None,
                )
                report("ended after")
                return status
        except Interrupted as interruption:
            return 128 + interruption.number


@contextmanager
def _bundle(
    client: Client, container: Container, options: RunOptions, signals: Signals
) -> Iterator[tuple[str, JsonObject]]:
    """Create the container's bundle, and yield it with the merged specification; release it afterwards."""
    bundle = os.path.join(os.path.abspath(options.bundle_root), container.container_id)
    if os.path.lexists(os.path.join(bundle, CONFIG)):
        raise AlreadyExists(
            f"container {container.container_id} exists: {bundle} contains {CONFIG}. "
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
            _release_interrupted_pull(client, bundle, signals)
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


def _release_interrupted_pull(client: Client, bundle: str, signals: Signals) -> None:
    """Release the bundle of a pull that the service may have finished before it noticed the cancellation."""
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
    """Run the pause image's process and ignore the request's, as Kata's `get_process` does."""
    try:
        rootfs = unpack_pause_image(options.pause_bundle, bundle)
        pause = read_specification(bundle)
        specification = merged_specification(container.specification, pause, rootfs)
        yield bundle, specification | {"process": part(pause, "process")}
    finally:
        signals.ignore()
        if not options.keep:
            shutil.rmtree(bundle, ignore_errors=True)
