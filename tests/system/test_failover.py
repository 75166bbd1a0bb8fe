"""Failover of a primary under a running service, behind Sentinels.

`tests/service/store/test_cluster.py` fails over primaries of a cluster, and the fault tests of
both, also with chunks that are lost.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import numpy as np

from models.artifact.artifact import Artifact
from tests.support.pipelines import oracle_outputs
from tests.support.sender import Sender, send_all
from tests.support.sentinels import monitored
from tests.support.servers import until
from tests.support.service import running

STREAMS, EVENTS = 16, 120


async def test_sentinel_failover_loses_no_acknowledged_replicated_chunk(
    probe: Artifact, tmp_path: Path
) -> None:
    sent = [Sender(f"s{index}", index, events=EVENTS) for index in range(STREAMS)]
    settings = {"CARRY_DURABILITY": "replicated", "CARRY_PARTITIONS": "64"}
    with (
        monitored("valkey") as servers,
        running(tmp_path, probe.path, redis_url=servers.url, **settings) as service,
    ):
        await send_all(service.url, sent, EVENTS // 3)
        has_reply = asyncio.Event()
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            sending = [asyncio.create_task(one.send(client, EVENTS, has_reply)) for one in sent]
            await has_reply.wait()
            servers.primary.kill()
            await asyncio.to_thread(until, servers.has_failed_over, "the failover")
            # without a replica nothing is acknowledged; Sentinel would make it one after 8 s
            servers.primary.launch("--replicaof", f"127.0.0.1 {servers.replica_port}")
            await asyncio.gather(*sending)
            # no pooled connection to the new primary is open yet
            servers.sentinel.kill()
            ready = await client.get("/health/ready")
            assert ready.status_code == 200, ready.text
            assert "Sentinel" in ready.text
    for one in sent:
        assert one.position == EVENTS
        expected = oracle_outputs(probe, one.rows)
        np.testing.assert_allclose(one.outputs, expected, rtol=1e-5, atol=1e-5)
