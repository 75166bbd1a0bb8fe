"""Streams that go back: history and rewind by both clients, against a real application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from carry_client import AsyncCarry, Carry, errors
from models.artifact.artifact import Artifact
from models.spec.history import HistorySpec
from tests.service.conftest import artifact, pipeline_server
from tests.service.transports.v1.harness import harness, rows
from tests.service.transports.v1.raw_http import port_of, serving
from tests.support.servers import RealServer

__all__ = ["artifact", "pipeline_server"]

ROWS = rows(40)


@pytest.fixture
async def url(pipeline_server: RealServer, artifact: Artifact) -> AsyncIterator[str]:
    """A service that keeps the last 8 events of each stream."""
    history = HistorySpec(events=8)
    async with (
        harness(pipeline_server, {"probe": artifact}, history=history) as api,
        serving(api) as server,
    ):
        yield f"http://127.0.0.1:{port_of(server)}"


def use_rewind(url: str) -> None:
    with Carry(url) as carry:
        stream, twin = (carry.model("probe").stream(name) for name in "st")
        first, last = stream.send(ROWS[:4]), stream.send(ROWS[4:9])
        history = stream.history()
        assert (history.head, history.next, history.start) == (last.head, None, 0)
        assert history.available[-1][1] == 9
        np.testing.assert_array_equal(
            np.concatenate([chunk.events for chunk in history.chunks]), ROWS[:9]
        )
        part = stream.history(3, limit=2)
        assert [(chunk.position, len(chunk.events)) for chunk in part.chunks] == [(3, 1), (4, 1)]
        assert part.next == 5
        other = carry.model("probe").stream("s")
        other.refresh()

        head = stream.rewind(6)
        assert head == stream.head
        assert (head.position, head.epoch != first.head.epoch) == (6, True)
        twin.send(ROWS[:6])
        again, expected = stream.send(ROWS[20:23]), twin.send(ROWS[20:23])
        assert again.position == 9
        np.testing.assert_allclose(again.outputs["out"], expected.outputs["out"], atol=1e-6)
        with pytest.raises(errors.StateChanged):
            other.rewind(4)
        with pytest.raises(errors.StreamDiverged):
            other.send(ROWS[9:12])
        with pytest.raises(errors.PositionUnavailable) as rejection:
            stream.rewind(10)
        assert rejection.value.document["available"][-1][1] == 9
        assert stream.head == again.head


async def test_a_client_continues_where_it_rewound_to(url: str) -> None:
    await asyncio.to_thread(use_rewind, url)


async def test_the_asynchronous_client_continues_where_it_rewound_to(url: str) -> None:
    async with AsyncCarry(url) as carry:
        stream = carry.model("probe").stream("s")
        await stream.send(ROWS[:4])
        assert (await stream.rewind(2)).position == stream.position == 2
        assert (await stream.send(ROWS[2:4])).position == 4
        assert [chunk.position for chunk in (await stream.history()).chunks] == [0, 2]
