"""Runs a model over recorded events: ordered events in, outputs and states out.

Backfills, `carry score`, the reports of training and `carry replay --verify` share it. A table has
the events of many streams, one stream after the other; it is encoded as a whole, cut into segments
where the states are reset, and run side by side (`models.offline.batches`). Outputs do not
depend on which streams share a table, nor, unless the network sees a chunk as a whole, on the
chunks, within the tolerance of `docs/explanation/guarantees.md`; the same table gives the same
bytes on the same kind of processor.

Pure computation: no files, no clocks, no service.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from models.detection.detector import DetectingStep
from models.events.columns import EventColumns
from models.events.encode import Clock, Clocks, EncodedSegments, encode_segments, event_times
from models.events.values import check_rows
from models.offline.batches import MAX_BATCH, Sequences, run_rows
from models.offline.steps import FloatArray, Step, open_step
from models.spec.layout import output_spec, runtime_state, state_spec
from models.spec.model import ModelSpec, schema_of
from models.spec.resets import EventTimes, find_segments
from models.spec.state import IntArray, State

NO_MARKS = np.zeros(0, np.int64)


class EventTable(NamedTuple):
    """Events of S streams, one stream after the other, each in its order.

    Attributes:
        events: T > 0 events; of a model that takes rows these, float32 [T, F].
        starts: int64 [S], ascending, the first event of each stream; the first is 0.
        marks: int64, ascending, the events that are marked: the state is reset before them.
    """

    events: EventColumns | FloatArray
    starts: IntArray
    marks: IntArray = NO_MARKS


class StreamStates(NamedTuple):
    """States of S streams and their positions.

    Attributes:
        floats: float32 [S, N].
        ints: int64 [S, M].
        positions: int64 [S].
    """

    floats: FloatArray
    ints: IntArray
    positions: IntArray


class TableResult(NamedTuple):
    """What a table's events gave.

    Attributes:
        outputs: float32 [T, O], packed as `models.spec.layout.output_spec` says.
        after: of every stream, after its last event.
        resets: int64, ascending, the events that the state was reset before.
        out_of_order: events with an earlier timestamp than one before them since the last reset.
    """

    outputs: FloatArray
    after: StreamStates
    resets: IntArray
    out_of_order: int


class Runner:
    """Runs a model, resets and detection included.

    Args:
        spec: a model that may be cut into chunks anywhere.
        weights: of its network.
        step: the network's step; by default on the runtime that a service prefers.

    Attributes:
        spec: the model.
    """

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, FloatArray], step: Step | None = None
    ) -> None:
        self.spec = spec
        network = step or open_step(spec, weights)
        self._step = network if spec.detection is None else DetectingStep(spec, network)
        self._layout, self._runtime_layout = state_spec(spec), runtime_state(spec)
        self._initial = self._layout.initial()
        self._width = output_spec(spec).size

    def run_table(
        self,
        table: EventTable,
        before: StreamStates | None = None,
        *,
        chunk: int | None = None,
        batch: int = MAX_BATCH,
    ) -> TableResult:
        """Run the events of many streams.

        A table that is too large for the memory may be cut between any two events: its parts give
        the same if each goes on from the states after the one before. The states are not
        validated, but for the clocks.

        Args:
            before: the states of the first streams of the table; all others start from the initial
                state, at position 0.
            chunk: events of a stream in one call of the network, but for its last; None: as many
                as are fast.
            batch: most streams in a call.

        Raises:
            DataError: a value that cannot be encoded; `index` counts from the table's first event.
            StateError: a state with an impossible clock.
        """
        if before is None:
            before = self._no_states()
        starts, steps, known = table.starts, len(table.events), len(before.positions)
        clocks = [Clock.from_ints(self._layout, ints) for ints in before.ints]
        positions = np.zeros(len(starts), np.int64)
        positions[:known] = before.positions
        segments, is_reset = find_segments(
            self.spec.resets,
            starts,
            positions,
            table.marks,
            steps,
            self._times(table.events),
            {at: clock.last_ms for at, clock in enumerate(clocks) if clock.seen},
        )
        # the segments that go on from a given state
        first = np.searchsorted(segments, starts[:known])
        going_on = np.flatnonzero(~is_reset[first])
        last = np.append(np.searchsorted(segments, starts[1:]), len(segments)) - 1
        own = dict(zip(first[going_on].tolist(), map(clocks.__getitem__, going_on), strict=True))
        encoded = self._encode(table.events, segments, own, last)
        state_of = np.zeros(len(segments), np.int64)
        state_of[first[going_on]] = 1 + going_on
        outputs, floats = run_rows(
            self._step,
            Sequences(encoded.rows, segments, np.diff(segments, append=steps)),
            self._pack(before),
            self._width,
            state_of=state_of,
            wanted=last,
            chunk=chunk,
            batch=batch,
        )
        ints = np.tile(self._initial.ints, (len(starts), 1))
        encoded.clocks.write_ints(self._layout, ints)
        after = self._runtime_layout.unpack(floats, ints)
        lengths = np.diff(starts, append=steps)
        return TableResult(
            outputs,
            StreamStates(after.floats, after.ints, positions + lengths),
            segments[is_reset],
            encoded.out_of_order,
        )

    def _no_states(self) -> StreamStates:
        return StreamStates(
            np.zeros((0, self._layout.float_size), np.float32),
            np.zeros((0, self._layout.int_size), np.int64),
            np.zeros(0, np.int64),
        )

    def _times(self, events: EventColumns | FloatArray) -> EventTimes | None:
        if self.spec.events is None or isinstance(events, np.ndarray):
            return None
        return event_times(self.spec.events, events)

    def _encode(
        self,
        events: EventColumns | FloatArray,
        segments: IntArray,
        before: Mapping[int, Clock],
        wanted: IntArray,
    ) -> EncodedSegments:
        if not isinstance(events, np.ndarray):
            return encode_segments(schema_of(self.spec), events, segments, before, wanted)
        check_rows(self.spec.columns, events)
        return EncodedSegments(events, Clocks.new(len(wanted)), 0)

    def _pack(self, states: StreamStates) -> FloatArray:
        """The initial state as a row of the network's step, and behind it the given ones."""
        given = self._runtime_layout.pack(State(states.floats, states.ints))
        return np.concatenate([self._runtime_layout.pack(self._initial)[np.newaxis], given])
