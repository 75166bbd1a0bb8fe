"""Proves by measurement what the service promises of a graph, and chooses how to batch it.

On random rows, from states that earlier random rows have led to:

    finite         outputs and states are finite
    deterministic  the same call gives the same bits
    batch          each row of a batch has the values that it has alone, whatever its scale
    cut            chunks, with the state carried between them, give the values of the whole;
                   otherwise the model is `per_chunk`
    padding        rows padded with random values have the values of unpadded rows; otherwise the
                   input of lengths does not share batches of different lengths

Then the ways to batch rows of different lengths that are left are timed, and the fastest is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice, permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import ImportedModelError
from models.onnx.stateful_graph import StatefulGraph
from models.spec.onnx_network import Batching, OnnxNetwork
from models.spec.state import StateSpec

SEED = 20261127
ROWS = 4
STEPS = 9
WARM_STEPS = 6
CUTS = (2, 1, 4, 2)
"""Steps of the chunks that are compared with the whole."""
TOLERANCE = {"float16": 1e-2}
DEFAULT_TOLERANCE = 1e-5
"""Largest |a - b| / (1 + |b|), by the least precise element type of the graph."""
MAX_PERMUTATIONS = 24
TIMED_LENGTHS = (1, 2, 3, 4, 6, 8, 8, 12, 16, 16, 24, 32)
"""Steps of the rows of the timed batch."""

Floats = NDArray[np.float32]
Result = tuple[Floats, Floats]


class Prover:
    """Measures one graph.

    Args:
        network: its signature.
        layout: the layout of its state, with initial values.
        session: a session of it.

    Attributes:
        verified: the measurements, by name.
        notes: what the user should know.
    """

    def __init__(self, network: OnnxNetwork, layout: StateSpec, session: Any):
        self._network, self._layout, self._session = network, layout, session
        self._random = np.random.default_rng(SEED)
        dtypes = [*(x.dtype for x in network.inputs), *(x.dtype for x in network.states)]
        self._tolerance = max(TOLERANCE.get(dtype, DEFAULT_TOLERANCE) for dtype in dtypes)
        self.notes: list[str] = []
        self.verified: dict[str, Any] = {
            "tolerance": self._tolerance,
            "rows": ROWS,
            "steps": STEPS,
        }

    def prove(self) -> OnnxNetwork:
        """Measure everything; returns the graph with its chunking and its way of batching.

        Raises:
            ImportedModelError: outputs are not finite or not deterministic, a row depends on the
                others of its batch, or a state pair is wrong.
        """
        network = self._network
        rows, states = self._random_rows(ROWS, STEPS), self._warm_states()
        whole = self._run(network, rows, states)
        self._check_finite(whole)
        self._check_deterministic(rows, states)
        self._check_batch(rows, states, whole)
        self._check_states_matter(rows, states)
        options: list[Batching] = []
        if network.batching == "step":
            options.append("step")
            self._check_last_step(rows, states)
        else:
            network = self._with_chunking(rows, states, whole)
            options.append("cut" if network.chunking == "invisible" else "equal")
            if network.steps is not None and self._padding_is_invisible(rows, states):
                options.append("padded")
        return network.model_copy(update={"batching": self._fastest(network, options)})

    def _graph(self, network: OnnxNetwork) -> StatefulGraph:
        return StatefulGraph(network, self._layout, self._session)

    def _run(self, network: OnnxNetwork, rows: Floats, states: Floats) -> Result:
        """Run rows of equal lengths; an error of ONNX Runtime ends the import."""
        graph = self._graph(network)
        try:
            if network.batching != "step" and network.batch_size is None:
                return graph.call(rows, None, states)
            return graph.step(rows, np.full(len(rows), rows.shape[1], np.int32), states)
        except Exception as error:  # its exceptions have no common base
            raise ImportedModelError(
                f"ONNX Runtime fails on random rows {list(rows.shape)}: "
                f"{' '.join(str(error).split())[:500]}; run the graph on such rows and export it "
                "again"
            ) from error

    def _in_chunks(self, network: OnnxNetwork, rows: Floats, states: Floats) -> Result:
        parts, at = [], 0
        for steps in CUTS:
            outputs, states = self._run(network, rows[:, at : at + steps], states)
            parts.append(outputs)
            at += steps
        return np.concatenate(parts, axis=1), states

    def _random_rows(self, batch: int, steps: int) -> Floats:
        """Normal numbers, and 0 or 1 for inputs of integers, which may be indices."""
        columns = []
        for each in self._network.inputs:
            shape = (batch, steps, each.columns)
            if each.dtype.startswith("float"):
                columns.append(self._random.standard_normal(shape))
            else:
                columns.append(self._random.integers(0, 2, shape).astype(np.float64))
        return np.concatenate(columns, axis=-1).astype(np.float32)

    def _initial_states(self, rows: int) -> Floats:
        return np.tile(self._layout.pack(self._layout.initial()), (rows, 1))

    def _warm_states(self) -> Floats:
        """A different state for each row, which random rows have led to."""
        rows = self._random_rows(ROWS, WARM_STEPS)
        result = self._run(self._network, rows, self._initial_states(ROWS))
        self._check_finite(result)
        return result[1]

    def _check_finite(self, result: Result) -> None:
        outputs, states = result
        zero = np.zeros(0, np.int64)
        finite = all(self._layout.is_finite(self._layout.unpack(row, zero)) for row in states)
        if not finite or not np.isfinite(outputs).all():
            what = "outputs" if finite else "states"
            raise ImportedModelError(
                f"expected finite {what} on random rows of {self._network.features} features, got "
                "NaN or infinity; check the initial values (`--initial NAME=VALUE`) and the model"
            )

    def _check_deterministic(self, rows: Floats, states: Floats) -> None:
        first, second = (self._run(self._network, rows, states) for _ in range(2))
        if any(a.tobytes() != b.tobytes() for a, b in zip(first, second, strict=True)):
            raise ImportedModelError(
                "expected the same outputs from the same call, got others; export the model for "
                "inference, without dropout (in PyTorch after `model.eval()`)"
            )
        self.verified["deterministic"] = True

    def _check_batch(self, rows: Floats, states: Floats, whole: Result) -> None:
        """Compare rows in a batch with the same rows alone, also rows of different scales."""
        scales = np.logspace(0, -6, ROWS, dtype=np.float32)[:, np.newaxis, np.newaxis]
        gap = 0.0
        for values, together in ((rows, whole), (rows * scales, None)):
            expected = together or self._run(self._network, values, states)
            for at in range(ROWS):
                own = slice(at, at + 1)
                alone = self._run(self._network, values[own], states[own])
                gap = max(gap, self._gap(alone, (expected[0][own], expected[1][own])))
        if not gap <= self._tolerance:
            raise ImportedModelError(
                f"expected each row of a batch to have the values that it has alone, they differ "
                f"by {gap:.1e}: the graph mixes rows (a statistic over the batch?) or the batch "
                "axis of a state is another; export the model for inference, with one dynamic axis "
                "for the batch; or fix the batch, so that each row is a call of its own: `python "
                "-m onnxruntime.tools.make_dynamic_shape_fixed --dim_param NAME_OF_THE_AXIS "
                "--dim_value 1 MODEL.onnx FIXED.onnx`"
            )
        self.verified["batch_equals_alone"] = gap

    def _check_states_matter(self, rows: Floats, states: Floats) -> None:
        """Note each part of the state that changes nothing."""
        expected = self._run(self._network, rows[:, :1], states)
        for part in self._layout.parts:
            changed = states.copy()
            for row, other in zip(changed, np.roll(states, 1, axis=0), strict=True):
                values = {**self._values(row), part.name: self._values(other)[part.name]}
                row[:] = self._layout.pack(self._layout.from_names(values))
            if np.array_equal(changed, states):
                continue
            result = self._run(self._network, rows[:, :1], changed)
            if all(map(np.array_equal, result, expected)):
                self.notes.append(f"the state {part.name!r} changes neither outputs nor states")

    def _with_chunking(self, rows: Floats, states: Floats, whole: Result) -> OnnxNetwork:
        """Compare chunks with the whole."""
        gap = self._gap(self._in_chunks(self._network, rows, states), whole)
        self.verified["cut_equals_whole"] = gap
        if gap <= self._tolerance:
            return self._network
        self._check_permutations(rows, states)
        self.notes.append(
            f"outputs depend on where a stream is cut into chunks (they differ by {gap:.1e} on "
            f"{STEPS} random steps), so each chunk is one call (`chunking: per_chunk`): the graph "
            "reads steps ahead or across the chunk, or a part of its state is not an input"
        )
        return self._network.model_copy(update={"chunking": "per_chunk"})

    def _check_permutations(self, rows: Floats, states: Floats) -> None:
        """Reject pairs that are wrong: with the state outputs of others, cutting is invisible."""
        pairs = self._network.states
        for others in islice(permutations(pairs), 1, MAX_PERMUTATIONS):
            moved = tuple(
                pair.model_copy(update={"output": other.output})
                for pair, other in zip(pairs, others, strict=True)
                if (pair.shape, pair.dtype, pair.batch_axis)
                == (other.shape, other.dtype, other.batch_axis)
            )
            if len(moved) < len(pairs):
                continue
            network = self._network.model_copy(update={"states": moved})
            whole = self._run(network, rows, states)
            if self._gap(self._in_chunks(network, rows, states), whole) <= self._tolerance:
                right = " ".join(f"--state {pair.input}={pair.output}" for pair in moved)
                raise ImportedModelError(
                    "the state pairs are not right: outputs depend on where a stream is cut into "
                    f"chunks, but not with `{right}`"
                )

    def _check_last_step(self, rows: Floats, states: Floats) -> None:
        """For outputs of the last step alone: steps one by one lead to the state of the whole."""
        network = self._network
        if network.axes == "step":
            return
        try:
            whole = self._graph(network).next_states(rows, states)
        except Exception:  # the graph takes one step only
            return
        gap = self._difference(self._run(network, rows, states)[1], whole)
        self.verified["cut_equals_whole"] = gap
        if not gap <= self._tolerance:
            raise ImportedModelError(
                f"its outputs have no axis of time, and steps one by one lead to another state "
                f"than one call (they differ by {gap:.1e}); export the model with an output for "
                "each step, [B, T, ...]"
            )
        self.notes.append(
            "outputs without an axis of time are those of the last step: the graph is run step by "
            "step, so that each event has its own"
        )

    def _padding_is_invisible(self, rows: Floats, states: Floats) -> bool:
        lengths = np.array([1, STEPS, 2, STEPS - 3], np.int32)[: len(rows)]
        padded = self._network.model_copy(update={"batching": "padded"})
        try:
            outputs, after = self._graph(padded).call(rows, lengths, states)
        except Exception:  # its exceptions have no common base
            gap = np.inf
        else:
            gap = 0.0
            for at, length in enumerate(lengths.tolist()):
                own = slice(at, at + 1)
                alone = self._run(self._network, rows[own, :length], states[own])
                gap = max(gap, self._gap((outputs[own, :length], after[own]), alone))
        if gap <= self._tolerance:
            self.verified["padding_invisible"] = gap
            return True
        name = self._network.steps.name if self._network.steps is not None else ""
        self.notes.append(
            f"padding changes results in spite of the input {name!r}, so rows of different lengths "
            "do not share a call"
        )
        return False

    def _fastest(self, network: OnnxNetwork, options: Sequence[Batching]) -> Batching:
        """Time the ways to batch rows of different lengths."""
        rows = self._random_rows(len(TIMED_LENGTHS), max(TIMED_LENGTHS))
        lengths = np.array(TIMED_LENGTHS, np.int32)
        states = self._initial_states(len(rows))
        seconds: dict[Batching, float] = {}
        for batching in options:
            graph = self._graph(network.model_copy(update={"batching": batching}))
            times = []
            for _ in range(4):  # the first one warms up
                began_s = time.perf_counter()
                graph.step(rows, lengths, states)
                times.append(time.perf_counter() - began_s)
            seconds[batching] = min(times[1:])
        self.verified["us_per_step"] = {
            name: round(spent_s / sum(TIMED_LENGTHS) * 1e6, 2) for name, spent_s in seconds.items()
        }
        return min(seconds, key=lambda name: seconds[name])

    def _values(self, row: Floats) -> dict[str, NDArray[Any]]:
        return self._layout.by_name(self._layout.unpack(row, np.zeros(0, np.int64)))

    def _gap(self, mine: Result, expected: Result) -> float:
        """Largest |a - b| / (1 + |b|) of outputs and states."""
        return max(_distance(mine[0], expected[0]), self._difference(mine[1], expected[1]))

    def _difference(self, mine: Floats, expected: Floats) -> float:
        """Largest |a - b| / (1 + |b|) of states, each part in its own element type."""
        gaps = [0.0]
        for row, other in zip(mine, expected, strict=True):
            own, foreign = self._values(row), self._values(other)
            gaps += [_distance(own[name], foreign[name]) for name in own]
        return max(gaps)


def _distance(mine: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest |a - b| / (1 + |b|); infinite if a number is not finite."""
    if not mine.size:
        return 0.0
    a, b = mine.astype(np.float64), expected.astype(np.float64)
    distance = float(np.max(np.abs(a - b) / (1 + np.abs(b))))
    return distance if np.isfinite(distance) else float("inf")
