"""The example client against a service, and the example bodies against the model's schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from carry_client import Carry
from examples.client import main
from examples.flights.__main__ import OUT
from models.artifact.artifact import load_artifact
from models.events.columns import canonical_bytes
from models.events.frame import columns_from_frame
from models.pretrained.departures import flight_events
from models.spec.spec_file import read_spec
from tests.support.service import Service
from tests.support.strict_events import columns_from_events, event_adapter

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_example_client_sends_every_departure_once(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    departures = json.loads((EXAMPLES / "departures.json").read_bytes())
    with Carry(service.url) as carry:
        for name in departures:
            carry.model("flights").stream(name).delete()
    main(service.url)
    once = capsys.readouterr().out.splitlines()
    main(service.url)
    ends = [f"{name} is at position {len(events)}" for name, events in departures.items()]
    assert [line for line in once if "position" in line] == ends
    assert len(once) > 2 * len(ends)
    assert capsys.readouterr().out.splitlines() == ends


def test_the_included_model_is_of_its_specification() -> None:
    spec, included = read_spec(EXAMPLES / "flights" / "spec.yaml"), load_artifact(OUT).spec
    assert spec.events is not None
    assert included.events is not None
    assert [field.name for field in included.events.fields] == [
        field.name for field in spec.events.fields
    ]
    assert (included.layers, included.heads) == (spec.layers, spec.heads)
    assert included.training == spec.training


def chunks_of(name: str) -> list[dict[str, Any]]:
    """The chunks in one of the example files."""
    document = json.loads((EXAMPLES / name).read_bytes())
    if name == "departures.json":
        return [{"position": 0, "events": events} for events in document.values()]
    found: list[dict[str, Any]] = document.get("chunks", [document])
    return found


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.json")))
def test_the_example_bodies_hold_events_of_the_flights_model(name: str) -> None:
    schema = read_spec(EXAMPLES / "flights" / "spec.yaml").events
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
    for name in ("first-chunk.json", "second-chunk.json"):
        chunk = chunks_of(name)[0]
        assert chunk["position"] == position
        steps = len(chunk["events"])
        assert chunk["events"] == departures[position : position + steps]
        position += steps
    moments = [np.datetime64(event["departed"][:19]) for event in departures]
    assert moments == sorted(moments)


def test_the_departures_are_those_that_the_replay_sends() -> None:
    """So that a replay goes on where the examples stopped, and its outputs can be verified."""
    spec = read_spec(EXAMPLES / "flights" / "spec.yaml")
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
