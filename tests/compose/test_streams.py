"""The profile `streams` of docker-compose.yml: a producer, and two consumers that share its topic.

One consumer is killed and the store restarts. Nothing is missing in the output topics, and nothing
is there twice.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.compose.test_deployment import READY_S, Deployment, say
from tests.support.servers import free_port, until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

STREAMS = ("--profile", "streams")
OUTPUTS = """
import json, redis
found = {}
with redis.Redis.from_url("redis://redis:6379/0") as client:
    for key in client.scan_iter("carry{p*}:out:scores"):
        for _, fields in client.xrange(key):
            found.setdefault(fields[b"stream"].decode(), []).append(int(fields[b"position"]))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    running = Deployment(free_port())
    before = request.session.testsfailed
    down = (*STREAMS, "down", "--volumes", "--remove-orphans")
    running.compose(*down)
    ready = False
    try:
        # after --wait everything is healthy
        wait = ("--wait", "--wait-timeout", str(READY_S))
        running.compose(*STREAMS, "up", "--build", *wait, EVENTS_PER_S="50")
        ready = True
        yield running
    finally:
        if not ready or request.session.testsfailed > before:
            print(running.compose(*STREAMS, "logs", "--no-color", "--tail", "60"))
        running.compose(*down)


def topic(deployment: Deployment) -> dict[str, Any]:
    """The topic that the console shows; empty while the service has no store."""
    reply = httpx.get(f"{deployment.url}/v1/topics", timeout=60)
    topics = reply.json().get("topics", [])
    return topics[0] if topics else {}


def positions(deployment: Deployment) -> dict[str, list[int]]:
    """The positions of the outputs of each stream, in the order of the output topics."""
    found: dict[str, list[int]] = json.loads(
        deployment.compose(*STREAMS, "exec", "-T", "producer", "python", "-c", OUTPUTS)
    )
    return found


def until_more(deployment: Deployment, what: str) -> None:
    """Wait until 200 more outputs were written."""
    count = lambda: sum(map(len, positions(deployment).values()))  # noqa: E731
    before = count()
    until(lambda: count() >= before + 200, what, READY_S, 1)


def until_owners(deployment: Deployment, count: int) -> None:
    owns = lambda: len(topic(deployment).get("owners", ())) == count  # noqa: E731
    until(owns, f"{count} owners", READY_S, 0.5)


def test_outputs_are_complete_while_a_consumer_is_killed_and_the_store_restarts(
    deployment: Deployment,
) -> None:
    until_owners(deployment, 2)
    consumers = deployment.compose(*STREAMS, "ps", "--quiet", "consumer").split()
    for container in consumers:
        found = deployment.inspect(container)
        assert found["HostConfig"]["ReadonlyRootfs"]
        assert found["State"]["Health"]["Status"] == "healthy"
    until_more(deployment, "outputs of two consumers")
    subprocess.run(["docker", "kill", consumers[0]], capture_output=True, check=True)
    until_owners(deployment, 1)
    until_more(deployment, "outputs of one consumer")
    deployment.restart("redis")
    until_more(deployment, "outputs after a restart of the store")
    subprocess.run(["docker", "start", consumers[0]], capture_output=True, check=True)
    until_owners(deployment, 2)
    shown = httpx.get(f"{deployment.url}/v1/topics/outputs?topic=departures", timeout=60).json()
    # afterwards: a stream may be new
    written = positions(deployment)
    for stream, each in written.items():
        assert each == [*range(len(each))], stream
    assert {output["stream"] for output in shown["outputs"]} <= set(written)
    assert set(shown["outputs"][0]["outputs"]) == {"late", "delay", "surprise"}
    count = sum(map(len, written.values()))
    say(f"{count} outputs of {len(written)} streams over a killed consumer and a restart")
