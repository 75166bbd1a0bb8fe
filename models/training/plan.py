"""Plans training: windows of the streams, which steps train or validate, and in which order.

A stream's events are split into *segments* of at most `segment_steps`, a segment into *windows* of
nearly equal length, at most `window_steps`. Segments of about the same length run side by side as
one *group*: its windows follow one another, each from the state the last one left, and gradients
stop between them. A segment starts from the state in which the segment before it last ended; a
stream's first segment starts from the zero state. So every event is seen once per epoch, from its
stream's own past, and streams of any lengths share full batches. Within an epoch each step is in
exactly one window, and a window's rows never mix two streams.

Nothing at or after the key `validate` is trained on, neither as an event nor as the event to be
predicted, and nothing at or after `test` is validated on. A label belongs to the time of its own
event: omit labels from the table that are known only later.

A head is trained on the values of its column before `validate_from`, and its best epoch is chosen
on those from there to `test_from`. If a table has no values in one of these ranges, or a single
class to train on, losses are meaningless and baselines cannot be fitted: it is rejected. Few
events of a class in any range are a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
from numpy.typing import NDArray

from models.decoding.losses import Floats, has_targets, is_binary, truth_of
from models.errors import DataError, SpecError
from models.events.schema import BooleanField, CategoricalField
from models.spec.chunking import non_causal_layers
from models.spec.decoder import DecoderSpec
from models.spec.heads import ClassificationHead, Head, LabelHead
from models.spec.layout import event_field
from models.spec.model import ModelSpec, schema_of
from models.training.data import Streams, split_of, training_of
from models.training.evaluate import scored_rows, target_rows
from models.training.labels import Labels

FEW_EVENTS = 10
"""With fewer events of a class in training, validation or test there is a warning."""
LENGTHS_PER_WINDOW = 4
"""Padded window lengths are multiples of a quarter window: few shapes, little padding."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive steps of one stream.

    Attributes:
        start: first row, an index into the rows of all streams.
        stop: one past the last row.
        before: index of the segment that precedes it in its stream, or None for the first.
    """

    start: int
    stop: int
    before: int | None

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a group, padded to T steps and B slots of a batch.

    Attributes:
        index: int64 [B, T], the row that each step reads; padding repeats row 0.
        lengths: int32 [B], valid steps of each slot; 0 if a slot is empty or has ended.
    """

    index: NDArray[np.int64]
    lengths: NDArray[np.int32]


def segments_of(spans: Sequence[tuple[int, int]], segment_steps: int) -> list[Segment]:
    """Split each stream's rows [start, stop) into segments; empty streams have none."""
    segments: list[Segment] = []
    for start, stop in spans:
        before: int | None = None
        for begin in range(start, stop, segment_steps):
            segments.append(Segment(begin, min(begin + segment_steps, stop), before))
            before = len(segments) - 1
    return segments


