"""Plans training: which steps are for training or validation, and in which order they run.

Invariant: nothing at or after the key `validate` is trained on, neither as an event nor as the
event to be predicted, and nothing at or after `test` is validated on. A label belongs to the
time of its own event: omit labels from the table that are known only later.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models.errors import DataError, SpecError
from models.spec.chunking import non_causal_layers
from models.spec.heads import LabelHead
from models.spec.model import ModelSpec, schema_of
from models.training.data import Streams, training_of
from models.training.labels import Labels
from models.training.scores import has_targets
from models.training.windows import Segment, groups_of, segments_of


def trained_network(spec: ModelSpec) -> ModelSpec:
    """The network that training runs: without its blocks, each sequence as a whole.

    Its weights are those of the network in blocks, and a sequence is at most a window long.
    """
    if spec.blocks is None:
        return spec
    steps = training_of(spec).window_steps
    return spec.model_copy(update={"blocks": None, "max_chunk_steps": steps})


@dataclass(frozen=True)
class Plan:
    """Which steps are trained and which are validated.

    A step belongs to the side of the event *after* it, which it predicts. Its label belongs to the
    side of the step itself.

    Attributes:
        rows: float32 [rows, F], encoded.
        trained, validated: bool [rows].
        trained_labels, validated_labels: label head -> float32 [rows], NaN if there is none
            on that side.
        segments: of the training part of every session.
        groups: indices into `segments`.
        validation: per session with validated steps, the rows to run: from the beginning of
            its last training segment, so that the state is the newest weights' own.
        moments_ms: int64 [rows], as `Streams` has them.
    """

    rows: NDArray[np.float32]
    trained: NDArray[np.bool_]
    validated: NDArray[np.bool_]
    trained_labels: Labels
    validated_labels: Labels
    segments: tuple[Segment, ...]
    groups: tuple[tuple[int, ...], ...]
    validation: tuple[Segment, ...]
    moments_ms: NDArray[np.int64]

    @cached_property
    def following(self) -> NDArray[np.int64]:
        """The row after each row (the last row's is itself)."""
        return np.minimum(np.arange(len(self.rows)) + 1, len(self.rows) - 1)


def plan_of(spec: ModelSpec, streams: Streams, labels: Labels, validate: int, test: int) -> Plan:
    """Lay out training before the key `validate` of the split and validation from there to `test`.

    Args:
        spec: what is trained; in blocks, its `trained_network`.

    Raises:
        DataError: there is nothing to train on, or nothing to validate on.
        SpecError: a head would see the event that it has to predict, or a stream is longer
            than a window, and the network reads it as a whole.
    """
    training = training_of(spec)
    _check_foresight(spec)
    if spec.chunking == "whole":
        _check_lengths(spec, streams)
    spans = []
    # Within a stream keys may go back. What counts is the latest so far: then no training
    # step follows a validated one.
    latest = streams.split_keys.copy()
    for start, stop in streams.spans:
        latest[start:stop] = np.maximum.accumulate(latest[start:stop])
    for start, stop in streams.sessions:
        spans.append((start, start + int(np.searchsorted(latest[start:stop], validate))))
    followed = np.append(latest[1:], latest[-1:])
    trained = streams.has_next & (followed < validate)
    validated = streams.has_next & (followed >= validate) & (followed < test)
    trained_labels = _within(labels, latest < validate)
    validated_labels = _within(labels, (latest >= validate) & (latest < test))
    trains, validates = trained.copy(), validated.copy()
    for values in trained_labels.values():
        trains |= ~np.isnan(values)
    for values in validated_labels.values():
        validates |= ~np.isnan(values)
    steps = training.window_steps * training.segment_windows
    segments = segments_of(spans, steps)
    last = {segment.stop: index for index, segment in enumerate(segments)}
    validation = []
    for (start, stop), (_, end) in zip(streams.sessions, spans, strict=True):
        until = start + int(np.searchsorted(latest[start:stop], test))
        if not validates[start:until].any():
            continue
        index = last.get(end) if end > start else None
        if index is None:
            validation.append(Segment(start, until, None))
        else:
            validation.append(Segment(segments[index].start, until, segments[index].before))
    if not trains.any() or not validates.any():
        raise DataError(
            expected="events to train on and to validate on, each followed by another of its "
            f"stream ({'validate_share' if training.is_split_by_share else 'validate_from'})",
            got=f"{int(trains.sum())} to train on and {int(validates.sum())} to validate on",
        )
    groups = groups_of(segments, training.batch_streams)
    return Plan(
        streams.encoded(schema_of(spec)),
        trained,
        validated,
        trained_labels,
        validated_labels,
        tuple(segments),
        tuple(tuple(group) for group in groups),
        tuple(validation),
        streams.moments_ms,
    )


def _check_foresight(spec: ModelSpec) -> None:
    """Reject a head that would see the event that it has to predict."""
    non_causal = non_causal_layers(spec.layers)
    for head in spec.heads:
        if has_targets(head) and not isinstance(head, LabelHead) and head.input in non_causal:
            raise SpecError(
                f"head {head.name!r} predicts the next event, and layer {head.input!r} has seen "
                "it: expected a label head, or a layer that does not look ahead in its chunk"
            )


def _check_lengths(spec: ModelSpec, streams: Streams) -> None:
    """Reject streams that are too long for one window each."""
    limit = training_of(spec).window_steps
    longest, start = max((stop - start, start) for start, stop in streams.sessions)
    if longest > limit:
        raise SpecError(
            "training.window_steps: the network reads each stream as a whole, in one window; "
            f"expected at least {longest}, the events of {streams.name_of(start)!r}, or shorter "
            f"streams, got {limit}"
        )


def _within(labels: Labels, side: NDArray[np.bool_]) -> Labels:
    """The labels of one side; NaN elsewhere."""
    return {
        name: np.where(side, values, np.nan).astype(np.float32) for name, values in labels.items()
    }
