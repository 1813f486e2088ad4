"""Fixtures that every room's tests may use. What needs root and mounts is in tests/integration."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from support.commands import link_commands

# a slow machine is not a failure
settings.register_profile("guestpull", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("guestpull")


def pytest_configure(config: pytest.Config) -> None:
    """Let tests, and what they start, find only the commands that scripts/packages lists."""
    directory = tempfile.TemporaryDirectory(prefix="guestpull-commands-")
    config.add_cleanup(directory.cleanup)
    os.chmod(directory.name, 0o755)  # other users, whom some tests become, call them as well
    link_commands(Path(directory.name))
    os.environ["PATH"] = directory.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests first: what fails there explains what fails later."""
    items.sort(key=lambda item: "integration" in Path(item.path).parts)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Integration tests mount; without root they fail at once, rather than being skipped unseen."""
    if "integration" in Path(item.path).parts and os.geteuid() != 0:
        pytest.fail("integration tests need root: they mount file systems and unpack devices", pytrace=False)
