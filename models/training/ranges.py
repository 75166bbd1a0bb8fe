"""Measures the ranges of a model's inputs and states on its training data.

The network runs over training events in chunks of random lengths, as a service sees them; the norms
are those of each chunk's last event and of the state after it. `low` covers the norms after the
first event of each stream too, since a service has young streams.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.artifact.ranges import QUANTILES, Floats, NormLayout, Ranges
from models.errors import DataError
from models.offline.batches import Sequences, run_rows
from models.offline.steps import Step, open_step
from models.training.burn_in import spans_before
from models.training.data import Streams
from models.training.evaluate import run_network

MAX_EVENTS = 200_000
"""Events that are run, of as many streams as have no more."""
CHUNK = 64
SEED = 0
MARGIN = 0.01
"""By which ranges are wider than the quantiles, relative to them."""

Rows = NDArray[np.float32]


def measure_ranges(
    artifact: Artifact, streams: Streams, before_key: int, source: str = "data"
) -> Ranges:
    """Measure the ranges of a model with events, on those before a key of the split.

    Raises:
        DataError: there are none.
    """
    spec, weights = artifact.spec, artifact.weights
    spans = [span for span in spans_before(streams, before_key) if span[0] < span[1]]
    if not spans:
        raise DataError(expected=f"{source}: events of the training set", got="none")
    # a network that takes whole sequences takes no longer ones
    limit = (spec.chunk_limit if spec.chunking == "whole" else None) or MAX_EVENTS
    spans = [(start, min(stop, start + limit)) for start, stop in spans]
    few = [spans[at] for at in _few([stop - start for start, stop in spans])]

    def run(step: Step, events: int | None) -> None:
        cut = [(start, stop if events is None else start + events) for start, stop in few]
        run_network(spec, weights, streams.windows(cut), step, chunk=CHUNK, seed=SEED)

    return _measure(artifact, run)


def measure_rows_ranges(artifact: Artifact, sequences: list[Rows]) -> Ranges:
    """Measure the ranges of a model that takes rows, float32 [T, F] of each stream."""
    few = [sequences[at] for at in _few([len(rows) for rows in sequences])]
    initial = artifact.network_state.pack(artifact.state.initial())
    chunk = artifact.spec.chunk_limit or CHUNK

    def run(step: Step, events: int | None) -> None:
        cut = [rows[:events] for rows in few]
        ends = np.cumsum([len(rows) for rows in cut]).tolist()
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        states = np.tile(initial, (len(cut), 1))
        random = np.random.default_rng(SEED)
        sequences = Sequences.of_spans(np.concatenate(cut), spans)
        run_rows(step, sequences, states, artifact.outputs.size, chunk=chunk, random=random)

    return _measure(artifact, run)


def _measure(artifact: Artifact, run: Callable[[Step, int | None], None]) -> Ranges:
    """The ranges of a run.

    Args:
        run: runs a step over all streams, or over the first events of each.
    """
    layout = NormLayout(artifact.spec)
    step = open_step(artifact.spec, artifact.weights, artifact.network)
    norms: list[Floats] = []

    def record(rows: Rows, lengths: NDArray[np.int32], states: Rows) -> tuple[Rows, Rows]:
        outputs, after = step(rows, lengths, states)
        running = np.flatnonzero(lengths)
        norms.append(layout.norms(rows[running, lengths[running] - 1], after[running]))
        return outputs, after

    run(record, None)
    of_chunks = np.concatenate(norms)
    low, high = np.quantile(of_chunks, QUANTILES, axis=0)
    norms.clear()
    run(record, 1)
    low = np.minimum(low, np.concatenate(norms).min(axis=0))
    largest = of_chunks.max(axis=0)
    return Ranges(layout.names, (1 - MARGIN) * low, (1 + MARGIN) * high, largest)


def _few(lengths: list[int]) -> list[int]:
    """Some of the streams, of at most `MAX_EVENTS` together."""
    order = np.random.default_rng(SEED).permutation(len(lengths))
    count = int(np.searchsorted(np.cumsum(np.array(lengths)[order]), MAX_EVENTS, side="right"))
    return sorted(order[: max(1, count)].tolist())
