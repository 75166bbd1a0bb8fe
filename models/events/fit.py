"""Fits an event schema: means, deviations, vocabularies and gap statistics from a table.

Only values that the schema does not specify are fitted. Pass training rows only: fitting on
held-out rows is leakage.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.errors import DataError
from models.events.columns import EventColumns
from models.events.encode import Clock, gaps_ms, log_gap, transformed
from models.events.frame import columns_from_frame
from models.events.schema import (
    BooleanField,
    CategoricalField,
    EventField,
    EventSchema,
    NumericField,
    TimestampField,
)
from models.spec.resets import EventTimes, ResetPolicy, find_resets, segments_of

NO_POLICY = ResetPolicy()


def fit_schema(
    schema: EventSchema,
    frame: pl.DataFrame,
    *,
    stream: str,
    order: str | None = None,
    resets: ResetPolicy = NO_POLICY,
) -> EventSchema:
    """Fit every number and vocabulary that the schema does not specify.

    A numeric field gets mean and (population) standard deviation of its transformed, present
    values; a constant one gets deviation 1. A categorical gets its most frequent categories,
    at most `max_vocabulary`, by decreasing frequency and then by name. A timestamp gets mean and
    deviation of log(1 + gap), with gaps as serving computes them, stream by stream.

    Args:
        schema: the schema; its specified numbers are kept.
        frame: the training rows.
        stream: column with the name of each row's stream.
        order: column that orders a stream's events; ties, and all rows if
            it is None, keep their order.
        resets: when the model resets states by itself: the first event of a session has no gap.

    Raises:
        DataError: a missing column, a value that the schema rejects, or numbers too
            large to have a finite deviation.
    """
    for name in (stream, order):
        if name is not None and name not in frame.columns:
            raise DataError(field=name, expected="a column of that name", got=f"{frame.columns}")
    keys = [stream] if order is None else [stream, order]
    ordered = frame.sort(keys, maintain_order=True)
    columns = columns_from_frame(schema, ordered)
    lengths = ordered[stream].rle().struct.field("len").to_numpy()
    fields = [_fit(field, columns, lengths, resets) for field in schema.fields]
    return schema.model_copy(update={"fields": tuple(fields)})


def _fit(
    field: EventField, columns: EventColumns, lengths: NDArray[Any], resets: ResetPolicy
) -> EventField:
    present = columns.present[field.name]
    values = columns.values[field.name]
    if field.fitted:
        return field
    match field:
        case NumericField():
            mean, std = _moments(field.name, transformed(field, values[present]))
            return field.model_copy(
                update={
                    "mean": mean if field.mean is None else field.mean,
                    "std": std if field.std is None else field.std,
                }
            )
        case CategoricalField():
            counts = Counter(values[present].tolist())
            ranked = sorted(counts, key=lambda name: (-counts[name], name))
            return field.model_copy(update={"vocabulary": tuple(ranked[: field.max_vocabulary])})
        case TimestampField():
            mean, std = _moments(field.name, _log_gaps(present, values, lengths, resets))
            return field.model_copy(
                update={
                    "gap_mean": mean if field.gap_mean is None else field.gap_mean,
                    "gap_std": std if field.gap_std is None else field.gap_std,
                }
            )
        case BooleanField():
            return field


def _moments(name: str, values: NDArray[np.float64]) -> tuple[float, float]:
    if len(values) == 0:
        return 0.0, 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(np.mean(values)), float(np.std(values))
    if not np.isfinite(mean) or not np.isfinite(std):
        raise DataError(
            field=name,
            expected="numbers with a finite mean and deviation",
            got=f"numbers up to {float(np.max(np.abs(values))):g}; try transform: signed_log1p",
        )
    constant = bool(np.min(values) == np.max(values)) or std == 0
    return mean, 1.0 if constant else std


def _log_gaps(
    present: NDArray[np.bool_],
    times_ms: NDArray[np.int64],
    lengths: NDArray[Any],
    resets: ResetPolicy,
) -> NDArray[np.float64]:
    gaps = [np.zeros(0, np.int64)]
    start = 0
    for length in lengths.tolist():
        stop = start + length
        times = EventTimes(times_ms[start:stop], present[start:stop])
        for first, end in segments_of(length, find_resets(resets, length, 0, times=times)):
            session = times.times_ms[first:end][times.present[first:end]]
            gaps.append(gaps_ms(session, Clock())[0])
        start = stop
    return log_gap(np.concatenate(gaps))
