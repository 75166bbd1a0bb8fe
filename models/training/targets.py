"""Validates training targets before training starts.

A head is trained on the values of its column before `validate_from`, and its best epoch is chosen
on those from there to `test_from`. If a table has no values in one of these ranges, or a single
class to train on, losses are meaningless and baselines cannot be fitted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.errors import DataError
from models.events.schema import BooleanField, CategoricalField
from models.spec.decoder import DecoderSpec
from models.spec.heads import ClassificationHead, Head, LabelHead
from models.spec.layout import event_field
from models.spec.model import ModelSpec
from models.training.data import Streams
from models.training.evaluate import scored_rows, target_rows
from models.training.labels import Labels
from models.training.scores import Floats, has_targets, truth_of
from models.training.split import split_of


def check_targets(
    spec: ModelSpec,
    streams: Streams,
    labels: Labels,
    source: str = "data",
) -> None:
    """Reject a table without usable targets for one of the heads, or for the decoder.

    Args:
        spec: with a fitted schema.
        streams, labels: the table.
        source: what errors call the table.

    Raises:
        DataError: a target has no value in one range, or a single class to train on; `field` is
            its column.
    """
    split = split_of(spec)
    for head in (*(head for head in spec.heads if has_targets(head)), spec.decoder):
        if head is None:
            continue
        train_rows, validation_rows = (
            scored_rows(streams, *span)
            if isinstance(head, DecoderSpec)
            else target_rows(head, streams, labels, *span)
            for span in ((None, split.validate), (split.validate, split.test))
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
                if len(classes) < 2:
                    raise DataError(
                        field=column,
                        expected=f"{source}: two classes or more for {name} {split.train_range}",
                        got=f"{_class_name(spec, head, int(classes[0]))} alone",
                    )


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
    """The distinct classes of the rows."""
    if isinstance(head, LabelHead):
        return np.unique(labels[head.name][rows].astype(np.float64))
    return np.unique(truth_of(spec, head, streams.columns, rows))


def _class_name(spec: ModelSpec, head: ClassificationHead | LabelHead, number: int) -> str:
    if isinstance(head, LabelHead):
        return repr(head.classes[number]) if head.classes else ("false", "true")[number]
    field = event_field(spec, head.target)
    if isinstance(field, CategoricalField):
        return repr(field.labels[number])
    if isinstance(field, BooleanField):
        return ("false", "true")[number]
    return f"numbers {('at most', 'above')[number]} {head.above:g}"
