"""Segments of many streams are encoded as each alone: the same bits of rows and clocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.events import encode as encoder
from models.events.columns import EventColumns
from models.events.encode import Clock, encode, encode_segments
from models.events.schema import EventSchema
from models.events.segment_statistics import WIDE

OWN: list[dict[str, Any]] = [
    {},
    {"normalisation": {"memory_events": 4, "prior_events": 3, "std": 1.5, "clip": 2.0}},
    {"normalisation": {"memory_events": 9, "prior_events": 1, "std": 0.5}, "season_events": 3},
    {"season_events": 2},
    {"normalisation": {"memory_events": 2, "prior_events": 50, "std": 1.0}, "optional": True},
]


def schema_of(*own: dict[str, Any]) -> EventSchema:
    return EventSchema.model_validate(
        {
            "timezone": "UTC",
            "fields": [
                {"kind": "timestamp", "name": "at", "gap_mean": 1.0, "gap_std": 2.0},
                *(
                    {"kind": "numeric", "name": f"x{at}", "mean": 0.5, "std": 2.0, **each}
                    for at, each in enumerate(own)
                ),
            ],
        }
    )


def events_of(schema: EventSchema, steps: int, random: np.random.Generator) -> EventColumns:
    """Constant values now and then, so that deviations are least, and outliers, which are cut."""
    present = {field.name: np.ones(steps, np.bool_) for field in schema.fields}
    values: dict[str, Any] = {"at": np.cumsum(random.integers(-300, 2_000, steps)) + 10**12}
    for field in schema.fields[1:]:
        values[field.name] = np.round(random.standard_t(2, steps), 1)
        values[field.name][random.random(steps) < 0.3] = 0.5
        if field.optional:
            present[field.name] = random.random(steps) < 0.7
            values[field.name][~present[field.name]] = 0.0
    return EventColumns(steps, present, values)


@pytest.mark.parametrize("own", [OWN[:1], OWN[1:2], OWN[2:4], OWN], ids=len)
@pytest.mark.parametrize("segments", [3, 2 * WIDE])
def test_rows_and_clocks_equal_those_of_each_segment_alone(
    monkeypatch: pytest.MonkeyPatch, own: list[dict[str, Any]], segments: int
) -> None:
    monkeypatch.setattr(encoder, "PART_EVENTS", 7)
    random = np.random.default_rng(segments)
    schema = schema_of(*own)
    lengths = random.geometric(0.1, segments)
    starts = np.cumsum(lengths) - lengths
    events = events_of(schema, int(lengths.sum()), random)
    going_on = random.choice(segments, segments // 2, replace=False).tolist()
    earlier = events_of(schema, 7 * segments, random)
    before = {at: encode(schema, earlier[7 * at : 7 * at + 7], Clock())[1] for at in going_on}
    wanted = np.sort(random.choice(segments, segments // 2, replace=False))

    encoded = encode_segments(schema, events, starts, before, wanted)

    clocks, out_of_order = {}, 0
    for at, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        clock = before.get(at, Clock())
        part = events[start : start + length]
        rows, clocks[at] = encode(schema, part, clock)
        np.testing.assert_array_equal(encoded.rows[start : start + length], rows)
        out_of_order += clocks[at].out_of_order - clock.out_of_order
    assert [encoded.clocks.clock(at) for at in range(len(wanted))] == [clocks[at] for at in wanted]
    assert encoded.out_of_order == out_of_order
