"""Races without faults: every chunk many times at once, and many appends at once."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import uvloop

from tests.faults import network
from tests.faults.appender import CHUNKS, Appender
from tests.faults.episodes import check_episode
from tests.faults.http import MSGPACK, Line, chunk_body
from tests.faults.records import History, digest, next_tag
from tests.faults.run import Course, new_seed, own_folder, scene
from tests.faults.verdict import Verdict

STREAMS, EACH, COPIES = 50, 20, 5
TIMEOUT_S = 30.0
QUIET = Course("valkey", seed=0, events=0, faults=0)


def test_a_chunk_that_is_sent_five_times_at_once_is_applied_once() -> None:
    seed = new_seed()
    print(f"seed {seed}")

    async def storm() -> None:
        async with own_folder() as folder, scene(QUIET, folder) as on:
            ports = [on.ways[worker] for worker in ("a", "b", "a", "b", "a")]
            await asyncio.gather(*(one_stream(number, ports) for number in range(STREAMS)))

    async def one_stream(number: int, ports: list[int]) -> None:
        random = np.random.default_rng((seed, number))
        lines = [Line(port) for port in ports]
        reference = network.Reference()
        state, tag, position, epochs = reference.zero(), bytes(16), 0, set()
        for _ in range(EACH):
            rows = network.random_events(random, int(random.integers(1, 9)))
            body = chunk_body(rows, position, MSGPACK)
            answers = await asyncio.gather(
                *(
                    line.ask("POST", f"s{number}", body=body, media=MSGPACK, timeout_s=TIMEOUT_S)
                    for line in lines
                )
            )
            assert [status for status, _ in answers] == [200] * COPIES, answers
            documents: list[dict[str, Any]] = [document for _, document in answers]
            assert sorted(each.pop("replayed") for each in documents) == [False] + [True] * 4
            assert documents[0].get("created", False) == (position == 0)
            assert all(each == documents[0] for each in documents)
            expected = reference.outputs(state, rows)
            assert (np.asarray(documents[0]["outputs"][network.OUTPUT]) == expected).all()
            tag = next_tag(tag, position, digest(rows))
            position += len(rows)
            state = expected[-1]
            assert documents[0]["tag"] == tag.hex()
            assert documents[0]["position"] == position
            epochs.add(documents[0]["epoch"])
        assert len(epochs) == 1
        for line in lines:
            line.drop()

    assert STREAMS * EACH == 1000
    uvloop.run(storm())


def test_sixteen_appends_at_once_are_all_applied() -> None:
    seed = new_seed()
    print(f"seed {seed}")

    async def storm() -> None:
        async with own_folder() as folder, scene(QUIET, folder) as on:
            random = np.random.default_rng(seed)
            appender = Appender("all", on.ways, History(), random, TIMEOUT_S)
            for _ in range(10):
                episode = await appender.episode()
                assert (episode.unknown, len(episode.acks)) == (0, CHUNKS)
                equal = [ack.rows.tobytes() for ack in episode.acks]
                assert max(map(equal.count, equal)) >= CHUNKS // 2
                verdict = Verdict()
                check_episode(episode, [], network.Reference(), verdict)
                assert not verdict.findings
            appender.close()

    uvloop.run(storm())
