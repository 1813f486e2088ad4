"""A registry simulator, and a client that is in a hurry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from guestpull_server.config import Configuration
from guestpull_server.registry import RegistryClient
from support.pulling import IMPATIENT, ClientOf, Pull
from support.simulator import RegistrySimulator


@pytest.fixture
def registry() -> Iterator[RegistrySimulator]:
    with RegistrySimulator() as simulator:
        yield simulator


@pytest.fixture
def client_of() -> Iterator[ClientOf]:
    with ExitStack() as closing:

        def make(**settings: Any) -> RegistryClient:
            client = RegistryClient(Configuration(**({"limits": IMPATIENT} | settings)))
            closing.callback(client.close)
            return client

        yield make


@pytest.fixture
def client(client_of: ClientOf) -> RegistryClient:
    return client_of()


@pytest.fixture
def pull(client: RegistryClient) -> Pull:
    return Pull(client)
