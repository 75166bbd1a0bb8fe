"""Streams over faults and rollbacks, against the stand-in service."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from carry_client import (
    AsyncCarry,
    Carry,
    Model,
    Progress,
    Reply,
    Stream,
    StreamDiverged,
    StreamRolledBack,
    errors,
)
from tests.service.commands.replay.standin import Standin

CHUNK = 8
Events = list[dict[str, Any]]


@pytest.fixture
def right(model: Model, events: Events) -> list[float]:
    """The outputs `late` of all events, without any fault."""
    return late(model.stream("right").send_all(events, chunk_events=CHUNK))


def late(replies: Iterator[Reply] | list[Reply]) -> list[float]:
    """The outputs `late` as they were returned, one after another."""
    return [value for reply in replies for value in reply.outputs["late"].tolist()]


def failing(*faults: str | None) -> Callable[[object], str | None]:
    """Faults of the next requests with chunks, then none."""
    remaining = iter(faults)
    return lambda request: next(remaining, None)


def test_chunks_continue_one_another(small: Stream, standin: Standin, events: Events) -> None:
    first = small.send(events[:3])
    second = small.send(pl.DataFrame(events[3:5]))
    assert (first.position, second.position) == (3, 5)
    assert (second.first_position, len(second)) == (3, 2)
    assert small.head == second.head
    assert second.outputs["late"].dtype == np.float32
    assert standin.seen == [("s", 0, 3), ("s", 3, 2)]


@pytest.mark.parametrize("fault", ["drop", "drop_after", "store_unavailable", "outcome_unknown"])
def test_failed_chunks_are_repeated_and_applied_once(
    small: Stream, standin: Standin, events: Events, right: list[float], fault: str
) -> None:
    standin.fault = failing(None, fault, None, fault, fault)
    assert late(small.send_all(events, chunk_events=CHUNK)) == right
    assert standin.streams["s"].position == small.position == len(events)


def test_second_run_continues_where_the_first_stopped(
    model: Model, standin: Standin, events: Events, right: list[float]
) -> None:
    for count, expected in ((2, right[: 2 * CHUNK]), (99, right[2 * CHUNK :]), (99, [])):
        replies = model.stream("s").send_all(iter(events), chunk_events=CHUNK)
        received = [reply for _, reply in zip(range(count), replies, strict=False)]
        assert late(received) == pytest.approx(expected)
    assert standin.streams["s"].position == len(events)


def test_source_that_is_shorter_than_the_stream_is_rejected(small: Stream, events: Events) -> None:
    list(small.send_all(events[:10]))
    for source in (events[:9], iter(events[:9])):
        with pytest.raises(ValueError, match="ends at position 9, and the stream is at 10"):
            list(small.send_all(source))
    assert late(small.send_all(events[10:], first_position=None))
    assert small.position == len(events)


def test_a_source_that_begins_after_the_stream_is_rejected(
    model: Model, small: Stream, events: Events, right: list[float]
) -> None:
    list(small.send_all(events[:10]))
    for source in (events[20:], iter(events[20:])):
        with pytest.raises(errors.PositionAhead) as raised:
            list(small.send_all(source, first_position=20))
        assert (raised.value.expected, raised.value.got) == (10, 20)
        assert raised.value.head == small.head
        for words in ("stream 's'", "got first_position=20", "send events 10 to 19", "replay_from"):
            assert words in str(raised.value)
    stream = model.stream("s", replay_from=lambda at: events[at:])
    sent = stream.send_all(events[20:], first_position=20, chunk_events=CHUNK)
    assert late(sent) == pytest.approx(right[20:], abs=1e-6)


def test_other_events_after_a_send_of_unknown_outcome_name_that_send(
    small: Stream, standin: Standin, events: Events
) -> None:
    small.send(events[:2])
    standin.fault = failing("outcome_unknown_for_good")
    with pytest.raises(errors.OutcomeUnknown):
        small.send(events[2:4])
    with pytest.raises(StreamDiverged, match=r"or by a send of this client that failed; refresh"):
        small.send(events[2:3])
    assert small.refresh().position == 4


@pytest.mark.parametrize("how", ["source", "buffer", "replay_from"])
def test_rolled_back_events_are_sent_again(
    model: Model,
    standin: Standin,
    events: Events,
    right: list[float],
    how: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {
        "source": {"buffer_events": 0},
        "buffer": {"buffer_events": 3 * CHUNK},
        "replay_from": {"buffer_events": 0, "replay_from": lambda at: iter(events[at:])},
    }[how]
    seen: list[Progress] = []

    def roll_back(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == 4:
            standin.roll_back("s", 3)

    with caplog.at_level(logging.WARNING, "carry_client"):
        source = events if how == "source" else iter(events)
        stream = model.stream("s", **options)
        outputs = late(stream.send_all(source, chunk_events=CHUNK, progress=roll_back))
    assert outputs == right, "each event's outputs once"
    starts = [start // CHUNK for name, start, _ in standin.seen if name == "s"]
    assert starts == [0, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7]
    assert "was rolled back" in caplog.text
    assert seen[-1] == Progress(
        position=len(events), total=len(events) if how == "source" else None, chunks=8,
        retries=0, rollbacks=1, skipped=0, elapsed_s=seen[-1].elapsed_s,
    )  # fmt: skip


def test_vanished_stream_counts_as_rolled_back(
    small: Stream, standin: Standin, events: Events, right: list[float]
) -> None:
    received = []
    for reply in small.send_all(events, chunk_events=CHUNK):
        received.append(reply)
        if len(received) == 2:
            standin.roll_back("s", 2)
    assert late(received) == right


def test_rollback_without_events_is_raised_until_it_is_accepted(
    model: Model, standin: Standin, events: Events
) -> None:
    stream = model.stream("s", buffer_events=0)
    early = stream.send(events[:4]).head
    known = stream.send(events[4:8]).head
    standin.roll_back("s", 1)
    for _ in range(2):
        with pytest.raises(StreamRolledBack) as raised:
            stream.send(events[8:9])
        assert (raised.value.expected, raised.value.actual) == (known, early)
    assert stream.refresh() == early
    assert stream.send(events[4:5]).position == 5


@pytest.mark.parametrize("options", [{}, {"replay_from": True, "buffer_events": 0}])
@pytest.mark.parametrize("lost", [3, 2])
def test_events_that_were_rolled_back_are_not_skipped_after_another_failure(
    model: Model,
    standin: Standin,
    events: Events,
    right: list[float],
    tmp_path: Path,
    options: dict[str, Any],
    lost: int,
) -> None:
    if options:
        options["replay_from"] = lambda at: events[at:]
    stream = model.stream("s", save=tmp_path / "head", **options)
    for start in (0, 2, 4):
        stream.send(events[start : start + 2])
    head = stream.head
    standin.roll_back("s", lost)
    # rejected; then the first chunk of the buffer is sent again; then one fails
    standin.fault = failing(*((None,) if options else (None, None)), "refuse")
    with pytest.raises(errors.InvalidInput):
        stream.send(events[6:8])
    assert stream.head == head
    assert json.loads((tmp_path / "head").read_text())["position"] == 6
    reply = stream.send(events[6:8])
    assert standin.streams["s"].position == 8
    assert late([reply]) == pytest.approx(right[6:8])


def test_other_cuts_continue_after_a_chunk_of_unknown_outcome(
    model: Model, standin: Standin, events: Events, right: list[float]
) -> None:
    stream = model.stream("s")
    stream.send(events[:4])
    standin.fault = failing("outcome_unknown_for_good")
    with pytest.raises(errors.OutcomeUnknown):
        list(stream.send_all(events, chunk_events=CHUNK))
    assert standin.streams["s"].position == 4 + CHUNK
    replies = list(stream.send_all(events, chunk_events=5))
    assert replies[0].first_position == 4 + CHUNK
    assert late(replies) == pytest.approx(right[4 + CHUNK :])


def test_rollback_at_equal_position_is_noticed_by_its_tag(
    small: Stream, model: Model, standin: Standin, events: Events
) -> None:
    small.send(events[:4])
    small.send(events[4:6])
    standin.roll_back("s", 1)
    model.stream("s").send(events[10:12])
    with pytest.raises(StreamDiverged, match="was changed by others") as raised:
        small.send(events[6:8])
    assert raised.value.actual.position == raised.value.expected.position == 6
    assert raised.value.actual.tag != raised.value.expected.tag


@pytest.mark.parametrize("lost", [0, 1])
def test_saved_head_reveals_a_rollback_to_a_later_process(
    model: Model, standin: Standin, events: Events, tmp_path: Path, lost: int
) -> None:
    file = tmp_path / "head.json"
    stream = model.stream("s", save=file)
    stream.send(events[:4])
    stream.send(events[4:6])
    assert json.loads(file.read_text())["position"] == 6
    standin.roll_back("s", lost)
    stream = model.stream("s", save=file)
    for _ in range(2 * lost):
        with pytest.raises(StreamRolledBack):
            stream.send(events[6:8])
    stream = model.stream("s", save=file, replay_from=lambda at: events[at:])
    assert stream.send(events[6:8]).position == 8
    with pytest.raises(ValueError, match="expected the head of"):
        model.stream("other", save=file)


def test_whole_source_needs_no_recovery_of_what_a_saved_head_shows_as_lost(
    model: Model, standin: Standin, events: Events, right: list[float], tmp_path: Path
) -> None:
    list(model.stream("s", save=tmp_path / "head").send_all(events[:CHUNK]))
    list(model.stream("s", save=tmp_path / "head").send_all(events[: 2 * CHUNK]))
    standin.roll_back("s", 1)
    stream = model.stream("s", save=tmp_path / "head")
    assert late(stream.send_all(iter(events), chunk_events=CHUNK)) == right[CHUNK:]


def test_source_is_not_read_again_after_its_end(
    model: Model, standin: Standin, events: Events
) -> None:
    stream = model.stream("s", buffer_events=0)
    list(stream.send_all(events[:10], chunk_events=5))
    standin.roll_back("s", 1)
    with pytest.raises(StreamRolledBack):
        stream.send(events[10:12])


def test_head_of_another_incarnation_is_not_continued(
    model: Model, events: Events, standin: Standin
) -> None:
    heads = []
    model.stream("s", save=heads.append).send(events[:4])
    standin.roll_back("s", 1)
    model.stream("s").send(events[:5])
    with pytest.raises(StreamDiverged):
        model.stream("s", head=heads[-1]).send(events[5:6])


def test_lost_reply_that_is_no_longer_stored_is_counted(
    small: Stream, standin: Standin, events: Events, right: list[float]
) -> None:
    progress: list[Progress] = []

    def forget(request: object) -> str | None:
        if len(standin.seen) == 2 and not standin.counts["forgotten"]:
            standin.counts["forgotten"] += 1
            return "drop_after"
        if standin.counts["forgotten"] == 1 and "s" in standin.streams:
            standin.counts["forgotten"] += 1
            standin.forget_reply("s")
        return None

    standin.seen.clear()
    standin.fault = forget
    outputs = late(small.send_all(events, chunk_events=CHUNK, progress=progress.append))
    assert outputs == right[: 2 * CHUNK] + right[3 * CHUNK :]
    assert progress[-1].skipped == CHUNK
    assert small.position == len(events)


def test_rejected_chunk_is_raised_with_its_facts(
    small: Stream, standin: Standin, events: Events
) -> None:
    standin.fault = failing("refuse")
    with pytest.raises(errors.InvalidInput, match="invalid_input"):
        small.send(events[:2])
    assert small.send(events[:2]).position == 2


def test_wrong_arguments_are_rejected_before_any_request(tmp_path: Path) -> None:
    encoding: Any = "xml"
    with pytest.raises(ValueError, match="expected msgpack or json, got 'xml'"):
        Carry("http://127.0.0.1:1", encoding=encoding)
    with Carry("http://127.0.0.1:1", deadline_s=0.1) as carry:
        model = carry.model("small")
        names: Any = {"a": []}
        with pytest.raises(TypeError, match="expected events by Stream"):
            model.send_many(names)
        with pytest.raises(ValueError, match="expected each stream once, got twice: \\['a'\\]"):
            model.send_many({model.stream("a"): [], model.stream("a"): []})
        with pytest.raises(ValueError, match="expected streams of model 'small'"):
            model.send_many({carry.model("other").stream("a"): []})
        with pytest.raises(FileNotFoundError, match="in an existing directory"):
            model.stream("a", save=tmp_path / "missing" / "head")
        (tmp_path / "head").write_text("{")
        with pytest.raises(ValueError, match="does not hold the head of a stream"):
            model.stream("a", save=tmp_path / "head")


def test_items_of_many_streams_are_retried_by_themselves(
    model: Model, standin: Standin, events: Events
) -> None:
    standin.fault = failing("one_fails", "one_fails")
    streams = [model.stream(f"s{number}") for number in range(4)]
    outcomes = model.send_many(dict.fromkeys(streams, events[:3]))
    assert list(outcomes) == [f"s{number}" for number in range(4)]
    assert all(isinstance(outcome, Reply) for outcome in outcomes.values())
    assert [stream.position for stream in streams] == [3] * 4
    assert {name: stream.position for name, stream in standin.streams.items()} == dict.fromkeys(
        outcomes, 3
    )


def test_many_streams_recover_from_rollbacks_by_themselves(
    model: Model, standin: Standin, events: Events
) -> None:
    a, b, c = (
        model.stream(name, buffer_events=size) for name, size in (("a", 9), ("b", 0), ("c", 9))
    )
    for part in (events[:2], events[2:4]):
        model.send_many({a: part, b: part, c: part})
    standin.roll_back("a", 1)
    standin.roll_back("b", 1)
    outcomes = model.send_many(dict.fromkeys((a, b, c), events[4:6]))
    assert isinstance(outcomes["b"], StreamRolledBack)
    replies = [outcome for outcome in (outcomes["a"], outcomes["c"]) if isinstance(outcome, Reply)]
    np.testing.assert_array_equal(*(reply.outputs["late"] for reply in replies))


def test_many_streams_continue_behind_a_chunk_whose_reply_is_no_longer_stored(
    model: Model, standin: Standin, events: Events
) -> None:
    """Its outcome is an error, but it was applied."""

    def lose_reply(request: object) -> str | None:
        if not standin.seen:
            return "drop_after"
        if not standin.counts["forgotten"]:
            standin.counts["forgotten"] += 1
            standin.forget_reply("a")
        return None

    standin.fault = lose_reply
    a, b = model.stream("a"), model.stream("b")
    first = model.send_many(dict.fromkeys((a, b), events[:2]))
    second = model.send_many(dict.fromkeys((a, b), events[2:4]))
    assert isinstance(first["a"], errors.AlreadyApplied)
    assert isinstance(first["b"], Reply)
    replies = [outcome for outcome in second.values() if isinstance(outcome, Reply)]
    np.testing.assert_array_equal(*(reply.outputs["late"] for reply in replies))
    assert (a.position, b.position) == (4, 4)


def test_many_streams_notice_another_history(
    model: Model, standin: Standin, events: Events
) -> None:
    mine, others = (model.stream("s") for _ in range(2))
    for part in (events[:2], events[2:4]):
        mine.send(part)
    standin.roll_back("s", 1)
    others.send(events[10:12])
    outcomes = model.send_many({mine: events[4:6]})
    assert isinstance(outcomes["s"], StreamDiverged)


def test_stream_of_another_history_does_not_keep_many_from_being_sent(
    model: Model, standin: Standin, events: Events
) -> None:
    good = model.stream("s")
    good.send(events[:2])
    moved = model.stream("moved", head=good.head)
    model.stream("moved").send(events[:2])
    outcomes = model.send_many({moved: events[2:4], good: events[2:4]})
    assert isinstance(outcomes["moved"], StreamDiverged)
    assert isinstance(outcomes["s"], Reply)


def test_slow_source_sends_what_has_waited_long_enough(small: Stream, events: Events) -> None:
    def slow() -> Iterator[dict[str, Any]]:
        yield from events[:3]
        assert has_reply.wait(60), "the first events wait for the next"
        yield from events[3:5]

    has_reply = threading.Event()
    sizes = []
    for reply in small.send_all(slow(), chunk_events=4, linger_s=0.2):
        sizes.append(len(reply))
        has_reply.set()
    assert sum(sizes) == 5
    assert len(sizes) > 1


def test_abandoned_source_is_not_read_on(small: Stream, events: Events) -> None:
    def endless() -> Iterator[dict[str, Any]]:
        try:
            for _ in itertools.count():
                yield events[0]
        finally:
            ended.set()

    ended = threading.Event()
    replies = small.send_all(endless(), chunk_events=1, linger_s=1, first_position=None)
    assert next(replies).position == 1
    replies.close()
    del replies
    assert ended.wait(60)


def test_error_of_a_source_is_raised(small: Stream, events: Events) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield events[0]
        raise OSError("broken source")

    for linger_s in (None, 5.0):
        with pytest.raises(OSError, match="broken source"):
            list(small.send_all(broken(), linger_s=linger_s, first_position=None))


async def test_asynchronous_client_reads_asynchronous_sources(
    background: str, standin: Standin, events: Events, right: list[float]
) -> None:
    async def source() -> AsyncIterator[dict[str, Any]]:
        for event in events:
            yield event

    standin.fault = failing("drop_after", None, "store_unavailable")
    async with AsyncCarry(background) as carry:
        for name, options in (("s", {}), ("t", {"linger_s": 5.0})):
            stream = carry.model("small").stream(name)
            replies = [
                reply async for reply in stream.send_all(source(), chunk_events=CHUNK, **options)
            ]
            assert late(replies) == right
