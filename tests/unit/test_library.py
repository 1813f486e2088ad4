"""The storage core as a library: what a program imports of it, and what that loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

import guestpull_server


def test_what_the_package_offers_is_there() -> None:
    for name in set(guestpull_server.__all__) - {"__version__"}:
        assert getattr(guestpull_server, name).__name__ == name


def test_another_name_is_told_to_be_none() -> None:
    with pytest.raises(AttributeError, match="Pullerr"):
        guestpull_server.Pullerr  # type: ignore[attr-defined]  # noqa: B018


def test_the_core_loads_no_grpc() -> None:
    program = "import sys; from guestpull_server import Puller; print('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
