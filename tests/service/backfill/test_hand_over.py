"""Backfilled streams are loaded into a store, and consumers and clients continue them: the outputs
are those of the whole history."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from models.artifact.artifact import Artifact
from service.backfill.load import load_states
from service.backfill.plan import BackfillError
from service.backfill.run import BackfillOptions, plan_backfill, read_report
from service.core.values import StreamKey
from service.store.base import decode_stream
from service.store.source_mark import format_offset
from tests.service.transports.v1.harness import harness
from tests.support.consumers import consuming, until_count
from tests.support.hand_over import (
    STREAMS,
    backfill,
    body_of,
    events,
    lengths_of,
    outputs_in,
    packed,
    publish,
    small,
)
from tests.support.servers import KINDS, RealServer, becomes, emptied, opened, real_server
from tests.support.streams import load

__all__ = ["events", "small"]


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[RealServer]:
    """Each kind of server."""
    with real_server(request.param) as running:
        yield running


@pytest.fixture
def client(server: RealServer) -> Iterator[Any]:
    """A client of the server, which is empty."""
    with emptied(server).client() as client:
        yield client


async def test_a_consumer_continues_backfilled_streams(
    server: RealServer, client: Any, small: Artifact, events: pl.DataFrame, tmp_path: Path
) -> None:
    """Whose topic has a part of the history, and whose events go on during the load."""
    expected = outputs_in(backfill(small, events, tmp_path / "whole"))
    past = events[:250].filter(pl.col("stream") != "s3")
    out = backfill(small, past, tmp_path / "past", offset="entry", topic="events")
    known = lengths_of(past)
    # what is left of the topic, and a stream of which there is no history
    is_in_topic = (events["stream"] == "s3") | pl.Series(range(420)).ge(120)
    publish(client, events[:300].filter(is_in_topic[:300]))
    async with opened(server.url) as store:

        def go_on(_: Any) -> None:
            publish(client, events[300 + 40 * len(parts) : 340 + 40 * len(parts)])
            parts.append(0)

        parts: list[int] = []
        progress = await load_states(store, out, report=go_on)
        assert (progress.loaded, progress.kept) == (STREAMS - 1, [])
    publish(client, events[300 + 40 * len(parts) :])
    config = {"model": "small", "from": "events"}
    total = 420 - len(past)
    async with consuming(server.url, small, **config) as consumer:
        await becomes(lambda: client.xlen("scores") >= total, "all outputs")
        await becomes(lambda: client.xpending("events", "carry")["pending"] == 0, "nothing pending")
    assert client.xlen("scores") == total
    assert client.xlen("events:dead") == 0
    skipped = events[120:250].filter(pl.col("stream") != "s3")
    assert consumer.counts["skipped"] == len(skipped)
    found: dict[str, list[int]] = {}
    for _, fields in client.xrange("scores"):
        name, position = fields[b"stream"].decode(), int(fields[b"position"])
        found.setdefault(name, []).append(position)
        row = packed(json.loads(fields[b"outputs"]))
        np.testing.assert_allclose(row, expected[name][position], rtol=1e-4, atol=1e-5)
    for name, count in lengths_of(events).items():
        assert found[name] == [*range(known.get(name, 0), count)]


async def test_clients_continue_at_the_position_and_late_duplicates_are_rejected(
    server: RealServer, client: Any, small: Artifact, events: pl.DataFrame, tmp_path: Path
) -> None:
    expected = outputs_in(backfill(small, events, tmp_path / "whole"))
    out = backfill(small, events[:250], tmp_path / "past")
    known = lengths_of(events[:250])
    async with harness(server, {"small": small}) as api, opened(server.url) as store:
        await load_states(store, out, report=lambda _: None)
        for name, start in known.items():
            rows = list(events.filter(pl.col("stream") == name).iter_rows(named=True))
            bodies = list(map(body_of, rows))
            # of a client that does not know of the load
            early = await api.chunk(
                {"position": 0, "events": bodies[:2]}, stream=name, model="small"
            )
            assert (early.status_code, early.json()["code"]) == (409, "position_behind")
            assert early.json()["expected"] == start
            chunk = {"position": start, "events": bodies[start : start + 10]}
            for _ in range(2):
                reply = await api.chunk(chunk, stream=name, model="small")
                assert reply.status_code == 200, reply.text
                outputs = reply.json()["outputs"]
                for at in range(len(chunk["events"])):
                    row = packed({each: values[at] for each, values in outputs.items()})
                    wanted = expected[name][start + at]
                    np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-5)


async def test_a_mark_is_the_furthest_place_of_a_stream_in_its_topic(
    server: RealServer, client: Any, small: Artifact, events: pl.DataFrame, tmp_path: Path
) -> None:
    """The events of the history are ordered by time, and late ones are behind in the topic."""
    late = events.with_columns(entry=events["entry"].reverse())
    out = backfill(small, late, tmp_path / "past", offset="entry", topic="events")
    first = dict(
        late.group_by("stream", maintain_order=True).first()["stream", "entry"].iter_rows()
    )
    pieces = backfill(small, late, tmp_path / "cut", offset="entry", topic="events", piece_rows=11)
    for folder in (out, pieces):
        client.flushall()
        async with opened(server.url) as store:
            await load_states(store, folder, report=lambda _: None)
            found = await load(store, [StreamKey("small", name) for name in first])
        places = [f"{each.source.offset}-{each.source.sequence}" for each in found]
        assert places == list(first.values())
        assert {each.source.source for each in found} == {"events"}


@pytest.mark.parametrize("rows", [1, 11, 1000])
def test_streams_of_several_partitions_are_counted(
    small: Artifact, events: pl.DataFrame, tmp_path: Path, rows: int
) -> None:
    """As of a topic that got more partitions: a mark is of one of them."""
    number = pl.int_range(pl.len())
    moved = events.with_columns(
        entry=number,
        partition=pl.when((pl.col("stream") == "s2") & (number > 200)).then(1).otherwise(0),
    )
    options = {"offset": "entry", "topic": "events", "topic_partition": "partition"}
    out = backfill(small, moved, tmp_path, piece_rows=rows, **options)
    assert read_report(out)["moved_streams"] == 1


async def test_states_with_another_mark_are_not_taken_for_loaded(
    server: RealServer, client: Any, small: Artifact, events: pl.DataFrame, tmp_path: Path
) -> None:
    plain = backfill(small, events, tmp_path / "plain")
    marked = backfill(small, events, tmp_path / "marked", offset="entry", topic="events")
    async with opened(server.url) as store:
        await load_states(store, plain, report=lambda _: None)
        progress = await load_states(store, marked, report=lambda _: None)
        assert (progress.loaded_before, len(progress.kept)) == (0, STREAMS)
        progress = await load_states(store, marked, overwrite=True, report=lambda _: None)
        assert progress.loaded == STREAMS


async def test_the_history_of_a_loaded_stream_begins_with_its_state(
    server: RealServer, client: Any, small: Artifact, events: pl.DataFrame, tmp_path: Path
) -> None:
    """Also if another one of the name was overwritten, whose history ends."""
    out = backfill(small, events[:250], tmp_path / "past")
    known = lengths_of(events[:250])
    settings = {"history_events": "20"}
    config = {"model": "small", "from": "events"}
    async with consuming(server.url, small, settings, **config), opened(server.url) as store:
        publish(client, events[:30])
        await until_count(client, "scores", 30)
        assert (await load_states(store, out, report=lambda _: None)).loaded == 0
        assert (
            await load_states(store, out, overwrite=True, report=lambda _: None)
        ).loaded == STREAMS
        publish(client, events[250:])
        await until_count(client, "scores", 200)
        for name, position in known.items():
            key = StreamKey("small", name)
            found = await store.histories.read(key, small.fingerprint, position)
            assert found.is_valid
            assert found.positions[0] == position
            assert found.snapshot is not None
            (stored,) = await load(store, [key])
            assert decode_stream(found.snapshot).head.epoch == stored.head.epoch


async def test_the_oldest_events_of_a_history_need_no_place_in_the_topic(
    server: RealServer, client: Any, small: Artifact, events: pl.DataFrame, tmp_path: Path
) -> None:
    """Nor do the latest, of another way in."""
    has_place = pl.int_range(420).is_between(150, 399)
    partly = events.with_columns(entry=pl.when(has_place).then("entry"))
    out = backfill(small, partly, tmp_path / "past", offset="entry", topic="events")
    async with opened(server.url) as store:
        progress = await load_states(store, out, report=lambda _: None)
        assert progress.loaded == STREAMS
        names = sorted(lengths_of(events))
        found = await load(store, [StreamKey("small", name) for name in names])
    latest = partly.drop_nulls("entry").group_by("stream", maintain_order=True).last()
    places = dict(latest["stream", "entry"].iter_rows())
    assert [format_offset(each.source) for each in found] == [places[name] for name in names]


@pytest.mark.parametrize(
    "options",
    [{"offset": "entry"}, {"topic": "events"}, {"topic_partition": "partition"}],
    ids=str,
)
def test_a_place_has_an_offset_and_a_topic(
    small: Artifact, tmp_path: Path, options: dict[str, str]
) -> None:
    with pytest.raises(BackfillError, match="expected --offset with --source-topic"):
        plan_backfill(small, [str(tmp_path)], BackfillOptions(stream="stream", **options))
