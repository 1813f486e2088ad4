"""Downloads of layers, end to end: how often, and for whom."""

from __future__ import annotations

import json
import random
from pathlib import Path

from guestpull_server.models import MiB
from support.daemon import Daemon
from support.faults import Corrupt
from support.images import file, image, layer
from support.simulator import RegistrySimulator


def test_a_transfer_that_was_altered_once_is_repeated_although_it_looks_like_a_bomb(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    contents = random.Random(1).randbytes(16 * MiB)  # more than is on its way when the worker gives up
    content = layer(file("contents", contents), compression="zstd")
    window = 5  # where the frame says how much of it must be kept in memory
    reference = registry.push("altered:1", image(content))
    registry.fault(content, Corrupt(at=(window + 0.5) / content.size), times=1)

    pulled = daemon.client.pull(reference, str(daemon.bundle("one")))

    assert Path(pulled.rootfs_path, "contents").read_bytes() == contents
    assert len(registry.requests_for(content)) == 2


def test_the_log_tells_whose_pull_downloaded_a_layer(disk: Path, registry: RegistrySimulator) -> None:
    reference = registry.push("told:1", image(layer(file("a")), layer(file("b"))))
    with Daemon(disk, options=("--log-format", "json")) as daemon:
        daemon.client.pull(reference, str(daemon.bundle("one")))

        events = [json.loads(line) for line in daemon.log.read_text().splitlines()]

    (pull,) = [one["request"] for one in events if one["event"] == "PullImage"]
    assert [one["request"] for one in events if one["event"] == "layer"] == [pull, pull]
