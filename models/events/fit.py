"""Fits an event schema to a table: numbers and vocabularies that the schema does not specify.

Pass training rows only: fitting on held-out rows is leakage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.errors import DataError
from models.events.columns import EventColumns
from models.events.encode import Clock, event_times, gaps_ms
from models.events.frame import columns_from_frame
from models.events.schema import (
    BooleanField,
    CategoricalField,
    EventField,
    EventSchema,
    NumericField,
    TimestampField,
)
from models.events.values import apply_transform, log_gap
from models.spec.resets import ResetPolicy, find_resets, segments_of

NO_POLICY = ResetPolicy()


def fit_schema(
    schema: EventSchema,
    frame: pl.DataFrame,
    *,
    stream: str,
    resets: ResetPolicy = NO_POLICY,
) -> EventSchema:
    """Fit every number and vocabulary that the schema does not specify.

    A numeric field gets mean and (population) standard deviation of its transformed, present
    values; a constant one gets deviation 1. With `normalisation` it also gets the usual deviation
    of a stream, the median of those that are not constant. A categorical gets its most frequent
    categories, at most `max_vocabulary` of those that occur `min_count` times, by decreasing
    frequency and then by name. A timestamp gets
    mean and deviation of log(1 + gap), with gaps as serving computes them, stream by stream.

    Args:
        schema: the schema; its specified numbers are kept.
        frame: the training rows; those of a stream keep their order.
        stream: column with the name of each row's stream.
        resets: when the model resets states by itself: the first event of a session has no gap.

    Raises:
        DataError: a missing column, a value that the schema rejects, or numbers too
            large to have a finite deviation.
    """
    if stream not in frame.columns:
        raise DataError(field=stream, expected="a column of that name", got=f"{frame.columns}")
    ordered = frame.sort(stream, maintain_order=True)
    columns = columns_from_frame(schema, ordered)
    lengths = ordered[stream].rle().struct.field("len").to_numpy()
    sessions = _sessions(schema, columns, lengths.tolist(), resets)
    fields = [_fit(field, columns, sessions) for field in schema.fields]
    return schema.model_copy(update={"fields": tuple(fields)})


def _fit(
    field: EventField, columns: EventColumns, sessions: Sequence[tuple[int, int]]
) -> EventField:
    present = columns.present[field.name]
    values = columns.values[field.name]
    if field.fitted:
        return field
    match field:
        case NumericField():
            numbers = apply_transform(field, values)
            mean, std = _moments(field.name, numbers[present])
            update: dict[str, Any] = {
                "mean": mean if field.mean is None else field.mean,
                "std": std if field.std is None else field.std,
            }
            own = field.normalisation
            if own is not None and own.std is None:
                usual = _usual_deviation(numbers, present, sessions, own.prior_events)
                update["normalisation"] = own.model_copy(update={"std": usual or update["std"]})
            return field.model_copy(update=update)
        case CategoricalField():
            counts = Counter(values[present].tolist())
            frequent = [name for name, count in counts.items() if count >= field.min_count]
            ranked = sorted(frequent, key=lambda name: (-counts[name], name))
            return field.model_copy(update={"vocabulary": tuple(ranked[: field.max_vocabulary])})
        case TimestampField():
            mean, std = _moments(field.name, _log_gaps(present, values, sessions))
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


def _usual_deviation(
    numbers: NDArray[np.float64],
    present: NDArray[np.bool_],
    sessions: Sequence[tuple[int, int]],
    at_least: int,
) -> float | None:
    """The median of the sessions' deviations, of those with `at_least` values if there are any.

    None if every session is constant.
    """
    kept = [numbers[start:stop][present[start:stop]] for start, stop in sessions]
    long = [values for values in kept if len(values) >= at_least]
    varying = [values for values in long or kept if len(values) and np.ptp(values) > 0]
    positive = [float(np.std(values)) for values in varying]
    return float(np.median(positive)) if positive else None


def _sessions(
    schema: EventSchema, columns: EventColumns, lengths: Sequence[int], resets: ResetPolicy
) -> list[tuple[int, int]]:
    """The rows [start, stop) of each session, stream by stream."""
    sessions = []
    start = 0
    for length in lengths:
        times = event_times(schema, columns[start : start + length])
        cuts = segments_of(length, find_resets(resets, length, 0, times=times))
        sessions += [(start + first, start + end) for first, end in cuts]
        start += length
    return sessions


def _log_gaps(
    present: NDArray[np.bool_],
    times_ms: NDArray[np.int64],
    sessions: Sequence[tuple[int, int]],
) -> NDArray[np.float64]:
    gaps = [np.zeros(0, np.int64)]
    for start, stop in sessions:
        gaps.append(gaps_ms(times_ms[start:stop][present[start:stop]], Clock())[0])
    return log_gap(np.concatenate(gaps))
