"""The example client over faults, and the example bodies against the model's schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from carry_client import Carry, Problem, Stream
from examples.client import CHUNK_EVENTS
from models.events.columns import canonical_bytes, columns_from_events
from models.events.frame import columns_from_frame
from models.events.parse import event_adapter
from models.examples.flights.data import flight_events
from models.spec.spec_file import read_spec
from service.replay.source import StreamEvents
from tests.service.replay.standin import Standin

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def carry(background: str) -> Iterator[Carry]:
    with Carry(background) as carry:
        yield carry


@pytest.fixture
def events(streams: list[StreamEvents]) -> list[dict[str, Any]]:
    """The events of the stream `s:3`."""
    (stream,) = (stream for stream in streams if stream.name == "s:3")
    return stream.events(0, len(stream))


def outputs_of(sent: list[tuple[int, dict[str, Any]]]) -> dict[int, float]:
    """The last output of every event, by its position."""
    return {
        start + step: value for start, outputs in sent for step, value in enumerate(outputs["late"])
    }


def test_every_event_is_applied_once(
    carry: Carry, standin: Standin, events: list[dict[str, Any]]
) -> None:
    stream = Stream(carry, "small", "s:3")
    sent = list(stream.send_all(events, CHUNK_EVENTS))
    assert [start for start, _ in sent] == list(range(0, len(events), CHUNK_EVENTS))
    assert standin.streams["s:3"].position == stream.position == len(events)
    assert list(Stream(carry, "small", "s:3").send_all(events, CHUNK_EVENTS)) == []


@pytest.mark.parametrize("fault", ["drop", "drop_after", "store_unavailable", "outcome_unknown"])
def test_failed_chunk_is_repeated_with_its_position(
    carry: Carry, standin: Standin, events: list[dict[str, Any]], fault: str
) -> None:
    right = outputs_of(list(Stream(carry, "small", "right").send_all(events, CHUNK_EVENTS)))
    faults = iter([None, fault, None, None, fault])
    standin.fault = lambda request: next(faults, None)
    assert outputs_of(list(Stream(carry, "small", "s:3").send_all(events, CHUNK_EVENTS))) == right
    assert standin.streams["s:3"].position == len(events)


def test_rolled_back_stream_is_sent_again_from_its_position(
    carry: Carry, standin: Standin, events: list[dict[str, Any]]
) -> None:
    right = outputs_of(list(Stream(carry, "small", "right").send_all(events, CHUNK_EVENTS)))
    stream = Stream(carry, "small", "s:3")
    sent = []
    for chunk in stream.send_all(events, CHUNK_EVENTS):
        sent.append(chunk)
        if len(sent) == 4:
            standin.roll_back("s:3", 3)
    starts = [start // CHUNK_EVENTS for start, _ in sent]
    assert starts == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7]
    assert outputs_of(sent) == right


def test_stream_resumes_where_another_run_stopped(
    carry: Carry, standin: Standin, events: list[dict[str, Any]]
) -> None:
    list(Stream(carry, "small", "s:3").send_all(events[:20], CHUNK_EVENTS))
    sent = list(Stream(carry, "small", "s:3").send_all(events, CHUNK_EVENTS))
    assert sent[0][0] == 20
    assert standin.streams["s:3"].position == len(events)


def test_problem_that_is_not_retryable_is_raised(
    carry: Carry, standin: Standin, events: list[dict[str, Any]]
) -> None:
    standin.fault = lambda request: "refuse"
    with pytest.raises(Problem, match="invalid_input"):
        list(Stream(carry, "small", "s:3").send_all(events, CHUNK_EVENTS))


def chunks_of(name: str) -> list[dict[str, Any]]:
    """The chunks in one of the example files."""
    document = json.loads((EXAMPLES / name).read_bytes())
    if name == "departures.json":
        return [{"position": 0, "events": events} for events in document.values()]
    found: list[dict[str, Any]] = document.get("chunks", [document])
    return found


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.json")))
def test_the_example_bodies_hold_events_of_the_flights_model(name: str) -> None:
    schema = read_spec(ROOT / "models" / "examples" / "flights" / "spec.yaml").events
    assert schema is not None
    adapter = event_adapter(schema)
    fields = {field.name for field in schema.fields}
    for chunk in chunks_of(name):
        assert chunk["events"]
        for event in chunk["events"]:
            adapter.validate_json(json.dumps(event))
            assert set(event) == fields


def test_the_chunks_of_a_stream_follow_one_another() -> None:
    position = 0
    departures = json.loads((EXAMPLES / "departures.json").read_bytes())["EWR-UA"]
    for name in ("first-chunk.json", "second-chunk.json", "many-streams.json"):
        chunk = chunks_of(name)[0]
        assert chunk["position"] == position
        steps = len(chunk["events"])
        assert chunk["events"] == departures[position : position + steps]
        position += steps
    moments = [np.datetime64(event["departed"][:19]) for event in departures]
    assert moments == sorted(moments)


def test_the_departures_are_those_that_the_replay_sends() -> None:
    """So that a replay goes on where the examples stopped, and its outputs can be verified."""
    spec = read_spec(ROOT / "models" / "examples" / "flights" / "spec.yaml")
    assert spec.events is not None
    frame = flight_events("airport-carrier")
    given = json.loads((EXAMPLES / "departures.json").read_bytes())
    for name, events in given.items():
        rows = frame.filter(frame["stream"] == name).head(len(events))
        adapter = event_adapter(spec.events)
        sent = columns_from_events(spec.events, [adapter.validate_python(e) for e in events])
        recorded = columns_from_frame(spec.events, rows)
        assert canonical_bytes(spec.events, sent) == canonical_bytes(spec.events, recorded), name
    first = json.loads((EXAMPLES / "first-chunk.json").read_bytes())["events"]
    second = json.loads((EXAMPLES / "second-chunk.json").read_bytes())["events"]
    assert first + second == given["EWR-UA"][:6]
