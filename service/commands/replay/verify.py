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
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import models
from models.artifact.artifact import Artifact, load_artifact
from models.errors import ArtifactError
from models.events.columns import EventColumns
from models.offline.runner import OrderedEvents, Runner, open_keras_step
from models.spec.layout import output_spec, state_spec
from models.spec.model import ModelSpec
from service.commands.replay.events import ReplayError
from service.commands.replay.send import ABSOLUTE, FloatRows, excess

MAX_PADDED_STEPS = 65_536
"""Rows times steps of one call; a longer stream goes alone."""
PADDING_SHARE = 1.5
"""A stream joins a call while the longest is at most this much longer."""


@dataclass(frozen=True, slots=True)
class Received:
    """One stream's events and the outputs that the replay received.

    Attributes:
        name: the stream.
        columns: its whole events, from event 0 to the position at the end of the replay.
        outputs: float32 [T, O]; NaN if this run received none.
    """

    name: str
    columns: EventColumns
    outputs: FloatRows


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

    @property
    def holds(self) -> bool:
        """Whether every value is within the contract."""
        return self.beyond == 0


@dataclass(frozen=True, slots=True)
class Verification:
    """The result: every output, how many events were compared, and how many were not."""

    outputs: tuple[OutputCheck, ...]
    compared: int
    missing: int

    @property
    def holds(self) -> bool:
        """Whether every output is within the contract."""
        return all(output.holds for output in self.outputs)


def open_artifact(path: Path | None, model: str, version: str) -> Artifact:
    """The artifact of the model that the service serves.

    Args:
        path: its directory; None for the pretrained model of that name.
        model: the model's name.
        version: the version that the service serves.

    Raises:
        ReplayError: there is none, it is damaged, or it is another version than the service's.
    """
    path = path or Path(models.__file__).parent / "pretrained" / model
    try:
        artifact = load_artifact(path)
    except ArtifactError as error:
        raise ReplayError(f"--artifact: {error}") from error
    if artifact.version != version:
        raise ReplayError(
            f"--artifact: expected the model that is served, version {version}, "
            f"got {artifact.version} at {path}"
        )
    return artifact


def check_tensorflow() -> None:
    """Check, before a replay starts, that `keras_runner` will work; does not import TensorFlow.

    Raises:
        ReplayError: TensorFlow, the reference for every runtime, is not installed.
    """
    if find_spec("tensorflow") is None:
        raise ReplayError(
            "--verify compares with Keras and needs TensorFlow, whatever runtime serves: "
            "pip install ./client '.[tensorflow]'"
        )


def keras_runner(artifact: Artifact) -> Runner:
    """Runs the artifact's Keras layers. Imports TensorFlow.

    Raises:
        ReplayError: TensorFlow is not installed.
    """
    check_tensorflow()
    return Runner(artifact.spec, artifact.weights, open_keras_step(artifact.spec, artifact.weights))


def verify_outputs(spec: ModelSpec, runner: Runner, streams: Sequence[Received]) -> Verification:
    """Compare what was received with one call over each stream.

    Args:
        spec: the model, with a fitted event schema.
        runner: `keras_runner(artifact)`.
        streams: a stream without a received output is not computed.
    """
    layout, initial = output_spec(spec), state_spec(spec).initial()
    worst = {output.name: OutputCheck(output.name, 0.0, 0.0, "", 0, 0) for output in layout.outputs}
    compared = missing = 0
    for group in _groups(streams):
        events = [OrderedEvents(stream.name, stream.columns, initial) for stream in group]
        whole, _ = runner.run(events, chunk=None, batch=len(group))
        for stream, expected in zip(group, whole, strict=True):
            is_received = ~np.isnan(stream.outputs).any(axis=1)
            compared += int(is_received.sum())
            steps = np.flatnonzero(is_received)
            for name, columns in layout.slices.items():
                rows = expected[is_received][:, columns]
                check = _check(name, stream, steps, rows, columns)
                worst[name] = _worse(worst[name], check)
    missing = sum(int(np.isnan(stream.outputs).any(axis=1).sum()) for stream in streams)
    return Verification(tuple(worst.values()), compared, missing)


def _check(
    name: str, stream: Received, steps: np.ndarray, expected: FloatRows, columns: slice
) -> OutputCheck:
    actual = stream.outputs[steps][:, columns]
    over = excess(actual, expected)
    # A value that is not a number would compare as within any bound.
    over = np.where(np.isfinite(over), over, np.inf)
    at = int(np.argmax(np.max(over, axis=1)))
    difference = np.max(np.abs(actual.astype(np.float64) - expected))
    beyond = int((over > ABSOLUTE).sum())
    return OutputCheck(
        name,
        float(np.max(over)),
        float(difference),
        stream.name,
        int(steps[at]),
        beyond,
    )


def _worse(a: OutputCheck, b: OutputCheck) -> OutputCheck:
    top = b if b.excess > a.excess or not a.stream else a
    return OutputCheck(
        top.name,
        top.excess,
        max(a.difference, b.difference),
        top.stream,
        top.step,
        a.beyond + b.beyond,
    )


def _groups(streams: Sequence[Received]) -> Iterator[list[Received]]:
    """Streams with received outputs, similar lengths together, within `MAX_PADDED_STEPS`."""
    group: list[Received] = []
    useful = [stream for stream in streams if not np.isnan(stream.outputs).any(axis=1).all()]
    for stream in sorted(useful, key=lambda stream: len(stream.columns)):
        longest = len(stream.columns)
        if group and (
            (len(group) + 1) * longest > MAX_PADDED_STEPS
            or longest > PADDING_SHARE * len(group[0].columns) + 1
        ):
            yield group
            group = []
        group.append(stream)
    if group:
        yield group
