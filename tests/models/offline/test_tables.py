"""Tables of many streams: equal to each segment alone, from any state, cut anywhere."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from models.detection.detector import DetectingStep
from models.errors import DataError
from models.events.columns import EventColumns
from models.events.encode import Clock, encode
from models.offline.runner import EventTable, Runner, StreamStates, TableResult
from models.offline.steps import open_step
from models.spec.layout import runtime_state, state_spec
from models.spec.model import ModelSpec, parse_spec, schema_of
from tests.support.detection import fitted_to_noise
from tests.support.oracle import contracting_weights, oracle_step

SEEDS, DETECTING_SEEDS = range(8), range(2)


class Segment(NamedTuple):
    """Events of a stream from a reset, or its beginning, to the next one, or its end."""

    stream: int
    first: int
    stop: int


class History:
    """A table of streams that differ in length from 1 to hundreds of events, of a small model with
    every kind of field; resets, statistics and absent values by chance."""

    def __init__(self, seed: int, is_detecting: bool = False):
        self.random = random = np.random.default_rng(seed)
        self.spec = spec_of(random, is_detecting)
        self.weights = contracting_weights(self.spec, seed)
        lengths = np.append(random.geometric(0.1, 30), [1, 300, 90])
        random.shuffle(lengths)
        self.steps = int(lengths.sum())
        self.starts = np.cumsum(lengths) - lengths
        self.events = events_of(self.spec, self.steps, random)
        self.marks = np.sort(random.choice(self.steps, 9, replace=False))
        self.runner = Runner(self.spec, self.weights)

    def run(
        self,
        first: int = 0,
        stop: int | None = None,
        before: StreamStates | None = None,
        **cuts: Any,
    ) -> TableResult:
        """Run a range of the events, from the states before its first streams."""
        stop = self.steps if stop is None else stop
        inside = self.starts[(self.starts > first) & (self.starts < stop)]
        marks = self.marks[(self.marks >= first) & (self.marks < stop)]
        table = EventTable(self.events[first:stop], np.append(first, inside) - first, marks - first)
        return self.runner.run_table(table, before, **cuts)

    def segments(self) -> list[Segment]:
        """The segments, by the rules of `models.spec.resets`, event by event."""
        found = []
        for stream, (start, stop) in enumerate(pairwise([*self.starts.tolist(), self.steps])):
            first, latest = start, None
            for at in range(start, stop):
                time = self._time_of(at)
                if self._is_reset_before(at, at - start, latest, time):
                    if at > start:
                        found.append(Segment(stream, first, at))
                    first, latest = at, None
                if time is not None:
                    latest = time if latest is None else max(latest, time)
            found.append(Segment(stream, first, stop))
        return found

    def _is_reset_before(
        self, at: int, position: int, latest: int | None, time: int | None
    ) -> bool:
        every, gap_ms = self.spec.resets
        is_late = False
        if gap_ms is not None and latest is not None and time is not None:
            is_late = time - latest > gap_ms
        return at in self.marks or (every is not None and position % every == 0) or is_late

    def _time_of(self, at: int) -> int | None:
        return int(self.events.values["at"][at]) if self.events.present["at"][at] else None


def spec_of(random: np.random.Generator, is_detecting: bool) -> ModelSpec:
    own: dict[str, Any] = {}
    if random.integers(2):
        own["normalisation"] = {"memory_events": 5, "prior_events": 3, "std": 1.5}
    if random.integers(2):
        own["season_events"] = 3
    optional = bool(random.integers(2))
    fields = [
        {"kind": "timestamp", "name": "at", "gap_mean": 1.0, "gap_std": 2.0, "optional": optional},
        {"kind": "numeric", "name": "x", "mean": 0.5, "std": 2.0, "optional": True, **own},
        {"kind": "numeric", "name": "y", "mean": 0.0, "std": 1.0, "transform": "signed_log1p"},
        {"kind": "categorical", "name": "c", "vocabulary": ["a", "b"], "optional": optional},
        {"kind": "boolean", "name": "b"},
    ]
    head: dict[str, Any] = {"kind": "dense", "name": "out", "units": 2}
    detection = {}
    if is_detecting:
        head = {"kind": "anomaly", "name": "out", "targets": ["x"]}
        detection = {"detection": {"head": "out", "season_events": 4}}
    spec = parse_spec(
        {
            "name": "m",
            "events": {"timezone": "UTC", "fields": fields},
            "layers": [{"kind": "lstm", "units": 3}, {"kind": "gru", "units": 2}],
            "heads": [head],
            "reset_every": random.choice([None, 4, 11]),
            "session_gap_s": random.choice([None, 1.5]),
            **detection,
        }
    )
    return fitted_to_noise(spec) if is_detecting else spec


def events_of(spec: ModelSpec, steps: int, random: np.random.Generator) -> EventColumns:
    """Events with times that go back now and then."""
    values: dict[str, NDArray[Any]] = {
        "at": 1_700_000_000_000 + np.cumsum(random.integers(-500, 2_000, steps)),
        "x": random.normal(size=steps),
        "y": random.normal(size=steps) * 10,
        "c": random.choice(np.array(["a", "b", "new"], object), steps),
        "b": random.integers(2, size=steps).astype(np.bool_),
    }
    present = {}
    for field in schema_of(spec).fields:
        there = np.ones(steps, np.bool_)
        if field.optional:
            there = random.random(steps) < 0.8
            nothing = "" if field.name == "c" else 0
            values[field.name] = np.where(there, values[field.name], nothing)
        present[field.name] = there
    return EventColumns(steps, present, values)


def state_at(states: StreamStates, at: int) -> StreamStates:
    one = slice(at, at + 1)
    return StreamStates(states.floats[one], states.ints[one], states.positions[one])


@pytest.mark.parametrize("seed", SEEDS)
def test_outputs_and_states_equal_the_oracle_on_each_segment(seed: int) -> None:
    history = History(seed)
    layout = state_spec(history.spec)
    initial = layout.initial()
    result = history.run()
    out_of_order, states = 0, {}
    for stream, first, stop in history.segments():
        rows, clock = encode(schema_of(history.spec), history.events[first:stop], Clock())
        outputs, floats = oracle_step(history.spec, history.weights, rows, initial.floats)
        np.testing.assert_allclose(result.outputs[first:stop], outputs, rtol=1e-4, atol=1e-5)
        states[stream] = floats, clock.into_ints(layout, initial.ints)
        out_of_order += clock.out_of_order
    for stream, (floats, ints) in states.items():
        np.testing.assert_allclose(result.after.floats[stream], floats, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(result.after.ints[stream], ints)
    lengths = np.diff(history.starts, append=history.steps)
    np.testing.assert_array_equal(result.after.positions, lengths)
    if schema_of(history.spec).timestamp is not None:
        assert result.out_of_order == out_of_order


@pytest.mark.parametrize("seed", SEEDS)
def test_resets_are_before_the_first_events_of_segments(seed: int) -> None:
    history = History(seed)
    resets = set(history.run().resets.tolist())
    firsts = {segment.first for segment in history.segments()}
    assert firsts - set(history.starts.tolist()) <= resets <= firsts
    every, _ = history.spec.resets
    assert resets >= (set(history.starts.tolist()) if every else set()) | set(history.marks)


@pytest.mark.parametrize("seed", DETECTING_SEEDS)
def test_detection_equals_that_of_each_segment_alone(seed: int) -> None:
    history = History(seed, is_detecting=True)
    step = DetectingStep(history.spec, open_step(history.spec, history.weights))
    initial = runtime_state(history.spec).initial().floats[np.newaxis]
    result = history.run()
    states = {}
    for stream, first, stop in history.segments():
        rows, _ = encode(schema_of(history.spec), history.events[first:stop], Clock())
        outputs, states[stream] = step(rows[np.newaxis], np.array([len(rows)], np.int32), initial)
        np.testing.assert_allclose(result.outputs[first:stop], outputs[0], rtol=1e-4, atol=1e-5)
    after = np.concatenate([states[stream] for stream in range(len(history.starts))])
    np.testing.assert_allclose(result.after.floats, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("seed", "is_detecting"),
    [*((seed, False) for seed in SEEDS), *((seed, True) for seed in DETECTING_SEEDS)],
)
def test_a_table_may_be_cut_between_any_two_events(seed: int, is_detecting: bool) -> None:
    history = History(seed, is_detecting)
    whole = history.run()
    cuts = np.sort(history.random.choice(np.arange(1, history.steps), 12, replace=False))
    parts: list[TableResult] = []
    after: dict[int, StreamStates] = {}
    for first, stop in pairwise([0, *cuts.tolist(), history.steps]):
        stream = int(np.searchsorted(history.starts, first, side="right")) - 1
        is_going_on = first > history.starts[stream]
        part = history.run(first, stop, after[stream] if is_going_on else None)
        parts.append(part)
        for at in range(len(part.after.positions)):
            after[stream + at] = state_at(part.after, at)
    outputs = np.concatenate([part.outputs for part in parts])
    np.testing.assert_allclose(outputs, whole.outputs, rtol=1e-5, atol=1e-6)
    states = [np.concatenate(column) for column in zip(*after.values(), strict=True)]
    np.testing.assert_allclose(states[0], whole.after.floats, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(states[1], whole.after.ints)
    np.testing.assert_array_equal(states[2], whole.after.positions)
    resets = [part.resets + first for first, part in zip([0, *cuts], parts, strict=True)]
    np.testing.assert_array_equal(np.concatenate(resets), whole.resets)
    assert sum(part.out_of_order for part in parts) == whole.out_of_order


@pytest.mark.parametrize(("chunk", "batch"), [(1, 2), (7, 3), (64, 64), (10_000, 1)])
def test_outputs_do_not_depend_on_chunks_and_batches(chunk: int, batch: int) -> None:
    history = History(3)
    outputs, after, _, _ = history.run()
    cut = history.run(chunk=chunk, batch=batch)
    np.testing.assert_allclose(cut.outputs, outputs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cut.after.floats, after.floats, rtol=1e-5, atol=1e-6)


def test_a_repetition_gives_equal_bytes() -> None:
    first, second = (History(5, is_detecting=True).run() for _ in range(2))
    assert first.outputs.tobytes() == second.outputs.tobytes()
    assert first.after.floats.tobytes() == second.after.floats.tobytes()


def test_a_model_that_takes_rows_runs_tables_of_rows() -> None:
    spec = parse_spec(
        {
            "name": "m",
            "features": 3,
            "layers": [{"kind": "lstm", "units": 4}],
            "heads": [{"kind": "dense", "name": "y", "units": 2}],
            "reset_every": 5,
        }
    )
    weights = contracting_weights(spec, 1)
    rows = np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32)
    marks = np.array([9])
    result = Runner(spec, weights).run_table(EventTable(rows, np.array([0, 7]), marks))
    assert result.resets.tolist() == [0, 5, 7, 9, 12, 17]
    initial = state_spec(spec).initial().floats
    for first, stop in pairwise([*result.resets.tolist(), 20]):
        outputs, floats = oracle_step(spec, weights, rows[first:stop], initial)
        np.testing.assert_allclose(result.outputs[first:stop], outputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.after.floats[1], floats, rtol=1e-4, atol=1e-5)
    rows[11, 2] = np.nan
    with pytest.raises(DataError, match="event 11"):
        Runner(spec, weights).run_table(EventTable(rows, np.array([0, 7])))
