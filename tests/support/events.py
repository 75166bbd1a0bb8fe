"""An event schema with every kind of field, and random events under it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from models.events.parse import MAX_TIMESTAMP_MS, MIN_TIMESTAMP_MS
from models.events.schema import EventSchema

FULL_SCHEMA = EventSchema.model_validate(
    {
        "timezone": "America/New_York",
        "fields": [
            {"kind": "numeric", "name": "load", "mean": 3.7, "std": 1.9},
            {
                "kind": "numeric",
                "name": "delay",
                "optional": True,
                "transform": "signed_log1p",
                "mean": -0.4,
                "std": 2.3,
            },
            {"kind": "timestamp", "name": "at", "gap_mean": 2.5, "gap_std": 1.7},
            {
                "kind": "categorical",
                "name": "carrier",
                "embedding": 3,
                "vocabulary": ["UA", "B6", "Österreich", "航空"],
            },
            {"kind": "categorical", "name": "gate", "optional": True, "vocabulary": ["A", "B"]},
            {"kind": "boolean", "name": "heavy"},
            {"kind": "boolean", "name": "late", "optional": True},
        ],
    }
)
"""Required and optional fields of every kind but the timestamp, which is required."""

GOOD: dict[str, Any] = {
    "load": 3,
    "delay": -1.5,
    "at": "2013-01-01T05:17:00-05:00",
    "carrier": "UA",
    "gate": "A",
    "heavy": True,
    "late": False,
}
"""A valid event under it."""

SPARSE_TIMES = FULL_SCHEMA.model_copy(
    update={
        "timezone": "Europe/Vienna",
        "fields": (
            FULL_SCHEMA.field("at").model_copy(update={"optional": True}),
            FULL_SCHEMA.field("load"),
        ),
    }
)
"""An optional timestamp."""

NORMALISED = EventSchema.model_validate(
    {
        "timezone": "Australia/Lord_Howe",
        "fields": [
            {
                "kind": "numeric",
                "name": "load",
                "mean": 3.7,
                "std": 1.9,
                "normalisation": {"memory_events": 7, "prior_events": 3, "clip": 4.0, "std": 0.6},
            },
            {
                "kind": "numeric",
                "name": "delay",
                "optional": True,
                "transform": "signed_log1p",
                "mean": -0.4,
                "std": 2.3,
                "normalisation": {"memory_events": 20, "minimum_std": 0.2, "std": 1.1},
                "season_events": 5,
            },
            {
                "kind": "timestamp",
                "name": "at",
                "gap_mean": 2.5,
                "gap_std": 1.7,
                "calendar": ["yearday", "hour"],
            },
            {
                "kind": "numeric",
                "name": "heat",
                "optional": True,
                "mean": 1.0,
                "std": 2.0,
                "season_events": 3,
            },
            {"kind": "categorical", "name": "carrier", "embedding": 3, "vocabulary": ["UA", "B6"]},
        ],
    }
)
"""Numbers that are standardised by the stream's own values, and seasons."""

_numbers = st.floats(-1e30, 1e30, allow_nan=False)
_near = st.integers(1_350_000_000_000, 1_400_000_000_000)
_times = st.one_of(_near, _near, st.integers(MIN_TIMESTAMP_MS, MAX_TIMESTAMP_MS - 1))
_names = st.one_of(
    st.sampled_from(["UA", "B6", "Österreich", "航空", "A", "B"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
)
_of_kind: dict[str, st.SearchStrategy[Any]] = {
    "numeric": _numbers,
    "timestamp": _times,
    "categorical": _names,
    "boolean": st.booleans(),
}


def events(schema: EventSchema, max_size: int = 70) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Lists of valid events; optional fields are given, null or absent."""
    required = {f.name: _of_kind[f.kind] for f in schema.fields if not f.optional}
    optional = {f.name: st.none() | _of_kind[f.kind] for f in schema.fields if f.optional}
    return st.lists(st.fixed_dictionaries(required, optional=optional), max_size=max_size)
