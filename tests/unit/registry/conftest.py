"""A registry simulator, a client, and what no test is to know of the machine that it runs on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from guestpull_server.cancellation import Cancellation
from guestpull_server.config import Configuration
from guestpull_server.registry import RegistryClient
from support.pulling import IMPATIENT, PATIENT, ClientOf, Pull
from support.simulator import RegistrySimulator
from support.waiting import PATIENCE


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test has the proxies that it sets, and not those of whoever started it."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def registry() -> Iterator[RegistrySimulator]:
    with RegistrySimulator() as simulator:
        yield simulator


@pytest.fixture
def client_of() -> Iterator[ClientOf]:
    with ExitStack() as closing:

        def make(**settings: Any) -> RegistryClient:
            client = RegistryClient(Configuration(**({"limits": PATIENT} | settings)))
            closing.callback(client.close)
            return client

        yield make


@pytest.fixture
def client(client_of: ClientOf) -> RegistryClient:
    return client_of()


@pytest.fixture
def impatient_pull(client_of: ClientOf) -> Pull:
    """A pull that soon gives a silent registry up, and ends in any case."""
    return Pull(client_of(limits=IMPATIENT), Cancellation("pull", time.monotonic() + PATIENCE))


@pytest.fixture
def pull(client: RegistryClient) -> Pull:
    return Pull(client)