def groups_of(segments: Sequence[Segment], batch_size: int) -> list[list[int]]:
    """Indices of segments, `batch_size` to a group, those of about the same length together."""
    order = sorted(range(len(segments)), key=lambda i: (-segments[i].steps, i))
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def windows_of(group: Sequence[Segment], batch_size: int, window_steps: int) -> Iterator[Window]:
    """The windows of one group, in order.

    Args:
        group: at most `batch_size` segments; slot i carries segment i.
        batch_size: B.
        window_steps: most steps of a window; the longest segment's are nearly equal.
    """
    longest = max(segment.steps for segment in group)
    count = ceil(longest / window_steps)
    grain = max(1, window_steps // LENGTHS_PER_WINDOW)
    steps = min(window_steps, ceil(ceil(longest / count) / grain) * grain)
    offsets = np.arange(steps, dtype=np.int64)
    starts = np.zeros(batch_size, np.int64)
    stops = np.zeros(batch_size, np.int64)
    starts[: len(group)] = [segment.start for segment in group]
    stops[: len(group)] = [segment.stop for segment in group]
    for begin in range(0, longest, steps):
        first = starts + begin
        lengths = np.clip(stops - first, 0, steps).astype(np.int32)
        index = np.where(offsets < lengths[:, None], first[:, None] + offsets, 0)
        yield Window(index, lengths)


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


def check_targets(
    spec: ModelSpec,
    streams: Streams,
    labels: Labels,
    source: str = "data",
) -> list[str]:
    """Reject a table without usable targets for one of the heads, or for the decoder.

    Args:
        spec: with a fitted schema.
        streams, labels: the table.
        source: what errors call the table.

    Returns:
        Lines about classes of which there are too few events to learn from, to choose the epoch by,
        or to score.

    Raises:
        DataError: a target has no value in one range, or a single class to train on; `field` is
            its column.
    """
    split = split_of(spec)
    warnings: list[str] = []
    for head in (*(head for head in spec.heads if has_targets(head)), spec.decoder):
        if head is None:
            continue
        train_rows, validation_rows, test_rows = (
            scored_rows(streams, *span)
            if isinstance(head, DecoderSpec)
            else target_rows(head, streams, labels, *span)
            for span in ((None, split.validate), (split.validate, split.test), (split.test, None))
        )
        name = "the decoder" if isinstance(head, DecoderSpec) else f"head {head.name!r}"
        for column, has_value in _target_masks(head, streams, labels):
            for rows, range_ in (
                (train_rows, split.train_range),
                (validation_rows, split.validation_range),
            ):
                if not has_value[rows].any():
                    raise DataError(
                        field=column,
                        expected=f"{source}: values for {name} {range_}",
                        got="none" if column in streams.frame.columns else "no such column",
                    )
            if isinstance(head, ClassificationHead | LabelHead):
                classes = _classes(spec, head, streams, labels, train_rows[has_value[train_rows]])
                if len(set(classes.tolist())) < 2:
                    raise DataError(
                        field=column,
                        expected=f"{source}: two classes or more for {name} {split.train_range}",
                        got=f"{_class_name(spec, head, int(classes[0]))} alone",
                    )
                for rows, range_, purpose in (
                    (train_rows, split.train_range, "learn from"),
                    (validation_rows, split.validation_range, "choose the epoch by"),
                    (test_rows, split.test_range, "score"),
                ):
                    found = _classes(spec, head, streams, labels, rows[has_value[rows]])
                    rare = _rare_class(spec, head, found)
                    if rare is not None:
                        warnings.append(
                            f"{name}: {rare} {range_}; expected {FEW_EVENTS} or more to {purpose}"
                        )
    return warnings


def _target_masks(
    head: Head | DecoderSpec, streams: Streams, labels: Labels
) -> list[tuple[str, NDArray[np.bool_]]]:
    """The target columns of a head, each with a mask of the rows that have a value, bool [rows]."""
    if isinstance(head, LabelHead):
        return [(head.source, ~np.isnan(labels[head.name]))]
    names = (head.target,) if isinstance(head, ClassificationHead) else getattr(head, "targets", ())
    return [(name, streams.columns.present[name]) for name in names]


def _classes(
    spec: ModelSpec,
    head: ClassificationHead | LabelHead,
    streams: Streams,
    labels: Labels,
    rows: NDArray[np.int64],
) -> Floats:
    """The class of each row."""
    if isinstance(head, LabelHead):
        return labels[head.name][rows].astype(np.float64)
    return truth_of(spec, head, streams.columns, rows)


def _rare_class(
    spec: ModelSpec, head: ClassificationHead | LabelHead, classes: Floats
) -> str | None:
    """How many events the rarer of two classes has, if they are few, or that all have one class."""
    counts = np.bincount(classes.astype(np.int64), minlength=2)
    if is_binary(spec, head):
        rarest = int(np.argmin(counts))
    elif np.count_nonzero(counts) == 1:
        rarest = int(np.argmax(counts))
        return f"all {len(classes):,} events are {_class_name(spec, head, rarest)}"
    else:
        return None
    if len(classes) == 0 or counts[rarest] >= FEW_EVENTS:
        return None
    return f"{counts[rarest]} of {len(classes):,} events are {_class_name(spec, head, rarest)}"


def _class_name(spec: ModelSpec, head: ClassificationHead | LabelHead, number: int) -> str:
    if isinstance(head, LabelHead):
        return repr(head.classes[number]) if head.classes else ("false", "true")[number]
    field = event_field(spec, head.target)
    if isinstance(field, CategoricalField):
        return repr(field.labels[number])
    if isinstance(field, BooleanField):
        return ("false", "true")[number]
    return f"numbers {('at most', 'above')[number]} {head.above:g}"
