"""Failover of a primary under a running service, behind Sentinels.

`tests/service/store/test_cluster.py` fails over primaries of a cluster, and the fault tests of
both, also with chunks that are lost.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import numpy as np

from carry_client import AsyncCarry
from models.artifact.artifact import Artifact
from tests.support.pipelines import oracle_outputs, rows_of
from tests.support.sentinels import monitored
from tests.support.service import running

STREAMS, EVENTS = 16, 120


async def test_sentinel_failover_loses_no_acknowledged_replicated_chunk(
    probe: Artifact, tmp_path: Path
) -> None:
    random = np.random.default_rng(1)
    sources = [rows_of(random, EVENTS) for _ in range(STREAMS)]
    settings = {"CARRY_DURABILITY": "replicated", "CARRY_PARTITIONS": "64"}
    with (
        monitored("valkey") as servers,
        running(tmp_path, probe.path, redis_url=servers.url, **settings) as service,
    ):
        async with AsyncCarry(service.url) as carry:
            streams = [carry.model("probe").stream(f"s{index}") for index in range(STREAMS)]
            sent: list[list[np.ndarray]] = [[] for _ in streams]
            has_reply, continues = asyncio.Event(), asyncio.Event()

            async def send(number: int) -> None:
                for chunk in np.split(sources[number], EVENTS // 4):
                    reply = await streams[number].send(chunk)
                    sent[number].append(np.column_stack([*reply.outputs.values()]))
                    if len(sent[number]) == 10:
                        has_reply.set()
                        await continues.wait()

            sending = [asyncio.create_task(send(number)) for number in range(STREAMS)]
            await has_reply.wait()
            servers.primary.kill()
            continues.set()
            await asyncio.to_thread(servers.fail_over)
            # without a replica nothing is acknowledged; Sentinel would make it one after 8 s
            servers.primary.launch("--replicaof", f"127.0.0.1 {servers.replica_port}")
            await asyncio.gather(*sending)
        # no pooled connection to the new primary is open yet
        servers.sentinel.kill()
        ready = await asyncio.to_thread(httpx.get, f"{service.url}/health/ready", timeout=60)
        assert ready.status_code == 200, ready.text
        assert "Sentinel" in ready.text
    for rows, outputs in zip(sources, sent, strict=True):
        expected = oracle_outputs(probe, rows)
        np.testing.assert_allclose(np.concatenate(outputs), expected, rtol=1e-5, atol=1e-5)
