"""A Valkey for the tests of a module, and a broker of Kafka for each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.kafka import Broker, running_broker
from tests.support.servers import RealServer, emptied, real_server


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    """One server for all tests of a module."""
    with real_server("valkey") as running:
        yield running


@pytest.fixture
def client(server: RealServer) -> Iterator[Any]:
    """A client of the server, which is empty."""
    with emptied(server).client() as client:
        yield client


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A broker without topics."""
    with running_broker() as broker:
        yield broker
