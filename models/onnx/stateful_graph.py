"""Runs an imported ONNX graph as a pure step: rows, lengths and packed states in, the same out.

    step(rows [B,T,F], lengths [B], states [B,W]) -> (outputs [B,T,O], states [B,W])

It converts between packed rows and the graph's own tensors (`models.spec.onnx_network`): dtypes,
batch axes, time-major axes. Rows of different lengths share a batch as `batching` says. The
importer proves a graph with this class, and the service runs it with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.spec.onnx_network import GraphOutput, OnnxNetwork, StatePair
from models.spec.state import StatePart, StateSpec

Floats = NDArray[np.float32]


class StatefulGraph:
    """One imported graph in one session.

    Args:
        network: the graph's signature.
        layout: the layout of its state, of one part for each state pair; `STARTED` is the last
            part of a graph with an input `start`.
        session: a session of the graph, from `models.onnx.library`.
        run_options: ONNX Runtime's options of its calls.
    """

    def __init__(
        self, network: OnnxNetwork, layout: StateSpec, session: Any, run_options: Any = None
    ):
        self.network = network
        self._layout = layout
        self._session, self._run_options = session, run_options
        names = [output.name for output in network.outputs]
        self._names = list(dict.fromkeys([*names, *(pair.output for pair in network.states)]))
        self._width = sum(prod(output.shape) for output in network.outputs)
        pairs = zip(network.states, layout.parts, strict=False)
        parts = [_Part(pair, part, self._columns(part)) for pair, part in pairs]
        self._parts = sorted(parts, key=lambda part: part.columns.start)
        ends = [0, *accumulate(each.columns for each in network.inputs)]
        self._inputs = [
            (each.name, start if each.width is None else slice(start, end), np.dtype(each.dtype))
            for each, (start, end) in zip(network.inputs, pairwise(ends), strict=True)
        ]

    def _columns(self, part: StatePart) -> slice:
        """The columns of a part in a packed row."""
        own = self._layout.slices[part.name]
        if part.in_floats:
            return own
        first = self._layout.float_size
        return slice(first + 2 * own.start, first + 2 * own.stop)

    def step(
        self, rows: Floats, lengths: NDArray[np.int32], states: Floats
    ) -> tuple[Floats, Floats]:
        """Run every row's steps from its state.

        A row that the graph fails on, for example since an index is out of range, has outputs and
        a state of NaN; the others are not affected.

        Args:
            rows: float32 [B, T, F]; values beyond a length are zero.
            lengths: int32 [B], each 1..T.
            states: float32 [B, W], each as `StateSpec.pack` returns it.

        Returns:
            outputs float32 [B, T, O], undefined beyond a length, and states float32 [B, W].
        """
        if self.network.batching == "padded":
            return self._run(rows, lengths, states)
        if int(np.min(lengths)) == rows.shape[1] and self.network.batching != "step":
            return self._run(rows, None, states)
        outputs = np.zeros((*rows.shape[:2], self._width), np.float32)
        after = states.copy()
        for which, start, end in self._calls(lengths):
            outputs[which, start:end], after[which] = self._run(
                rows[which, start:end], None, after[which]
            )
        return outputs, after

    def _calls(self, lengths: NDArray[np.int32]) -> Iterator[tuple[NDArray[np.intp], int, int]]:
        """The calls of one batch: which rows, and from which step to which."""
        if self.network.batching == "step":
            for step in range(int(np.max(lengths))):
                yield np.flatnonzero(lengths > step), step, step + 1
            return
        start = 0
        for end in np.unique(lengths).tolist():
            if self.network.batching == "equal":
                yield np.flatnonzero(lengths == end), 0, end
            else:
                yield np.flatnonzero(lengths >= end), start, end
                start = end

    def _run(
        self, rows: Floats, lengths: NDArray[np.int32] | None, states: Floats
    ) -> tuple[Floats, Floats]:
        """Run rows, in groups if the graph has a fixed batch; `lengths` is None if all are equal.

        The last group is padded with copies of its last row.
        """
        size = self.network.batch_size or len(rows)
        if size == len(rows):
            return self._run_isolated(rows, lengths, states)
        outputs, after = self._empty(rows, states)
        for start in range(0, len(rows), size):
            which = np.minimum(np.arange(start, start + size), len(rows) - 1)
            own = None if lengths is None else lengths[which]
            outputs[which], after[which] = self._run_isolated(rows[which], own, states[which])
        return outputs, after

    def _run_isolated(
        self, rows: Floats, lengths: NDArray[np.int32] | None, states: Floats
    ) -> tuple[Floats, Floats]:
        """Make one call; if it fails, one for each row, so that only the rows at fault fail."""
        try:
            return self.call(rows, lengths, states)
        except Exception:  # its exceptions have no common base
            outputs, after = self._empty(rows, states)
            for at in range(len(rows)):
                which = np.full(self.network.batch_size or 1, at)
                own = None if lengths is None else lengths[which]
                try:
                    alone = self.call(rows[which], own, states[which])
                    outputs[at], after[at] = alone[0][0], alone[1][0]
                except Exception:
                    if self._run_options is not None and self._run_options.terminate:
                        raise  # another thread terminates the call
                    outputs[at], after[at] = np.nan, np.nan
            return outputs, after

    def _empty(self, rows: Floats, states: Floats) -> tuple[Floats, Floats]:
        return np.empty((*rows.shape[:2], self._width), np.float32), np.empty_like(states)

    def call(
        self, rows: Floats, lengths: NDArray[np.int32] | None, states: Floats
    ) -> tuple[Floats, Floats]:
        """Make one call of the graph; raises whatever ONNX Runtime raises."""
        batch, steps = rows.shape[:2]
        values = self._run_session(rows, lengths, states)
        parts = [
            self._output(output, values[output.name]).reshape(batch, steps, prod(output.shape))
            for output in self.network.outputs
        ]
        outputs = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        if outputs.dtype != np.float32:
            with np.errstate(over="ignore"):  # the caller checks that outputs are finite
                outputs = outputs.astype(np.float32)
        return outputs, self._pack(values)

    def next_states(self, rows: Floats, states: Floats) -> Floats:
        """The states after one call, of a graph whose outputs may have no axis of time."""
        return self._pack(self._run_session(rows, None, states))

    def _run_session(
        self, rows: Floats, lengths: NDArray[np.int32] | None, states: Floats
    ) -> dict[str, NDArray[Any]]:
        """Outputs and state outputs by name."""
        feeds = {**self._feed_rows(rows, lengths), **self._feed_states(states)}
        if self.network.controls:
            feeds.update(self._feed_controls(states))
        values = self._session.run(self._names, feeds, self._run_options)
        return dict(zip(self._names, values, strict=True))

    def _output(self, output: GraphOutput, value: NDArray[Any]) -> NDArray[Any]:
        """An output with the batch first."""
        if output.state_axis:
            return np.moveaxis(value, output.state_axis, 0)
        if output.has_time and self.network.axes == "time_major":
            return value.swapaxes(0, 1)
        if output.state_axis is None and self.network.axes == "unbatched":
            return value[np.newaxis]
        return value

    def _feed_rows(
        self, rows: Floats, lengths: NDArray[np.int32] | None
    ) -> dict[str, NDArray[Any]]:
        network = self.network
        batch, steps = rows.shape[:2]
        if network.axes == "time_major":
            rows = rows.swapaxes(0, 1)
        elif network.axes == "step":
            rows = rows[:, 0]
        elif network.axes == "unbatched":
            rows = rows[0]
        feeds: dict[str, NDArray[Any]] = {
            name: np.ascontiguousarray(rows[..., columns], dtype)
            for name, columns, dtype in self._inputs
        }
        if network.steps is not None:
            if lengths is None:
                lengths = np.full(batch, steps, np.int32)
            valid: NDArray[Any] = lengths
            if network.steps.kind == "mask":
                valid = np.arange(steps) < lengths[:, np.newaxis]
                if network.axes == "time_major":
                    valid = np.ascontiguousarray(valid.T)
                elif network.axes == "unbatched":
                    valid = valid[0]
            feeds[network.steps.name] = valid.astype(network.steps.dtype, copy=False)
        return feeds

    def _feed_states(self, states: Floats) -> dict[str, NDArray[Any]]:
        return {part.pair.input: part.unpack(states) for part in self._parts}

    def _feed_controls(self, states: Floats) -> dict[str, NDArray[Any]]:
        feeds: dict[str, NDArray[Any]] = {}
        for control in self.network.controls:
            is_true = np.full(len(states), control.kind == "ready")
            if control.kind == "start":  # the last column is STARTED, an int64
                is_true = np.ascontiguousarray(states[:, -2:]).view(np.int64)[:, 0] == 0
            no, yes = control.values
            value = np.where(is_true, yes, no).astype(control.dtype)
            feeds[control.name] = value if control.rank == 1 else value[:, np.newaxis]
        return feeds

    def _pack(self, values: dict[str, NDArray[Any]]) -> Floats:
        parts = [part.pack(values[part.pair.output]) for part in self._parts]
        if self.network.has_start:
            parts.append(np.ones((len(parts[0]), 1), np.int64).view(np.float32))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


class _Part:
    """Converts one part of the state between packed rows and the graph's tensor."""

    def __init__(self, pair: StatePair, part: StatePart, columns: slice):
        self.pair, self.columns = pair, columns
        self._part = part
        axes, batch_axis = list(range(1, len(part.shape) + 1)), pair.batch_axis or 0
        self._to_graph = [*axes[:batch_axis], 0, *axes[batch_axis:]]
        self._from_graph = [at for at in range(len(self._to_graph)) if at != batch_axis]
        self._from_graph.insert(0, batch_axis)

    def unpack(self, states: Floats) -> NDArray[Any]:
        """The graph's tensor of packed states [B, W]."""
        values: NDArray[Any] = np.ascontiguousarray(states[:, self.columns])
        if not self._part.in_floats:
            values = values.view(np.int64)
        tensor = self._part.decode(values).reshape(-1, *self._part.shape)
        if self.pair.batch_axis is None:
            return np.ascontiguousarray(tensor[0])
        return np.ascontiguousarray(tensor.transpose(self._to_graph))

    def pack(self, tensor: NDArray[Any]) -> Floats:
        """The columns of the graph's tensor, float32 [B, ...]."""
        if self.pair.batch_axis is None:
            tensor = tensor[np.newaxis]
        values = tensor.transpose(self._from_graph).reshape(-1, self._part.size)
        return np.ascontiguousarray(self._part.encode(values)).view(np.float32)
