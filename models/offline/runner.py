"""Runs a model over recorded events: ordered events in, outputs and states out.

`carry score`, `carry evaluate`, the reports of training and `carry replay --verify` share it.
Streams run side by side in slots of a batch, each from its own state; when one ends, the next takes
its slot, so that long and short streams cost no padding beside each other. Outputs do not depend on
which streams share a batch, nor, unless the network sees a chunk as a whole, on the chunks.

Pure computation: no files, no clocks, no service.

The step of the network runs on the runtime that a service prefers: ONNX Runtime where it is
installed and a graph can represent the network (it opens in milliseconds, where TensorFlow traces
every shape of a batch for a second), else TensorFlow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.artifact.graphs import ONNXRUNTIME
from models.detection.detector import DetectingStep
from models.errors import DataError, GraphUnsupportedError
from models.events.columns import EventColumns
from models.events.encode import Clock, encode, event_times
from models.onnx.graph import write_graph
from models.onnx.messages import LENGTHS, OUTPUTS, ROWS, STATES, STATES_AFTER
from models.spec.layout import (
    network_outputs,
    network_state,
    output_spec,
    runtime_state,
    state_spec,
)
from models.spec.model import ModelSpec, schema_of
from models.spec.resets import find_resets, segments_of
from models.spec.state import IntArray, State

FloatArray = NDArray[np.float32]
Step = Callable[[FloatArray, NDArray[np.int32], FloatArray], tuple[FloatArray, FloatArray]]
"""rows [B, T, F], lengths [B], states [B, N] -> outputs [B, T, O], states after [B, N].

As `StepNetwork.step`: in blocks the outputs are those of a window's block, [B, C, O]. Rows beyond a
row's length are not read, and one of length 0 keeps its state.
"""


def open_step(
    spec: ModelSpec, weights: Mapping[str, FloatArray], network: bytes | None = None
) -> Step:
    """Open the step of a network; `network` is the graph of an imported one."""
    if network is not None and spec.onnx is not None:
        from models.onnx.library import open_session
        from models.onnx.stateful_graph import StatefulGraph

        session = open_session(network, 0, f"model {spec.name!r}")
        return StatefulGraph(spec.onnx, network_state(spec), session).step
    if find_spec(ONNXRUNTIME) is not None:
        try:
            return _on_onnxruntime(write_graph(spec, weights), spec)
        except GraphUnsupportedError:
            pass
    return open_keras_step(spec, weights)


def _on_onnxruntime(graph: bytes, spec: ModelSpec) -> Step:
    from models.onnx.library import open_session

    session = open_session(graph, 0, f"model {spec.name!r}")
    width = network_outputs(spec).size

    def step(
        rows: FloatArray, lengths: NDArray[np.int32], states: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        output_steps = rows.shape[1] if spec.blocks is None else spec.blocks.size
        outputs = np.zeros((len(rows), output_steps, width), np.float32)
        states_after = states.copy()
        # the graph accepts neither a row of length 0 nor padding other than zero; without any row
        # it ends the process
        running = np.flatnonzero(lengths)
        if not running.size:
            return outputs, states_after
        steps = np.arange(rows.shape[1])
        valid = steps < lengths[running, np.newaxis]
        values, after = session.run(
            [OUTPUTS, STATES_AFTER],
            {
                ROWS: np.where(valid[..., np.newaxis], rows[running], np.float32(0)),
                LENGTHS: lengths[running],
                STATES: states[running],
            },
        )
        outputs[running] = values
        states_after[running] = after
        return outputs, states_after

    return step


def open_keras_step(spec: ModelSpec, weights: Mapping[str, FloatArray]) -> Step:
    """Open the step of a network's Keras layers. Imports TensorFlow."""
    # TensorFlow logs its start to stderr from C++; errors are still logged
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    from models.networks.build import StepNetwork

    network = StepNetwork(spec)
    network.set_weights(weights)
    signature = [
        tf.TensorSpec([None, None, spec.input_features], tf.float32),
        tf.TensorSpec([None], tf.int32),
        tf.TensorSpec([None, network.state_size], tf.float32),
    ]
    traced = tf.function(network.step, autograph=False, input_signature=signature)

    def step(
        rows: FloatArray, lengths: NDArray[np.int32], states: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        outputs, after = traced(rows, lengths, states)
        return outputs.numpy(), np.array(after)

    return step


Advance = Callable[[int], None]


class OrderedEvents(NamedTuple):
    """Events of one stream, in their order.

    Attributes:
        name: the stream, for errors.
        columns: one or more events.
        state: the stream's state before them.
        position: the stream's position before them.
    """

    name: str
    columns: EventColumns
    state: State
    position: int = 0


class Runner:
    """Runs a model with an event schema, resets and detection included.

    Args:
        spec: a model that may be cut into chunks anywhere.
        weights: of its network.
        step: the network's step; by default on the runtime that a service prefers.

    Raises:
        SpecError: the model takes raw rows.
    """

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, FloatArray], step: Step | None = None
    ) -> None:
        self._spec, self._schema = spec, schema_of(spec)
        network = step or open_step(spec, weights)
        self._step = network if spec.detection is None else DetectingStep(spec, network)
        self._layout, self._runtime_layout = state_spec(spec), runtime_state(spec)
        self._initial = self._layout.initial()
        self._width = output_spec(spec).size

    def run(
        self,
        streams: Sequence[OrderedEvents],
        *,
        chunk: int | None = 64,
        batch: int = 64,
        advance: Advance | None = None,
    ) -> tuple[list[FloatArray], list[State]]:
        """Run each stream's events.

        Args:
            streams: S streams.
            chunk: most events of one call of the network; None for each stream in one call.
            batch: most streams in a call.
            advance: called with the number of events done, after every call.

        Returns:
            The packed outputs of each, float32 [T, O], as `models.spec.layout.output_spec` says,
            and its state after its last event.

        Raises:
            DataError: a value that cannot be encoded; `index` counts from the stream's first event.
            StateError: a state with an impossible clock.
        """
        rows: list[FloatArray] = []
        floats: list[FloatArray] = []
        last: list[tuple[int, IntArray]] = []
        for each in streams:
            state = each.state
            clock = Clock.from_ints(self._layout, state.ints)
            times = event_times(self._schema, each.columns, clock)
            steps = len(each.columns)
            resets = find_resets(self._spec.resets, steps, each.position, times=times)
            try:
                encoded, clock = encode(self._schema, each.columns, clock, resets)
            except DataError as error:
                raise DataError(
                    index=error.index,
                    field=error.field,
                    expected=f"stream {each.name!r}: {error.expected}",
                    got=error.got,
                ) from error
            for start, stop in segments_of(steps, resets):
                before = self._initial if start or (resets and resets[0] == 0) else state
                rows.append(encoded[start:stop])
                floats.append(self._runtime_layout.pack(before))
            last.append((len(rows), clock.into_ints(self._layout, before.ints)))
        outputs, after = run_rows(
            self._step,
            rows,
            np.stack(floats),
            self._width,
            chunk=chunk,
            batch=batch,
            advance=advance,
        )
        starts = [0, *(stop for stop, _ in last)]
        return (
            [np.concatenate(outputs[start:stop]) for start, stop in pairwise(starts)],
            [self._runtime_layout.unpack(after[stop - 1], ints) for stop, ints in last],
        )


