"""Versions of a model in a real service of two workers, switched under load on every transport."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from carry_client import AsyncCarry, Problem
from models.artifact.artifact import load_artifact
from tests.faults.history import Chunk
from tests.faults.network import MODEL, OUTPUT, ZERO, compute, random_events, write
from tests.faults.transports import ALWAYS, TRANSPORTS
from tests.support.servers import until_async
from tests.support.service import running

GAINS = (1, 2, 3)
"""The outputs of each version are so many times those of the first: whole numbers, exact in
float32, so that an output names the version, and an event that it has not seen changes it."""
PACE_S = 0.02
"""Pause between chunks of a stream, whose events all have to fit into its history."""

PATIENT = {
    "CARRY_STORE_WAIT_S": "120",
    "CARRY_TIMEOUT_S": "120",
    "CARRY_INFERENCE_TIMEOUT_S": "120",
    "CARRY_MAX_QUEUE_WAIT_S": "120",
}
"""Settings with which no request fails on a machine that suspends a process."""


class Feeder:
    """Sends chunks to one stream and checks that each is answered, exactly, by one version."""

    def __init__(self, transport: Any, stream: str, seed: int):
        self._transport = transport
        self._stream = stream
        self._random = np.random.default_rng(seed)
        self.answers: list[int] = []

    async def run(self, is_stopped: Callable[[], bool]) -> None:
        start, state = 0, ZERO
        while not is_stopped():
            rows = random_events(self._random, int(self._random.integers(1, 4)))
            expected = compute(state, rows)
            chunk = Chunk(self._stream, start, rows)
            members = await self._transport.send(chunk, ALWAYS)
            outputs = np.asarray(members["outputs"][OUTPUT], np.float32).reshape(expected.shape)
            exact = [gain for gain in GAINS if np.array_equal(outputs, gain * expected)]
            assert len(exact) == 1, (self._stream, start, outputs, expected)
            self.answers += exact
            start, state = start + len(rows), expected[-1]
            assert members["position"] == start
            await asyncio.sleep(PACE_S)


async def test_switches_under_load_fail_no_request_and_stay_exact(tmp_path: Path) -> None:
    models = tmp_path / "models"
    write(models, f"{MODEL}/a")
    with running(
        tmp_path,
        models,
        "--workers",
        "2",
        CARRY_HISTORY_EVENTS="65536",
        CARRY_GRPC_PORT="0",
        **PATIENT,
    ) as service:
        write(models, f"{MODEL}/b", gain=2)
        write(models, f"{MODEL}/c", gain=3)
        versions = [load_artifact(models / MODEL / name).version for name in "abc"]
        names = ("json", "msgpack", "v2-binary", "websocket", "grpc", "grpc-stream")
        urls = {name: service.grpc_address() if "grpc" in name else service.url for name in names}
        transports = [TRANSPORTS[name](urls[name]) for name in names]
        is_stopped = False
        feeders = [
            Feeder(transport, f"{names[at]}-{number}", 10 * at + number)
            for at, transport in enumerate(transports)
            for number in range(2)
        ]
        async with AsyncCarry(service.url) as carry, asyncio.TaskGroup() as feeding:
            running_feeders = [
                feeding.create_task(each.run(lambda: is_stopped)) for each in feeders
            ]

            async def until_answered_by(gains: set[int]) -> None:
                """Wait until the newest answers of all streams are of all these versions."""
                seen = [len(each.answers) for each in feeders]
                while True:
                    newest = [
                        each.answers[since:] for each, since in zip(feeders, seen, strict=True)
                    ]
                    if all(newest) and {answers[-1] for answers in newest} == gains:
                        return
                    if any(each.done() for each in running_feeders):
                        return
                    await asyncio.sleep(PACE_S)

            async def post(place: str, **body: object) -> None:
                """Change versions, once every worker has loaded what that needs."""
                while True:
                    try:
                        await carry.request("POST", f"/v1/models/{MODEL}/{place}", body)
                        return
                    except Problem as problem:
                        if not problem.is_retryable:
                            raise
                        await asyncio.sleep(PACE_S)

            await until_answered_by({1})
            await post("versions", path=f"{MODEL}/b", label="b")
            await post("aliases", action="canary", version="b", share=0.5)
            await until_answered_by({1, 2})
            await post("aliases", action="promote", version="b")
            await until_answered_by({2})
            await post("versions", path=f"{MODEL}/c", label="c")
            await post("aliases", action="shadow", version="c")
            await post("aliases", action="promote", version=versions[2])
            await until_answered_by({3})
            await post("aliases", action="rollback")
            await until_answered_by({2})

            async def is_loaded_by_both() -> bool:
                """Also by a worker whose suspension made its last report too old."""
                listed: Any = await carry.request("GET", f"/v1/models/{MODEL}/versions")
                assert [each["version"] for each in listed["versions"]] == versions
                return {each["loaded"] for each in listed["versions"]} == {2}

            await until_async(is_loaded_by_both, "every version in both workers")
            is_stopped = True
        counts = Counter(gain for each in feeders for gain in each.answers)
        assert counts.keys() == set(GAINS)
        for transport in transports:
            await transport.close()
        assert "Traceback" not in service.whole_log()
