"""What an access key, its limits and a rejection cost on the fast path, in Python calls.

No noise touches them.

Calls of functions in `service/` are counted while chunks of different streams arrive together.
A service keeps its goodput under overload because it spends little on the chunks that it rejects.
What a chunk costs in all is bounded by `tests/bench/test_sections.py`.

    pytest tests/service/transports/v1/test_chunk_cost.py -s
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType

import pytest

from service.access.limits import KeyLimits
from tests.service.transports.v1.harness import harness
from tests.service.transports.v1.raw_http import (
    HOST,
    INPUTS,
    answer,
    chunk,
    port_of,
    request,
    serving,
)
from tests.support.pages import ROOT
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer

TOGETHER = 64
"""Chunks that arrive together."""

LIMIT_CALLS = 5.0
"""Measured further calls of a chunk whose key has rates, a number of concurrent requests and a
quota; none of them reaches the store."""

REJECTED_CALLS = 16.0
"""Measured calls of a rejected chunk."""

SLACK = 1.05
WARM_UP_ROUNDS = 3
ROUNDS = 20
SERVICE = str(ROOT / "service")


@contextmanager
def counting(counts: list[int]) -> Iterator[None]:
    """Count the calls of functions in `service/`."""
    monitoring = sys.monitoring  # type: ignore[attr-defined, unused-ignore]
    tool, start = monitoring.PROFILER_ID, monitoring.events.PY_START

    def count(code: CodeType, offset: int) -> object:
        if not code.co_filename.startswith(SERVICE):
            return monitoring.DISABLE
        counts[0] += 1
        return None

    monitoring.use_tool_id(tool, "chunk cost")
    monitoring.register_callback(tool, start, count)
    monitoring.set_events(tool, start)
    try:
        yield
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)
        monitoring.restart_events()


async def send_rounds(port: int, together: int, status: int = 200, *lines: str) -> float:
    """Send rounds of chunks that arrive together; returns the calls per chunk of the cheapest.

    Others have what the service does once a second, such as its check of every open connection, and
    on a busy machine more of them.

    Args:
        status: of every response; only a chunk with 200 moves its stream.
        lines: further header lines of each request.
    """
    connections = [await asyncio.open_connection(HOST, port) for _ in range(together)]
    calls, rounds = [0], []

    async def send(number: int) -> None:
        body = chunk(number * len(INPUTS) if status == 200 else 0)
        for index, (_, writer) in enumerate(connections):
            writer.write(request(body, *lines, stream=f"s{together}-{index}"))
        for reader, _ in connections:
            response = await answer(reader)
            assert response.startswith(b"HTTP/1.1 %d" % status), response

    for number in range(WARM_UP_ROUNDS):
        await send(number)
    with counting(calls):
        for number in range(WARM_UP_ROUNDS, WARM_UP_ROUNDS + ROUNDS):
            calls[0] = 0
            await send(number)
            rounds.append(calls[0])
    for _, writer in connections:
        writer.close()
        await writer.wait_closed()
    return min(rounds) / together


needs_monitoring = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="sys.monitoring is new in Python 3.12"
)


@needs_monitoring
async def test_checking_an_access_key_costs_no_calls(
    pipeline_server: RealServer, tmp_path: Path
) -> None:
    models, together = {"probe": make_artifact(tmp_path)}, TOGETHER
    async with harness(pipeline_server, models) as api, serving(api) as server:
        without = await send_rounds(port_of(server), together)
    async with harness(pipeline_server, models, requires_keys=True) as api, serving(api) as server:
        line = f"Authorization: {await api.key(models=('pro*',), prefix='s')}"
        checked = await send_rounds(port_of(server), together, 200, line)
    print(f"calls per chunk: {checked:.1f} with an access key, {without:.1f} without")
    assert checked <= SLACK * without


@needs_monitoring
async def test_limits_of_a_key_add_few_calls_to_a_chunk(
    pipeline_server: RealServer, tmp_path: Path
) -> None:
    models, calls = {"probe": make_artifact(tmp_path)}, list[float]()
    limits = KeyLimits(
        requests_per_s=1e6, events_per_s=1e7, concurrent_requests=10_000, streams=10_000
    )
    for each in (None, limits):
        async with (
            harness(pipeline_server, models, requires_keys=True) as api,
            serving(api) as server,
        ):
            line = f"Authorization: {await api.key(limits=each)}"
            calls.append(await send_rounds(port_of(server), TOGETHER, 200, line))
    print(f"calls per chunk: {calls[1]:.1f} with limits, {calls[0]:.1f} without")
    assert calls[1] - calls[0] <= LIMIT_CALLS + 1


@needs_monitoring
async def test_rejected_chunk_costs_a_fraction_of_a_served_one(
    pipeline_server: RealServer, tmp_path: Path
) -> None:
    models, together = {"probe": make_artifact(tmp_path)}, TOGETHER
    calls = {}
    for status, options in ((200, {}), (429, {"max_queue": 0})):
        async with harness(pipeline_server, models, **options) as api, serving(api) as server:
            calls[status] = await send_rounds(port_of(server), together, status)
    print(f"calls of a rejected chunk: {calls[429]:.1f}, of a served one: {calls[200]:.1f}")
    assert calls[429] <= SLACK * REJECTED_CALLS
