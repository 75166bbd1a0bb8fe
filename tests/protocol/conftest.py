"""One Valkey for all that is held against the scripts; each comparison empties it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.servers import RealServer, real_server


@pytest.fixture(scope="session")
def valkey() -> Iterator[RealServer]:
    """A running Valkey."""
    with real_server("valkey") as running:
        yield running