def run_rows(
    step: Step,
    sequences: Sequence[FloatArray],
    states: FloatArray,
    width: int,
    *,
    chunk: int | None = 64,
    random: np.random.Generator | None = None,
    batch: int = 64,
    advance: Advance | None = None,
) -> tuple[list[FloatArray], FloatArray]:
    """Run encoded sequences, many at a time.

    Args:
        step: of the network.
        sequences: S arrays of one or more rows, float32 [T, F].
        states: float32 [S, N], before each; not modified.
        width: O, values of one step's outputs.
        chunk: most rows of one sequence in a call; None for each sequence in one call.
        random: draws the rows of each call uniformly from 1 to `chunk`.
        batch: most sequences in a call.
        advance: called with the number of rows done, after every call.

    Returns:
        The outputs of each, float32 [T, O], and the states after them, float32 [S, N].
    """
    outputs = [np.empty((len(rows), width), np.float32) for rows in sequences]
    after = states.copy()
    # the longest start first, and those of equal length in their order
    waiting = sorted(range(len(sequences)), key=lambda at: (len(sequences[at]), -at))
    running: list[int] = []
    done = np.zeros(len(sequences), np.int64)
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(waiting.pop())
        lengths = np.array([len(sequences[at]) - done[at] for at in running], np.int32)
        if random is not None and chunk is not None:
            lengths = np.minimum(random.integers(1, chunk + 1, len(running)), lengths)
        elif chunk is not None:
            lengths = np.minimum(chunk, lengths)
        lengths = lengths.astype(np.int32)
        rows = np.zeros((len(running), int(np.max(lengths)), sequences[0].shape[1]), np.float32)
        for slot, (at, length) in enumerate(zip(running, lengths, strict=True)):
            rows[slot, :length] = sequences[at][done[at] : done[at] + length]
        values, after[running] = step(rows, lengths, after[running])
        for slot, (at, length) in enumerate(zip(running, lengths, strict=True)):
            outputs[at][done[at] : done[at] + length] = values[slot, :length]
            done[at] += length
        running = [at for at in running if done[at] < len(sequences[at])]
        if advance is not None:
            advance(int(lengths.sum()))
    return outputs, after
