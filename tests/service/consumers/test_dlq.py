"""`carry dlq`: dead letters are listed, shown, and replayed in the order of their stream."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np

from carry_client import Producer
from models.artifact.artifact import Artifact
from tests.support.command import Result, carry
from tests.support.consumers import (
    add,
    assert_outputs,
    consuming,
    fields_of,
    outputs_of,
    until_count,
)
from tests.support.pipelines import rows_of
from tests.support.servers import RealServer, becomes

RANDOM = np.random.default_rng(9)


async def dlq(server: RealServer, *words: str) -> Result:
    options = ("--from", "events", "--redis-url", server.url)
    return await asyncio.to_thread(carry, "dlq", *words, *options)


async def test_a_halted_stream_goes_on_in_order_after_a_replay(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = rows_of(RANDOM, 6)
    good = [fields_of("a", row) for row in rows]
    async with consuming(server.url, artifact, on_error="halt"):
        add(client, "events", *good[:2], {"stream": "a", "event": "[1]"}, *good[2:5])
        await until_count(client, "events:dead", 4)
        listed = (await dlq(server, "list")).stdout.decode().splitlines()
        assert [line.split()[2] for line in listed] == ["invalid_input", *["previous_failed"] * 3]
        bad_id = listed[0].split()[0]
        shown = json.loads((await dlq(server, "show", bad_id)).stdout)
        assert (shown["stream"], shown["event"], shown["topic"]) == ("a", "[1]", "events:dead")
        discarded = await dlq(server, "replay", bad_id, "--discard")
        assert discarded.stdout == b"1 dead letters deleted\n"
        replayed = await dlq(server, "replay", "--stream", "a")
        assert replayed.stdout == b"3 dead letters replayed\n"
        add(client, "events", good[5])
        await until_count(client, "scores", 6)
    assert_outputs(artifact, outputs_of(client, "scores")["a"], rows)
    assert client.xlen("events:dead") == 0


async def test_a_halted_stream_goes_on_once_its_missing_event_is_sent(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    rows = rows_of(RANDOM, 12)
    good = [fields_of("a", row, position=at) for at, row in enumerate(rows)]
    async with consuming(server.url, artifact, on_error="halt"):
        add(client, "events", good[0], *good[2:])
        await until_count(client, "events:dead", 10)
        add(client, "events", good[1])
        await until_count(client, "events:dead", 11)
        replayed = await dlq(server, "replay", "--stream", "a")
        assert replayed.stdout == b"11 dead letters replayed\n"
        await until_count(client, "scores", 12)
    assert_outputs(artifact, outputs_of(client, "scores")["a"], rows)
    assert client.xlen("events:dead") == 0


async def test_a_replay_in_order_needs_to_know_the_field_of_the_position(
    server: RealServer, client: Any, artifact: Artifact, tmp_path: Path
) -> None:
    rows = rows_of(RANDOM, 4)
    good = [fields_of("a", row, seq=at) for at, row in enumerate(rows)]
    config = tmp_path / "consumer.yaml"
    config.write_text("model: probe\nfrom: events\nto: scores\nposition: seq\non_error: halt\n")
    async with consuming(server.url, artifact, on_error="halt", position="seq"):
        add(client, "events", good[0], *good[2:])
        await until_count(client, "events:dead", 2)
        add(client, "events", good[1])
        await until_count(client, "events:dead", 3)
        rejected = await dlq(server, "replay", "--stream", "a")
        assert rejected.exit_code == 1
        assert "--config: expected the configuration, which names the field" in rejected.stderr
        assert client.xlen("events:dead") == 3
        replayed = await dlq(server, "replay", "--stream", "a", "--config", str(config))
        assert replayed.stdout == b"3 dead letters replayed\n"
        await until_count(client, "scores", 4)
    assert_outputs(artifact, outputs_of(client, "scores")["a"], rows)


async def test_single_dead_letters_are_replayed_with_their_fields(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    async with consuming(server.url, artifact):
        add(client, "events", {"stream": "a", "event": "[1]", "extra": "x"}, {"other": "y"})
        await until_count(client, "events:dead", 2)
    [(first, _), _] = client.xrange("events:dead")
    assert (await dlq(server, "replay", first.decode())).stdout == b"1 dead letters replayed\n"
    assert client.xlen("events:dead") == 1
    [(_, fields)] = client.xrevrange("events", count=1)
    assert fields == {b"stream": b"a", b"event": b"[1]", b"extra": b"x"}
    again = await dlq(server, "replay", first.decode())
    assert again.exit_code == 1
    assert f"there is no dead letter {first.decode()!r}" in again.stderr


async def test_partitioned_topics_need_no_configuration(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    producer = Producer(client, "events", model="probe", partitions=256)
    producer.send("a", [1.0])
    async with consuming(server.url, artifact, partitioned=True) as consumer:
        await becomes(lambda: consumer.counts["dead_letters"] == 1, "the dead letter")
    listed = (await dlq(server, "list", "--partitioned")).stdout.decode().splitlines()
    assert [line.split()[3] for line in listed] == ["a"]
    words = ("--from", "events", "--partitioned", "--redis-url", server.url)
    shown = await asyncio.to_thread(carry, "consume", "status", *words)
    lines = shown.stdout.decode().splitlines()
    assert any(line.split()[0] == producer.topic("a") for line in lines)


async def test_an_entry_of_thousands_of_fields_is_a_dead_letter(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    many = {f"f{number}": "x" for number in range(3_000)}
    async with consuming(server.url, artifact):
        add(client, "events", many, fields_of("a", rows_of(RANDOM, 1)[0]))
        await until_count(client, "scores", 1)
        await until_count(client, "events:dead", 1)
    [(letter, _)] = client.xrange("events:dead")
    assert (await dlq(server, "replay", letter.decode())).stdout == b"1 dead letters replayed\n"
    [(_, fields)] = client.xrevrange("events", count=1)
    assert fields == {name.encode(): b"x" for name in many}


async def test_dead_letters_and_status_are_shown_while_the_memory_is_full(
    server: RealServer, client: Any, artifact: Artifact
) -> None:
    async with consuming(server.url, artifact):
        add(client, "events", {"stream": "a", "event": "[1]"})
        await until_count(client, "events:dead", 1)
    server.configure("maxmemory", 1)
    try:
        listed = await dlq(server, "list")
        words = ("consume", "status", "--from", "events", "--redis-url", server.url)
        shown = await asyncio.to_thread(carry, *words)
    finally:
        server.configure("maxmemory", 0)
    assert (listed.exit_code, shown.exit_code) == (0, 0), listed.stderr + shown.stderr


async def test_what_is_missing_is_an_error(server: RealServer, client: Any) -> None:
    assert "no dead letter" in (await dlq(server, "show", "1-1")).stderr
    assert "--stream NAME" in (await dlq(server, "replay")).stderr
    listed = await dlq(server, "list")
    assert (listed.exit_code, listed.stdout) == (0, b"")
    assert listed.stderr.endswith("no dead letters in 'events:dead'\n")
    status = carry("consume", "status", "--from", "events", "--redis-url", server.url)
    assert "; topics of partitions need --partitioned" in status.stderr
    assert carry("dlq", "list").stderr == "carry: expected a configuration, or --from TOPIC\n"
