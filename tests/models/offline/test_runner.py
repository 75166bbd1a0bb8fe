"""Recorded events: equal to the oracle, from any state, however streams are cut and batched."""

from __future__ import annotations

import numpy as np
import pytest

from models.errors import DataError
from models.events.columns import EventColumns
from models.events.encode import Clock, encode
from models.offline.runner import OrderedEvents, Runner
from models.spec.layout import state_spec
from models.spec.model import ModelSpec, schema_of
from tests.support.models import small_spec
from tests.support.oracle import contracting_weights, oracle_step
from tests.support.strict_events import columns_from_events

LENGTHS = (1, 37, 12, 80, 5)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    """A model whose streams are reset every 25 events, and by their gaps."""
    return small_spec().model_copy(update={"session_gap_s": 5000.0, "reset_every": 25})


@pytest.fixture(scope="module")
def runner(spec: ModelSpec) -> Runner:
    return Runner(spec, contracting_weights(spec, 4))


@pytest.fixture(scope="module")
def streams(spec: ModelSpec) -> list[EventColumns]:
    return [events_of(spec, length, seed) for seed, length in enumerate(LENGTHS)]


def events_of(spec: ModelSpec, length: int, seed: int) -> EventColumns:
    random = np.random.default_rng(seed)
    times = 1_370_000_000_000 + np.cumsum(random.integers(1, 6_000_000, length))
    events = []
    for moment in times.tolist():
        event = {}
        for field in schema_of(spec).fields:
            match field.kind:
                case "timestamp":
                    event[field.name] = moment
                case "numeric":
                    event[field.name] = float(random.normal())
                case "categorical":
                    event[field.name] = str(random.choice([*(field.vocabulary or ()), "new"]))
                case _:
                    event[field.name] = bool(random.integers(2))
        events.append(event)
    return columns_from_events(schema_of(spec), events)


def test_outputs_equal_the_oracle_on_each_session(
    spec: ModelSpec, runner: Runner, streams: list[EventColumns]
) -> None:
    initial, weights = state_spec(spec).initial(), contracting_weights(spec, 4)
    outputs, _ = runner.run([OrderedEvents("s", each, initial) for each in streams], chunk=7)
    for columns, actual in zip(streams, outputs, strict=True):
        starts = session_starts(spec, columns)
        for start, stop in zip(starts, [*starts[1:], len(columns)], strict=True):
            rows, _ = encode(schema_of(spec), columns[start:stop], Clock())
            expected, _ = oracle_step(spec, weights, rows, initial.floats)
            np.testing.assert_allclose(actual[start:stop], expected, rtol=1e-4, atol=1e-5)


def session_starts(spec: ModelSpec, columns: EventColumns) -> list[int]:
    """Where sessions start, by the definition of both resets."""
    time = schema_of(spec).timestamp
    assert time is not None
    gaps_s = np.diff(columns.values[time.name]) / 1000
    return [at for at in range(len(columns)) if at % 25 == 0 or gaps_s[at - 1] > 5000]


@pytest.mark.parametrize(("chunk", "batch"), [(1, 2), (7, 3), (64, 64), (None, 64)])
def test_outputs_and_states_do_not_depend_on_cuts_chunks_and_batches(
    spec: ModelSpec, runner: Runner, streams: list[EventColumns], chunk: int | None, batch: int
) -> None:
    initial = state_spec(spec).initial()
    whole, last = runner.run([OrderedEvents("s", each, initial) for each in streams])
    cuts = [max(1, len(each) // 3) for each in streams]
    first, states = runner.run(
        [OrderedEvents("s", each[:cut], initial) for each, cut in zip(streams, cuts, strict=True)],
        chunk=chunk,
        batch=batch,
    )
    rest = [
        (number, OrderedEvents("s", each[cut:], state, cut))
        for number, (each, cut, state) in enumerate(zip(streams, cuts, states, strict=True))
        if cut < len(each)
    ]
    second, after = runner.run([events for _, events in rest], chunk=chunk, batch=batch)
    for (number, _), outputs, state in zip(rest, second, after, strict=True):
        joined = np.concatenate([first[number], outputs])
        np.testing.assert_allclose(joined, whole[number], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.floats, last[number].floats, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state.ints, last[number].ints)


def test_a_value_that_cannot_be_encoded_names_stream_and_event(
    spec: ModelSpec, runner: Runner, streams: list[EventColumns]
) -> None:
    name = next(field.name for field in schema_of(spec).fields if field.kind == "numeric")
    columns = streams[2]
    values = columns.values[name].copy()
    values[3] = 1e300
    wrong = EventColumns(len(columns), columns.present, {**columns.values, name: values})
    initial = state_spec(spec).initial()
    with pytest.raises(DataError, match=f"event 3: field '{name}.*stream 'pump'"):
        runner.run([OrderedEvents("pump", wrong, initial)])
