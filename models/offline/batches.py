"""Runs a network's step over many sequences at a time, with little padding.

Sequences run side by side: each round takes the next rows of each, the longest first, so that
sequences of similar length share a call, and a call ends where its padding would cost more than
another call. Copies between rows and calls are one indexing operation a call. Only sequences that
last longer than one round hold a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from models.offline.steps import FloatArray, Step
from models.spec.state import IntArray

Advance = Callable[[int], None]

CALL_ROWS: Final = 2048
"""Rows of a call: more leave the caches of the core (`python -m tests.bench --only backfill`)."""
FEWEST_STEPS, MOST_STEPS = 32, 256
"""Steps of a call are chosen between these, by the number of sequences that are left."""
MAX_PADDING: Final = 64
"""Rows of padding in a call, which cost about as much as another call."""
MAX_BATCH: Final = 512


class Sequences(NamedTuple):
    """Sequences of rows.

    Attributes:
        rows: float32 [N, F], of all of them.
        starts: int64 [S], the first row of each.
        lengths: int64 [S], at least 1.
    """

    rows: FloatArray
    starts: IntArray
    lengths: IntArray

    @classmethod
    def of_spans(cls, rows: FloatArray, spans: Sequence[tuple[int, int]]) -> Sequences:
        """The rows [start, stop) of each span, none of which is empty."""
        bounds = np.array(spans, np.int64).reshape(-1, 2)
        return cls(rows, bounds[:, 0], bounds[:, 1] - bounds[:, 0])

    def indexes(self) -> IntArray:
        """The index of every row of the sequences, one after the other."""
        ends = np.cumsum(self.lengths)
        return np.arange(ends[-1]) + np.repeat(self.starts + self.lengths - ends, self.lengths)


def run_rows(
    step: Step,
    sequences: Sequences,
    states: FloatArray,
    width: int,
    *,
    state_of: IntArray | None = None,
    wanted: IntArray | None = None,
    chunk: int | None = None,
    random: np.random.Generator | None = None,
    batch: int = MAX_BATCH,
    advance: Advance | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Run sequences from their states.

    Args:
        step: of the network.
        sequences: S of them.
        states: float32 [K, W]; not modified.
        width: O, values of one step's outputs.
        state_of: int64 [S], which of the states each starts from; by default its own.
        wanted: the sequences whose states are returned; by default all.
        chunk: rows of one sequence in a call, but for its last; None: as many as are fast.
        random: draws the rows of each call uniformly from 1 to `chunk`.
        batch: most sequences in a call.
        advance: called with the number of rows done, after every call.

    Returns:
        The outputs of the sequences, one after the other, float32 [sum of lengths, O], and the
        states after the wanted ones, in their order, float32 [S, W].
    """
    count = len(sequences.starts)
    wanted = np.arange(count) if wanted is None else wanted
    place = np.full(count, -1, np.int64)
    place[wanted] = np.arange(len(wanted))
    result = _Result(
        np.empty((int(sequences.lengths.sum()), width), np.float32),
        np.empty((len(wanted), states.shape[1]), np.float32),
    )
    order = np.argsort(-sequences.lengths, kind="stable")
    running = _Running(
        sequences.starts[order],
        (np.cumsum(sequences.lengths) - sequences.lengths)[order],
        sequences.lengths[order],
        place[order],
        order if state_of is None else state_of[order],
    )
    while len(running.left):
        if random is not None and chunk is not None:
            lengths = np.minimum(random.integers(1, chunk + 1, len(running.left)), running.left)
            by_length = np.argsort(-lengths, kind="stable")
            running, lengths = running.take(by_length), lengths[by_length]
        else:
            fast = min(max(CALL_ROWS // len(running.left), FEWEST_STEPS), MOST_STEPS)
            lengths = np.minimum(chunk or fast, running.left)
        states, running = _run_round(
            step, sequences.rows, states, running, lengths, result, batch, advance
        )
    return result


class _Result(NamedTuple):
    outputs: FloatArray
    after: FloatArray


class _Running(NamedTuple):
    """Sequences that are not done, int64 [R] each.

    Attributes:
        row: the next row.
        output: the place of its output.
        left: rows that are left.
        place: of the state after the last one in the result; -1 if it is not wanted.
        state: index of the state before the next row.
    """

    row: IntArray
    output: IntArray
    left: IntArray
    place: IntArray
    state: IntArray

    def take(self, which: IntArray) -> _Running:
        return _Running(*(column[which] for column in self))


def _run_round(
    step: Step,
    rows: FloatArray,
    states: FloatArray,
    running: _Running,
    lengths: IntArray,
    result: _Result,
    batch: int,
    advance: Advance | None,
) -> tuple[FloatArray, _Running]:
    """Run the next rows of every sequence.

    Args:
        lengths: how many of each, int64 [R], descending.

    Returns:
        The sequences that go on, and their states.
    """
    lasting = np.flatnonzero(running.left > lengths)
    held = np.empty((len(lasting), states.shape[1]), np.float32)
    slot = np.full(len(lengths), -1, np.int64)
    slot[lasting] = np.arange(len(lasting))
    for call in _cut_calls(lengths, batch):
        own, steps = lengths[call], np.arange(lengths[call.start])
        places = running.row[call, np.newaxis] + steps
        outputs = running.output[call, np.newaxis] + steps
        is_full = own[-1] == own[0]
        valid = steps < own[:, np.newaxis]
        if is_full:
            packed = rows[places]
        else:
            packed = np.zeros((*valid.shape, rows.shape[1]), np.float32)
            packed[valid] = rows[places[valid]]
        values, after = step(packed, own.astype(np.int32), states[running.state[call]])
        if is_full:
            result.outputs[outputs] = values
        else:
            result.outputs[outputs[valid]] = values[valid]
        for source, target in ((slot[call], held), (running.place[call], result.after)):
            which = np.flatnonzero(source >= 0)
            target[source[which]] = after[which]
        if advance is not None:
            advance(int(own.sum()))
    rest = _Running(
        running.row + lengths,
        running.output + lengths,
        running.left - lengths,
        running.place,
        slot,
    )
    return held, rest.take(lasting)


def _cut_calls(lengths: IntArray, batch: int) -> Iterator[slice]:
    """Cut sequences into calls of nearly equal lengths.

    Args:
        lengths: int64 [R], descending.
    """
    start = 0
    while start < len(lengths):
        steps = int(lengths[start])
        most = min(batch, max(1, CALL_ROWS // steps))
        padding = np.cumsum(steps - lengths[start : start + most])
        stop = start + int(np.searchsorted(padding, MAX_PADDING, "right"))
        yield slice(start, stop)
        start = stop
