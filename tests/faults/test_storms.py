"""Races without faults: every chunk many times at once, and many appends at once."""

from __future__ import annotations

import asyncio

import numpy as np

from tests.faults import network
from tests.faults.checker import check_burst
from tests.faults.client import APPENDS, Appender
from tests.faults.history import FIRST_TAG, History, digest, next_tag
from tests.faults.requests import WorkerClient, outputs_of
from tests.faults.run import RunOptions, deploy, new_seed

STREAMS, EACH, COPIES = 50, 20, 5
TIMEOUT_S = 30.0
OPTIONS = RunOptions("valkey")


async def test_chunk_that_is_sent_five_times_at_once_is_applied_once() -> None:
    seed = new_seed()

    async def send_stream(number: int, copies: list[WorkerClient]) -> None:
        random = np.random.default_rng((seed, number))
        state, tag, position, epochs = network.ZERO, FIRST_TAG, 0, set()
        for _ in range(EACH):
            rows = network.random_events(random, int(random.integers(1, 9)))
            documents = await asyncio.gather(
                *(copy.send(f"s{number}", rows, position, encoding="msgpack") for copy in copies)
            )
            assert sorted(each.pop("replayed") for each in documents) == [False] + [True] * 4
            assert documents[0].get("created", False) == (position == 0)
            assert all(each == documents[0] for each in documents)
            outputs = network.compute(state, rows)
            assert (outputs_of(documents[0]) == outputs).all()
            tag, state = next_tag(tag, position, digest(rows)), outputs[-1]
            position += len(rows)
            assert (documents[0]["tag"], documents[0]["position"]) == (tag.hex(), position)
            epochs.add(documents[0]["epoch"])
        assert len(epochs) == 1

    async with deploy(OPTIONS) as deployment:
        clients = [WorkerClient(port, TIMEOUT_S) for port in deployment.ports.values()]
        copies = [clients[copy % 2] for copy in range(COPIES)]
        await asyncio.gather(*(send_stream(number, copies) for number in range(STREAMS)))
        await asyncio.gather(*(client.close() for client in clients))


async def test_sixteen_concurrent_appends_are_all_applied() -> None:
    random = np.random.default_rng(new_seed())
    async with deploy(OPTIONS) as deployment:
        appender = Appender("all", deployment.ports, History(), random, TIMEOUT_S)
        for _ in range(10):
            burst = await appender.burst()
            assert (burst.unknown, len(burst.acks)) == (0, APPENDS)
            equal = [ack.sent.rows.tobytes() for ack in burst.acks]
            assert max(map(equal.count, equal)) >= APPENDS // 2
            assert not list(check_burst(burst))
        await appender.close()
