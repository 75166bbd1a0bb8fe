"""Compares every output with one Keras call over its stream's whole sequence.

Independent of how the service computes: the stream's events are encoded in one go from a
fresh clock, and the artifact's Keras layers run once over all steps from the initial state, with
no chunks and no carried state (`models.offline.runner`, each stream in one call). Streams of
similar length share a call to save time; padding is masked.

    |a - b| <= 1e-5 + 1e-5 |b|        a: received, b: the whole-sequence call
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.events.columns import EventColumns
from models.offline.runner import EventTable, Runner
from models.offline.steps import FloatArray, open_keras_step
from models.spec.layout import output_spec
from models.spec.model import ModelSpec

ABSOLUTE: Final = 1e-5
RELATIVE: Final = 1e-5
"""The contract's bounds: |a - b| <= ABSOLUTE + RELATIVE |b|."""

MAX_PADDED_STEPS = 65_536
"""Rows times steps of one call; a longer stream goes alone."""
PADDING_SHARE = 1.5
"""A stream joins a call while the longest is at most this much longer."""


class Received(NamedTuple):
    """A stream's T events, and its outputs, float32 [T, O]; NaN where none were received."""

    name: str
    columns: EventColumns
    outputs: FloatArray


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """One output over all streams.

    Attributes:
        excess: the largest |a - b| - 1e-5 |b|; the contract bounds it by 1e-5.
        difference: the largest |a - b|.
        stream, step: the place of the largest excess.
        beyond: how many values are outside the contract.
    """

    name: str
    excess: float
    difference: float
    stream: str
    step: int
    beyond: int


@dataclass(frozen=True, slots=True)
class Verification:
    """The result: every output, how many events were compared, and how many were not."""

    outputs: tuple[OutputCheck, ...]
    compared: int
    missing: int

    @property
    def holds(self) -> bool:
        """Whether every output is within the contract."""
        return not any(output.beyond for output in self.outputs)


def excess(actual: FloatArray, expected: FloatArray) -> NDArray[np.float64]:
    """|a - b| - RELATIVE |b| in float64; the contract holds if it is at most ABSOLUTE."""
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    return np.asarray(np.abs(a - b) - RELATIVE * np.abs(b))


def keras_runner(artifact: Artifact) -> Runner:
    """Runs the artifact's Keras layers. Imports TensorFlow."""
    return Runner(artifact.spec, artifact.weights, open_keras_step(artifact.spec, artifact.weights))


def verify_outputs(spec: ModelSpec, runner: Runner, streams: Sequence[Received]) -> Verification:
    """Compare what was received with one call over each stream.

    Args:
        spec: the model, with a fitted event schema.
        runner: `keras_runner(artifact)`.
        streams: a stream without a received output is not computed.
    """
    layout = output_spec(spec)
    actual = [np.empty((0, layout.size), np.float32)]
    expected = actual.copy()
    places: list[tuple[str, int]] = []
    for group in _groups(streams):
        longest = max(len(each.columns) for each in group)
        ends = np.cumsum([len(each.columns) for each in group])
        columns = EventColumns.concatenate([each.columns for each in group])
        table = EventTable(columns, np.append(0, ends[:-1]))
        whole = runner.run_table(table, chunk=longest, batch=len(group)).outputs
        for stream, outputs in zip(group, np.split(whole, ends[:-1]), strict=True):
            steps = np.flatnonzero(~np.isnan(stream.outputs).any(axis=1))
            actual.append(stream.outputs[steps])
            expected.append(outputs[steps])
            places += [(stream.name, int(step)) for step in steps]
    received, computed = np.concatenate(actual), np.concatenate(expected)
    checks = tuple(
        _check(name, received[:, columns], computed[:, columns], places)
        for name, columns in layout.slices.items()
    )
    total = sum(len(each.outputs) for each in streams)
    return Verification(checks, len(places), total - len(places))


def _check(
    name: str, actual: FloatArray, expected: FloatArray, places: Sequence[tuple[str, int]]
) -> OutputCheck:
    if not places:
        return OutputCheck(name, 0.0, 0.0, "", 0, 0)
    over = excess(actual, expected)
    # A value that is not a number would compare as within any bound.
    over = np.where(np.isfinite(over), over, np.inf)
    stream, step = places[int(np.argmax(np.max(over, axis=1)))]
    difference = float(np.max(np.abs(actual.astype(np.float64) - expected)))
    beyond = int((over > ABSOLUTE).sum())
    return OutputCheck(name, float(np.max(over)), difference, stream, step, beyond)


def _groups(streams: Sequence[Received]) -> Iterator[list[Received]]:
    """Streams with received outputs, similar lengths together, within `MAX_PADDED_STEPS`."""
    group: list[Received] = []
    useful = [each for each in streams if not np.isnan(each.outputs).any(axis=1).all()]
    for each in sorted(useful, key=lambda each: len(each.outputs)):
        longest = len(each.outputs)
        if group and (
            (len(group) + 1) * longest > MAX_PADDED_STEPS
            or longest > PADDING_SHARE * len(group[0].outputs) + 1
        ):
            yield group
            group = []
        group.append(each)
    if group:
        yield group
