"""Failover of a primary under a running service: acknowledged chunks and client recovery."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import numpy as np

from models.artifact.artifact import Artifact
from tests.support.cluster import Cluster, breakable_cluster, own_cluster
from tests.support.pipelines import oracle_outputs
from tests.support.sender import Sender, send_all
from tests.support.sentinels import monitored
from tests.support.servers import until
from tests.support.service import running

__all__ = ["breakable_cluster", "own_cluster"]
STREAMS, EVENTS = 16, 120


def senders() -> list[Sender]:
    return [Sender(f"s{index}", index, events=EVENTS) for index in range(STREAMS)]


def check(artifact: Artifact, sent: list[Sender]) -> None:
    """Every output is that of the whole sequence, nothing left out and nothing twice."""
    for one in sent:
        assert one.position == EVENTS
        np.testing.assert_allclose(
            one.outputs, oracle_outputs(artifact, one.rows), rtol=1e-5, atol=1e-5
        )


async def test_failover_loses_no_acknowledged_replicated_chunk(
    own_cluster: Cluster, probe: Artifact, tmp_path: Path
) -> None:
    sent = senders()
    victim, heir = own_cluster.primaries[0], own_cluster.replicas[0]
    settings = {"CARRY_DURABILITY": "replicated", "CARRY_PARTITIONS": "64"}
    with running(tmp_path, probe.path, redis_url=own_cluster.url, **settings) as service:
        await send_all(service.url, sent, EVENTS // 3)
        has_reply = asyncio.Event()
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            sending = [asyncio.create_task(one.send(client, EVENTS, has_reply)) for one in sent]
            await has_reply.wait()
            victim.kill()
            await asyncio.to_thread(until, heir.is_primary, "the replica's promotion")
            # Without a replica nothing is as durable as asked, and nothing is acknowledged.
            victim.start()
            await asyncio.gather(*sending)
    check(probe, sent)
    own_cluster.primaries[0], own_cluster.replicas[0] = heir, victim
    await asyncio.to_thread(own_cluster.wait_until_synced)


async def test_sentinel_failover_loses_no_acknowledged_replicated_chunk(
    probe: Artifact, tmp_path: Path
) -> None:
    sent = senders()
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
    check(probe, sent)
