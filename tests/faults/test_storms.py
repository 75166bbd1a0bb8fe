"""Races without faults: every chunk many times at once, and many appends at once."""

from __future__ import annotations

import asyncio
from functools import partial

import numpy as np

from carry_client import Retry
from tests.faults import network
from tests.faults.checker import check_burst
from tests.faults.client import APPENDS, Appender
from tests.faults.deployment import deploy
from tests.faults.history import FIRST_TAG, Chunk, History, next_tag
from tests.faults.options import RunOptions
from tests.faults.run import new_seed
from tests.faults.transports import V1

STREAMS, EACH = 50, 20
TIMEOUT_S = 30.0


async def test_chunk_that_is_sent_five_times_at_once_is_applied_once() -> None:
    seed = new_seed()

    async def send_stream(number: int, copies: list[V1]) -> None:
        random = np.random.default_rng((seed, number))
        state, tag, position, epochs = network.ZERO, FIRST_TAG, 0, set()
        for _ in range(EACH):
            rows = network.random_events(random, int(random.integers(1, 9)))
            chunk = Chunk(f"s{number}", position, rows)
            documents = await asyncio.gather(
                # a busy machine may reject some of them
                *(Retry(TIMEOUT_S).run_async(partial(copy.send, chunk)) for copy in copies)
            )
            assert sorted(each.pop("replayed") for each in documents) == [False] + [True] * 4
            assert documents[0].get("created", False) == (position == 0)
            assert all(each == documents[0] for each in documents)
            outputs = network.compute(state, rows)
            assert (np.asarray(documents[0]["outputs"][network.OUTPUT]) == outputs).all()
            tag, state = next_tag(tag, position, chunk.digest), outputs[-1]
            position += len(rows)
            assert (documents[0]["tag"], documents[0]["position"]) == (tag.hex(), position)
            epochs.add(documents[0]["epoch"])
        assert len(epochs) == 1

    async with deploy(RunOptions("valkey", transports=("msgpack",))) as deployment:
        proxies = deployment.traffic.proxies
        one, other = (V1(f"http://127.0.0.1:{proxy.port}", "msgpack") for proxy in proxies)
        try:
            copies = [one, other, one, other, one]
            await asyncio.gather(*(send_stream(number, copies) for number in range(STREAMS)))
        finally:
            await asyncio.gather(one.close(), other.close())


async def test_sixteen_concurrent_appends_are_all_applied() -> None:
    random = np.random.default_rng(new_seed())
    async with deploy(RunOptions("valkey", timeout_s=TIMEOUT_S)) as deployment:
        appender = Appender("all", deployment.clients, History(), random)
        for _ in range(10):
            burst = await appender.burst()
            assert (burst.unknown, len(burst.acks)) == (0, APPENDS)
            equal = [ack.chunk.rows.tobytes() for ack in burst.acks]
            assert max(map(equal.count, equal)) >= APPENDS // 2
            assert not list(check_burst(burst))
