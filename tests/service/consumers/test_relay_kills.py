"""Relays whose process or store is killed or suspended before a delivery is acknowledged."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from tests.service.consumers.test_relay import SECRET, output, until_acknowledged, webhook
from tests.support.command import carry
from tests.support.consumers import (
    ConsumerProcess,
    add,
    assert_outputs,
    consumer_processes,
    interleaved,
    outputs_of,
    relaying,
)
from tests.support.pipelines import rows_of
from tests.support.receiver import Receiver, Request, receiving, reply
from tests.support.servers import RealServer, becomes, own_server

__all__ = ["own_server"]

RANDOM = np.random.default_rng(11)
BATCH = 10

Start = Callable[..., ConsumerProcess]


@pytest.fixture
def start(server: RealServer, artifact: Artifact, tmp_path: Path) -> Iterator[Start]:
    """Starts consumers with a webhook and a short lease."""
    config, secret = tmp_path / "consumer.yaml", tmp_path / "secret"
    secret.write_text(SECRET)
    with consumer_processes(server, artifact, tmp_path) as start_one:

        def start_relay(receiver: Receiver, lease_s: float = 0.5) -> ConsumerProcess:
            config.write_text(
                f"model: probe\nfrom: events\nto: scores\ncreate: true\nlease_s: {lease_s}\n"
                f"webhook: {{url: '{receiver.url}', secret: {{file: {secret}}}, batch: {BATCH}}}\n"
            )
            return start_one("--port", "0")

        yield start_relay


def assert_delivered(receiver: Receiver, client: Any) -> None:
    """Each output arrived, in the order of its stream; a repeat is of an earlier request."""
    assert receiver.outputs(unique=True) == outputs_of(client, "scores")
    bodies: dict[str, bytes] = {}
    for request in receiver.accepted:
        message_id = request.headers["webhook-id"]
        assert bodies.setdefault(message_id, request.body) == request.body
    sent = Counter(each["entry"] for body in bodies.values() for each in _outputs(body))
    assert max(sent.values()) == 1


def _outputs(body: bytes) -> list[dict[str, Any]]:
    return Request("", {}, body).outputs


async def test_killed_processes_repeat_only_the_request_that_was_not_acknowledged(
    server: RealServer, client: Any, artifact: Artifact, start: Start
) -> None:
    rows = {f"s{number}": rows_of(RANDOM, 20) for number in range(6)}
    add(client, "events", *interleaved(rows))
    kills = [2, 5]
    async with receiving() as receiver:
        running = [start(receiver)]

        def answer(request: Request) -> bytes:
            if kills and len(receiver.accepted) >= kills[0]:
                del kills[0]
                running[-1].fork.kill()
                running.append(start(receiver))
            return reply()

        receiver.answer = answer
        await becomes(lambda: receiver.count() == 120, "all outputs")
        await until_acknowledged(client)
        assert len(running) == 3
        repeated = Counter(request.headers["webhook-id"] for request in receiver.accepted)
        assert sorted(repeated.values())[-2:] == [2, 2]
        assert_delivered(receiver, client)
        running[-1].fork.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(running[-1].fork.wait, 60) == 0
    for name, each in rows.items():
        assert_outputs(artifact, receiver.outputs(unique=True)[name], each)


async def test_a_suspended_relay_acknowledges_nothing_after_another_took_over(
    server: RealServer, client: Any, start: Start
) -> None:
    rows = {f"s{number}": rows_of(RANDOM, 20) for number in range(3)}
    add(client, "events", *interleaved(rows))
    async with receiving() as receiver:
        first = start(receiver)
        suspensions = [first]

        def answer(request: Request) -> bytes:
            if suspensions and len(receiver.accepted) == 2:
                suspensions.pop().fork.send_signal(signal.SIGSTOP)
            return reply()

        receiver.answer = answer
        await becomes(lambda: not suspensions, "the suspension")
        start(receiver)
        await becomes(lambda: receiver.count() == 60, "a takeover")
        await until_acknowledged(client)
        first.fork.send_signal(signal.SIGCONT)

        def has_lost() -> bool:
            lost = [line for line in first.lines() if line["message"] == "topic_lost"]
            return any(line["topic"] == "scores" for line in lost)

        await becomes(has_lost, "the loss of the topic")
        assert client.xpending("scores", "carry/relay")["pending"] == 0
        assert_delivered(receiver, client)


async def test_the_store_is_killed_while_outputs_are_delivered(own_server: RealServer) -> None:
    with own_server.client() as client:
        add(client, "scores", *[output(f"s{at % 3}", at) for at in range(300)])
    kills = [3, 12]
    async with receiving() as receiver:

        def answer(_: Request) -> bytes:
            if kills and len(receiver.accepted) >= kills[0]:
                del kills[0]
                own_server.kill()
                own_server.start()
            return reply()

        receiver.answer = answer
        config = webhook(receiver, batch=BATCH)
        async with relaying(own_server.url, {"store_wait_s": 20}, webhook=config):
            await becomes(lambda: receiver.count() == 300, "all outputs")
            with own_server.client() as client:
                await until_acknowledged(client)
        assert not kills
        with own_server.client() as client:
            assert_delivered(receiver, client)


async def test_metrics_status_and_dead_letters_of_a_relay(
    server: RealServer, client: Any, start: Start, tmp_path: Path
) -> None:
    add(client, "events", *interleaved({"a": rows_of(RANDOM, 3)}))

    def answer(request: Request) -> bytes:
        return reply(422 if any(each["position"] == 1 for each in request.outputs) else 204)

    async def run(*words: str) -> list[str]:
        options = ("--redis-url", server.url)
        done = await asyncio.to_thread(carry, *words, *options)
        assert done.exit_code == 0, done.stderr
        return done.stdout.decode().splitlines()

    async with receiving() as receiver:
        receiver.answer = answer
        consumer = start(receiver, lease_s=300)
        await becomes(lambda: client.xlen("scores:dead") == 1, "the dead letter")
        await until_acknowledged(client)
        config = str(tmp_path / "consumer.yaml")
        lines = [line.split() for line in await run("consume", "status", config)]
        assert [(line[0], *line[2:5]) for line in lines[1:]] == [
            ("events", "3", "0", "0"),
            ("scores", "3", "0", "0"),
        ]
        assert str(consumer.fork.pid) in lines[2][1]
        [listed] = await run("dlq", "list", "--outputs", "--config", config)
        assert "delivery_rejected" in listed
        receiver.answer = lambda _: reply()
        letter = listed.split()[0]
        assert await run("dlq", "replay", letter, "--outputs", "--config", config) == [
            "1 dead letters replayed"
        ]
        await becomes(lambda: receiver.count() == 3, "the replayed output")
