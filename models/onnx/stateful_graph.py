"""Runs an imported ONNX graph as a pure step: rows, lengths and packed states in, the same out.

    step(rows [B,T,F], lengths [B], states [B,W]) -> (outputs [B,T,O], states [B,W])

It converts between packed rows and the graph's own tensors (`models.spec.onnx_network`): dtypes,
batch axes, time-major axes. Rows of different lengths share a batch as `batching` says. The
importer proves a graph with this class, and the service runs it with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.spec.onnx_network import OnnxNetwork
from models.spec.state import StateSpec

Floats = NDArray[np.float32]


class StatefulGraph:
    """One imported graph in one session.

    Args:
        network: the graph's signature.
        layout: the layout of its state, of one part for each state pair.
        session: a session of the graph, from `models.onnx.library`.
    """

    def __init__(self, network: OnnxNetwork, layout: StateSpec, session: Any):
        self.network = network
        self._layout = layout
        self._session = session
        self._names = [output.name for output in network.outputs]
        extra = [pair.output for pair in network.states if pair.output not in self._names]
        self._names += extra
        sizes = [int(np.prod(output.shape)) for output in network.outputs]
        self._ends = np.cumsum([0, *sizes]).tolist()

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
        outputs = np.zeros((*rows.shape[:2], self._ends[-1]), np.float32)
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
        """Run rows whose failures are isolated; `lengths` is None if all have the same."""
        most = self.network.batch_size
        if most is not None and len(rows) != most:
            return self._run_in_groups(rows, lengths, states, most)
        try:
            return self.call(rows, lengths, states)
        except Exception:  # its exceptions have no common base
            if len(rows) > 1 and most is None:
                return self._run_in_groups(rows, lengths, states, 1)
            failed = np.full((*rows.shape[:2], self._ends[-1]), np.nan, np.float32)
            return failed, np.full_like(states, np.nan)

    def _run_in_groups(
        self, rows: Floats, lengths: NDArray[np.int32] | None, states: Floats, size: int
    ) -> tuple[Floats, Floats]:
        """Run rows in groups of a size; the last group is padded with copies of its last row."""
        outputs = np.empty((*rows.shape[:2], self._ends[-1]), np.float32)
        after = np.empty_like(states)
        for start in range(0, len(rows), size):
            which = np.minimum(np.arange(start, start + size), len(rows) - 1)
            own = None if lengths is None else lengths[which]
            outputs[which], after[which] = self._run(rows[which], own, states[which])
        return outputs, after

    def call(
        self, rows: Floats, lengths: NDArray[np.int32] | None, states: Floats
    ) -> tuple[Floats, Floats]:
        """Make one call of the graph; raises whatever ONNX Runtime raises."""
        batch, steps = rows.shape[:2]
        values = self._values(rows, lengths, states)
        outputs = np.empty((batch, steps, self._ends[-1]), np.float32)
        with np.errstate(over="ignore"):  # the caller checks that outputs are finite
            for output, start, end in zip(
                self.network.outputs, self._ends, self._ends[1:], strict=False
            ):
                value = values[output.name]
                if output.state_axis:
                    value = np.moveaxis(value, output.state_axis, 0)
                elif output.has_time and self.network.axes == "time_major":
                    value = value.swapaxes(0, 1)
                outputs[:, :, start:end] = value.reshape(batch, steps, end - start)
        return outputs, self._after(values, batch)

    def next_states(self, rows: Floats, states: Floats) -> Floats:
        """The states after one call, of a graph whose outputs may have no axis of time."""
        return self._after(self._values(rows, None, states), len(rows))

    def _values(
        self, rows: Floats, lengths: NDArray[np.int32] | None, states: Floats
    ) -> dict[str, NDArray[Any]]:
        """Outputs and state outputs by name."""
        feeds = {**self._inputs(rows, lengths), **self._states(states)}
        return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))

    def _after(self, values: dict[str, NDArray[Any]], batch: int) -> Floats:
        after = np.empty((batch, self._layout.runtime_size), np.float32)
        for pair, part, columns in self._parts():
            value = np.moveaxis(values[pair.output], pair.batch_axis, 0).reshape(batch, part.size)
            encoded = np.ascontiguousarray(part.encode(value))
            after[:, columns] = encoded.view(np.float32)
        return after

    def _inputs(self, rows: Floats, lengths: NDArray[np.int32] | None) -> dict[str, NDArray[Any]]:
        network = self.network
        batch, steps = rows.shape[:2]
        feeds: dict[str, NDArray[Any]] = {}
        if network.axes == "time_major":
            rows = rows.swapaxes(0, 1)
        elif network.axes == "step":
            rows = rows[:, 0]
        start = 0
        for each in network.inputs:
            part = rows[..., start] if each.width is None else rows[..., start : start + each.width]
            feeds[each.name] = np.ascontiguousarray(part, each.dtype)
            start += each.columns
        if network.steps is not None:
            if lengths is None:
                lengths = np.full(batch, steps, np.int32)
            valid: NDArray[Any] = lengths
            if network.steps.kind == "mask":
                valid = np.arange(steps) < lengths[:, np.newaxis]
                if network.axes == "time_major":
                    valid = np.ascontiguousarray(valid.T)
            feeds[network.steps.name] = valid.astype(network.steps.dtype)
        return feeds

    def _states(self, states: Floats) -> dict[str, NDArray[Any]]:
        feeds: dict[str, NDArray[Any]] = {}
        for pair, part, columns in self._parts():
            values = np.ascontiguousarray(states[:, columns])
            if not part.in_floats:
                values = values.view(np.int64)
            value = part.decode(values).reshape(-1, *part.shape)
            feeds[pair.input] = np.ascontiguousarray(np.moveaxis(value, 0, pair.batch_axis))
        return feeds

    def _parts(self) -> Iterator[tuple[Any, Any, slice]]:
        """Each pair with its part and the part's columns of a packed state."""
        for pair, part in zip(self.network.states, self._layout.parts, strict=True):
            own = self._layout.slices[part.name]
            if not part.in_floats:
                first = self._layout.float_size
                own = slice(first + 2 * own.start, first + 2 * own.stop)
            yield pair, part, own
