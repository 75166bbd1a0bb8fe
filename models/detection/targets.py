"""The targets of a model with `detection`: where their values are in a row, and their forecasts."""

from __future__ import annotations

from typing import NamedTuple

from models.events.schema import EventField
from models.spec.layout import anomaly_width, detection_of
from models.spec.model import ModelSpec


class Target(NamedTuple):
    """One target.

    Attributes:
        field: its field of the events.
        encoded: the column of its encoded value.
        raw: the column of its value as it comes; `encoded` if there is no other.
        missing: the column that says that an event has none; None if every event has one.
        normalised: the columns of the stream's running mean and deviation, with `normalisation`.
        parameters: of the forecast.
    """

    field: EventField
    encoded: int
    raw: int
    missing: int | None
    normalised: list[int]
    parameters: slice


def targets_of(spec: ModelSpec) -> list[Target]:
    """The targets of a model's detection, in the order of its head."""
    _, head, events = detection_of(spec)
    columns, found, start = events.column_index, list[Target](), 0
    for name in head.targets:
        field = events.field(name)
        width, encoded = anomaly_width(field), columns[name]
        statistics = f"{name}.mean", f"{name}.std"
        target = Target(
            field=field,
            encoded=encoded,
            raw=columns.get(f"{name}.value", encoded),
            missing=columns.get(f"{name}.missing"),
            normalised=[columns[each] for each in statistics if each in columns],
            parameters=slice(start, start + width),
        )
        found.append(target)
        start += width
    return found
