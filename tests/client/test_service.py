"""Every call against a live service; rollbacks are those of its store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
import redis

from carry_client import AsyncCarry, Carry, Head, Model, Reply, StreamRolledBack, errors
from tests.support.service import Service

DEPARTURES = Path(__file__).parents[2] / "examples" / "departures.json"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def events() -> Events:
    """The departures of one stream."""
    departures: Events = json.loads(DEPARTURES.read_bytes())["EWR-UA"]
    return departures


@pytest.fixture
def flights(carry: Carry, request: pytest.FixtureRequest) -> Iterator[Model]:
    """The model; the streams that begin with `sdk-` are deleted afterwards."""
    model = carry.model("flights")
    yield model
    model.delete_streams("sdk-")


@pytest.fixture
def roll_back(service: Service) -> Iterator[Callable[[str], Callable[[], None]]]:
    """Keeps the stored bytes of a stream, and returns what puts them back."""
    socket = json.loads((service.data_dir / "valkey.json").read_text())["socket"]
    with redis.Redis(unix_socket_path=socket) as client:

        def keep(stream: str) -> Callable[[], None]:
            (key,) = client.keys(f"carry{{*}}:s:flights:{stream}")
            stored = client.dump(key)
            return lambda: client.restore(key, 0, stored, replace=True)

        yield keep


def test_models_are_listed_and_described(carry: Carry) -> None:
    carry.wait_until_ready()
    assert {model.name for model in carry.models()} == {"flights", "post-gru", "post-lstm"}
    description = carry.model("flights").describe()
    # the mark that resets the state is a member of an event, and no field
    assert "reset" not in {field.name for field in description.fields or ()}
    (served,) = (model for model in carry.models() if model.name == "flights")
    assert (served.version, served.takes_events) == (description.version, True)
    assert served.outputs == tuple(output.name for output in description.outputs)
    with pytest.raises(errors.ModelNotFound) as raised:
        carry.model("none").describe()
    assert (raised.value.status, raised.value.is_retryable) == (404, False)
    assert raised.value.request_id


def test_chunks_equal_one_prediction_of_the_whole(flights: Model, events: Events) -> None:
    stream = flights.stream("sdk-whole")
    replies = list(stream.send_all(pl.DataFrame(events), chunk_events=3))
    (whole,) = flights.predict([events])
    for name, outputs in whole.outputs.items():
        chunks = np.concatenate([reply.outputs[name] for reply in replies])
        np.testing.assert_allclose(chunks, outputs, **TOLERANCE)
    frame = pl.concat(reply.to_polars() for reply in replies)
    assert frame["position"].to_list() == list(range(len(events)))
    assert frame.columns[1:5] == ["late", "delay[0.1]", "delay[0.5]", "delay[0.9]"]
    np.testing.assert_allclose(frame["delay[0.5]"], whole.outputs["delay"][:, 0, 1], **TOLERANCE)
    assert whole.to_pandas().to_dict("list") == whole.to_polars().to_dict(as_series=False)
    assert stream.position == len(events)


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_outputs_of_the_last_event_and_the_state(
    service: Service, flights: Model, events: Events, encoding: Any
) -> None:
    with Carry(service.url, encoding=encoding) as carry:
        stream = carry.model("flights").stream(f"sdk-last-{encoding}")
        reply = stream.send(events[:4], return_sequences=False, return_state=True)
        state = stream.state()
    (whole,) = flights.predict([events[:4]])
    assert (len(reply), reply.first_position) == (1, 3)
    np.testing.assert_allclose(reply.outputs["delay"], whole.outputs["delay"][-1], **TOLERANCE)
    assert reply.to_columns()["position"].tolist() == [3]
    assert reply.state is not None
    for name, values in state.values.items():
        np.testing.assert_array_equal(values, reply.state[name])
        assert values.dtype == reply.state[name].dtype


def test_rows_of_encoded_values(carry: Carry) -> None:
    model = carry.model("post-lstm")
    rows = np.linspace(-1, 1, 5 * len(model.describe().codes)).reshape(5, -1)
    stream = model.stream("sdk-rows")
    first, second = stream.send(rows[:2]), stream.send(rows[2:])
    (whole,) = model.predict([rows])
    for name, outputs in whole.outputs.items():
        both = np.concatenate([first.outputs[name], second.outputs[name]])
        np.testing.assert_allclose(both, outputs, **TOLERANCE)
    assert stream.delete()


async def test_every_chunk_of_a_stream_has_its_rate_of_alarms(
    service: Service, events: Events
) -> None:
    """A model without alarms says that it was asked."""
    with Carry(service.url) as carry:
        stream = carry.model("flights").stream("sdk-alarms", false_alarms_per_day=0.2)
        for send in (stream.send, stream.dry_run, lambda some: list(stream.send_all(some))):
            with pytest.raises(errors.InvalidInput, match="false_alarms_per_day: expected none"):
                send(events[:2])
    async with AsyncCarry(service.url) as other:
        streaming = other.model("flights").stream("sdk-alarms", false_alarms_per_day=0.2)
        with pytest.raises(errors.InvalidInput, match="false_alarms_per_day: expected none"):
            await streaming.send(events[:2])


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_resets_dry_runs_and_state_tokens(service: Service, events: Events, encoding: Any) -> None:
    with Carry(service.url, encoding=encoding) as carry:
        model = carry.model("flights")
        parts = [events[:2], events[2:5], events[5:9]]
        sessions = model.predict(parts)
        expected = np.concatenate([part.outputs["delay"] for part in sessions])
        marked = [{**event, "reset": True} if at == 2 else event for at, event in enumerate(events)]

        stream = model.stream(f"sdk-resets-{encoding}")
        dry = stream.dry_run(marked[:9], resets=[5])
        assert (dry.head, stream.position) == (Head(), 0)
        with pytest.raises(errors.StreamNotFound):
            stream.info()
        replies = list(stream.send_all(events[:9], chunk_events=4, resets=[2, 5]))
        found = np.concatenate([reply.outputs["delay"] for reply in replies])
        (whole,) = model.predict([events[:9]], resets=[[2, 5]])
        for outputs in (dry.outputs["delay"], found, whole.outputs["delay"]):
            np.testing.assert_allclose(outputs, expected, **TOLERANCE)
        head = stream.head
        dry = stream.dry_run(events[9:12])
        assert dry.head == head == stream.head == stream.info().head
        reply = stream.send(events[9:12])
        np.testing.assert_allclose(reply.outputs["late"], dry.outputs["late"], **TOLERANCE)
        model.delete_streams("sdk-")

        (first,) = model.predict([events[:4]], return_state_token=True)
        assert first.state_token is not None
        (second,) = model.predict([events[4:9]], state_tokens=[first.state_token])
        assert second.state_token is None
        (whole,) = model.predict([events[:9]])
        late = np.concatenate([first.outputs["late"], second.outputs["late"]])
        np.testing.assert_allclose(late, whole.outputs["late"], **TOLERANCE)
        with pytest.raises(errors.StateTokenInvalid):
            model.predict([events[4:9]], state_tokens=[first.state_token[:-1]])
        with pytest.raises(errors.StateTokenOfOtherModel):
            carry.model("post-lstm").predict([np.zeros((2, 1))], state_tokens=[first.state_token])
        with pytest.raises(ValueError, match="state_tokens: expected one for each sequence"):
            model.predict([events], state_tokens=[])


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
def test_rows_of_another_width_are_rejected_before_they_are_sent(
    service: Service, encoding: Literal["msgpack", "json"]
) -> None:
    rows = np.ones((2, 3))  # of as many bytes as six rows of the model
    with Carry(service.url, encoding=encoding) as carry:
        model = carry.model("post-lstm")
        stream = model.stream("sdk-width")
        sends: list[Callable[[], object]] = [
            lambda: stream.send(rows),
            lambda: stream.dry_run(rows),
            lambda: list(stream.send_all(rows)),
            lambda: model.send_many({stream: rows}),
            lambda: model.predict([rows]),
        ]
        for send in sends:
            expected = r"shape \[T, 1\] for model 'post-lstm', got shape \[2, 3\]"
            with pytest.raises(ValueError, match=expected):
                send()
        with pytest.raises(errors.StreamNotFound):
            stream.info()
        with pytest.raises(errors.InvalidName):
            model.stream("of/two")


def test_resets_are_sent_again_after_a_rollback(
    flights: Model, events: Events, roll_back: Callable[[str], Callable[[], None]]
) -> None:
    stream = flights.stream("sdk-reset-again")
    stream.send(events[:2])
    restore = roll_back("sdk-reset-again")
    stream.send(events[2:6], resets=[1])
    restore()
    reply = stream.send(events[6:8])
    (_, whole) = flights.predict([events[:3], events[3:8]])
    np.testing.assert_allclose(reply.outputs["late"], whole.outputs["late"][3:], **TOLERANCE)


def test_state_is_restored_and_forked(flights: Model, events: Events) -> None:
    stream, copy, fork = (flights.stream(f"sdk-{name}") for name in ("one", "copy", "fork"))
    stream.send(events[:4])
    assert copy.restore(stream.state()).position == 4
    stream.fork(fork)
    assert fork.position == 4
    replies = [each.send(events[4:7]) for each in (stream, copy, fork)]
    for reply in replies[1:]:
        np.testing.assert_array_equal(reply.outputs["late"], replies[0].outputs["late"])
        assert reply.head.epoch != replies[0].head.epoch
    with pytest.raises(errors.StreamExists):
        copy.restore(stream.state())
    with pytest.raises(errors.StreamExists):
        stream.fork(fork)
    assert copy.restore(stream.state(), overwrite=True) == copy.head
    stream.fork(fork, overwrite=True)
    assert fork.info().head == fork.head
    assert set(flights.streams("sdk-")) == {"sdk-one", "sdk-copy", "sdk-fork"}


def test_deletion_says_whether_the_stream_existed(flights: Model, events: Events) -> None:
    stream = flights.stream("sdk-deleted")
    stream.send(events[:4])
    assert stream.delete()
    assert not stream.delete()
    with pytest.raises(errors.StreamNotFound):
        stream.info()
    assert stream.send(events[:2]).is_created
    assert flights.delete_streams("sdk-del") == 1


def test_forecast_of_a_model_without_decoder_is_rejected(flights: Model) -> None:
    with pytest.raises(errors.ForecastUnsupported):
        flights.stream("sdk-none").forecast(3)


def test_items_of_many_streams_have_their_own_outcomes(flights: Model, events: Events) -> None:
    good, bad = flights.stream("sdk-good"), flights.stream("sdk-bad")
    outcomes = flights.send_many({good: events[:2], bad: [{"dep_delay": "late"}]})
    assert isinstance(outcomes["sdk-good"], Reply)
    assert isinstance(outcomes["sdk-bad"], errors.InvalidInput)
    assert (good.position, bad.position) == (2, 0)


@pytest.mark.parametrize("buffer_events", [100, 0])
def test_rollback_of_the_store_is_noticed_and_repaired(
    flights: Model,
    events: Events,
    roll_back: Callable[[str], Callable[[], None]],
    buffer_events: int,
) -> None:
    stream = flights.stream("sdk-rolled", buffer_events=buffer_events)
    earlier = stream.send(events[:4]).head
    put_back = roll_back("sdk-rolled")
    stream.send(events[4:6])
    stream.send(events[6:9])
    put_back()
    if not buffer_events:
        with pytest.raises(StreamRolledBack) as raised:
            stream.send(events[9:12])
        assert raised.value.actual == earlier
        return
    reply = stream.send(events[9:12])
    (whole,) = flights.predict([events[:12]])
    np.testing.assert_allclose(reply.outputs["late"], whole.outputs["late"][9:], **TOLERANCE)
    assert stream.info().head == stream.head


async def test_asynchronous_client(service: Service, events: Events) -> None:
    async with AsyncCarry(service.url) as carry:
        model = carry.model("flights")
        stream, copy = model.stream("sdk-async"), model.stream("sdk-async-copy")
        replies = [reply async for reply in stream.send_all(iter(events), chunk_events=7)]
        assert sum(map(len, replies)) == len(events)
        assert await copy.restore(await stream.state()) == copy.head
        assert isinstance(copy.head, Head)
        outcomes = await model.send_many({stream: events[:1], copy: events[:1]})
        assert len(outcomes) == 2
        assert {name async for name in model.streams("sdk-async")} == {stream.name, copy.name}
        assert await stream.delete()
        assert await model.delete_streams("sdk-") == 1
