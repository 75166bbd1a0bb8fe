"""Races without faults: every chunk many times at once, and many appends at once."""

from __future__ import annotations

import asyncio

import numpy as np
import uvloop

from tests.faults import network
from tests.faults.appends import CHUNKS, Appender, check_burst
from tests.faults.records import History, digest, next_tag
from tests.faults.requests import WorkerClient, outputs_of
from tests.faults.result import CheckResult
from tests.faults.run import RunOptions, deploy, new_seed, temporary_folder

STREAMS, EACH, COPIES = 50, 20, 5
TIMEOUT_S = 30.0
OPTIONS = RunOptions("valkey", seed=0, events=0, faults=0)


def test_chunk_that_is_sent_five_times_at_once_is_applied_once() -> None:
    seed = new_seed()
    print(f"seed {seed}")

    async def storm() -> None:
        async with temporary_folder() as folder, deploy(OPTIONS, folder) as deployment:
            clients = [WorkerClient(port, TIMEOUT_S) for port in deployment.ports.values()]
            copies = [clients[copy % 2] for copy in range(COPIES)]
            await asyncio.gather(*(one_stream(number, copies) for number in range(STREAMS)))
            await asyncio.gather(*(client.close() for client in clients))

    async def one_stream(number: int, copies: list[WorkerClient]) -> None:
        random = np.random.default_rng((seed, number))
        reference = network.Reference()
        state, tag, position, epochs = reference.zero(), bytes(16), 0, set()
        for _ in range(EACH):
            rows = network.random_events(random, int(random.integers(1, 9)))
            documents = await asyncio.gather(
                *(copy.send(f"s{number}", rows, position, encoding="msgpack") for copy in copies)
            )
            assert sorted(each.pop("replayed") for each in documents) == [False] + [True] * 4
            assert documents[0].get("created", False) == (position == 0)
            assert all(each == documents[0] for each in documents)
            expected = reference.outputs(state, rows)
            assert (outputs_of(documents[0]) == expected).all()
            tag = next_tag(tag, position, digest(rows))
            position += len(rows)
            state = expected[-1]
            assert documents[0]["tag"] == tag.hex()
            assert documents[0]["position"] == position
            epochs.add(documents[0]["epoch"])
        assert len(epochs) == 1

    assert STREAMS * EACH == 1000
    uvloop.run(storm())


def test_sixteen_concurrent_appends_are_all_applied() -> None:
    seed = new_seed()
    print(f"seed {seed}")

    async def storm() -> None:
        async with temporary_folder() as folder, deploy(OPTIONS, folder) as deployment:
            random = np.random.default_rng(seed)
            appender = Appender("all", deployment.ports, History(), random, TIMEOUT_S)
            for _ in range(10):
                burst = await appender.burst()
                assert (burst.unknown, len(burst.acks)) == (0, CHUNKS)
                equal = [ack.rows.tobytes() for ack in burst.acks]
                assert max(map(equal.count, equal)) >= CHUNKS // 2
                result = CheckResult()
                check_burst(burst, [], network.Reference(), result)
                assert not result.findings
            await appender.close()

    uvloop.run(storm())
