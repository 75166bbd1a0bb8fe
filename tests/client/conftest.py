"""A stand-in service with faults on demand, and a live service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from carry_client import Carry, Model, Stream
from service.commands.replay.send import StreamEvents
from tests.service.commands.replay.conftest import background, standin, streams, table
from tests.support.service import Service

__all__ = ["background", "standin", "streams", "table"]


@pytest.fixture
def model(background: str) -> Iterator[Model]:
    """The model of the stand-in."""
    with Carry(background, deadline_s=20) as carry:
        yield carry.model("small")


@pytest.fixture
def small(model: Model) -> Stream:
    """The stream `s` of the stand-in."""
    return model.stream("s")


@pytest.fixture
def events(streams: list[StreamEvents]) -> list[dict[str, object]]:
    """The 61 events of the stand-in's longest stream."""
    return max((stream.events(0, len(stream)) for stream in streams), key=len)


@pytest.fixture
def carry(service: Service) -> Iterator[Carry]:
    """A client of the shared live service."""
    with Carry(service.url) as up:
        yield up
