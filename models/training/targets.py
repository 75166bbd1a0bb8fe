"""What heads are trained and scored against: checked before anything is trained.

A head learns from the values of its column before `validate_from`, and its epoch is chosen by
those from there to `test_from`. A table that has none on one of these sides, or one class alone
to learn from, gives losses that say nothing and baselines that cannot be fitted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.decoder import DecoderSpec
from models.errors import DataError
from models.events.schema import BooleanField, CategoricalField
from models.heads import ClassificationHead, Head, LabelHead
from models.layout import event_field
from models.spec import ModelSpec
from models.training.data import Streams, training_of
from models.training.evaluate import scored_rows, spoken_rows
from models.training.labels import Labels
from models.training.scores import Floats, has_targets, truth_of


def check_targets(
    spec: ModelSpec,
    streams: Streams,
    labels: Labels,
    validate_ms: int,
    test_ms: int,
    source: str = "data",
) -> None:
    """Refuse a table that has nothing for one of the heads, or for the decoder, to learn.

    Args:
        spec: with a fitted schema.
        streams, labels: the table.
        validate_ms, test_ms: where validation begins and ends.
        source: what errors call the table.

    Raises:
        DataError: a target has no value on one side, or one class alone to learn from; `field`
            is its column.
    """
    training = training_of(spec)
    train = f"before {training.validate_from} (validate_from)"
    validate = f"from {training.validate_from} to before {training.test_from} (test_from)"
    for head in (*(head for head in spec.heads if has_targets(head)), spec.decoder):
        if head is None:
            continue
        learnt, judged = (
            scored_rows(streams, *span)
            if isinstance(head, DecoderSpec)
            else spoken_rows(head, streams, labels, *span)
            for span in ((None, validate_ms), (validate_ms, test_ms))
        )
        name = "the decoder" if isinstance(head, DecoderSpec) else f"head {head.name!r}"
        for column, known in _known(head, streams, labels):
            for rows, side in ((learnt, train), (judged, validate)):
                if not known[rows].any():
                    raise DataError(
                        field=column,
                        expected=f"{source}: values for {name} {side}",
                        got="none" if column in streams.frame.columns else "no such column",
                    )
            if isinstance(head, ClassificationHead | LabelHead):
                classes = _classes(spec, head, streams, labels, learnt[known[learnt]])
                if len(classes) < 2:
                    raise DataError(
                        field=column,
                        expected=f"{source}: two classes or more for {name} {train}",
                        got=f"{_class_name(spec, head, int(classes[0]))} alone",
                    )


def _known(
    head: Head | DecoderSpec, streams: Streams, labels: Labels
) -> list[tuple[str, NDArray[np.bool_]]]:
    """The columns of a head's targets, and the rows that have a value of each, bool [rows]."""
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
    """The classes that the rows hold, each once."""
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
