"""Events from tables: equal to events from requests, and errors that name the cell."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings

from models.errors import DataError
from models.events.columns import canonical_bytes
from models.events.frame import columns_from_frame
from models.events.parse import EPOCH_SECONDS
from models.events.schema import EventSchema
from tests.support.events import FULL_SCHEMA, SPARSE_TIMES, events
from tests.support.strict_events import columns_from_events

DTYPES: dict[str, Any] = {
    "numeric": pl.Float64,
    "categorical": pl.String,
    "boolean": pl.Boolean,
    "timestamp": pl.Int64,
}


@settings(max_examples=40, deadline=None)
@given(events(FULL_SCHEMA, 12))
def test_a_table_equals_the_columns_of_its_events(chunk: list[dict[str, Any]]) -> None:
    times = [event["at"] for event in chunk if event.get("at") is not None]
    # a table of such times alone is rejected, as one of epoch seconds
    assume(not times or any(time not in EPOCH_SECONDS for time in times))
    layout = {field.name: DTYPES[field.kind] for field in FULL_SCHEMA.fields}
    frame = pl.DataFrame(
        {name: [event.get(name) for event in chunk] for name in layout}, schema=layout
    )

    found = columns_from_frame(FULL_SCHEMA, frame)

    wanted = columns_from_events(FULL_SCHEMA, chunk)
    assert canonical_bytes(FULL_SCHEMA, found) == canonical_bytes(FULL_SCHEMA, wanted)
    for name, values in wanted.values.items():
        assert found.values[name].dtype == values.dtype
        assert found.present[name].dtype == np.bool_


def one(kind: str, values: Any, *, dtype: Any = None, optional: bool = False) -> Any:
    """The values and presence of a one-column table under a one-field schema."""
    schema = EventSchema.model_validate(
        {
            "timezone": "America/New_York",
            "fields": [{"kind": kind, "name": "x", "optional": optional}],
        }
    )
    columns = columns_from_frame(schema, pl.DataFrame({"x": pl.Series(values, dtype=dtype)}))
    return columns.values["x"].tolist(), columns.present["x"].tolist()


def rejection(kind: str, values: Any, *, dtype: Any = None, optional: bool = False) -> DataError:
    with pytest.raises(DataError) as caught:
        one(kind, values, dtype=dtype, optional=optional)
    assert caught.value.field == "x"
    return caught.value


def test_columns_of_numbers_are_read() -> None:
    assert one("numeric", [1, 2], dtype=pl.Int16) == ([1.0, 2.0], [True, True])
    assert one("numeric", [1.5, None, float("nan")], optional=True) == (
        [1.5, 0.0, 0.0],
        [True, False, False],
    )
    assert rejection("numeric", [1.0, float("nan")]).index == 1
    assert rejection("numeric", [1.0, 2.0, None]).index == 2
    assert rejection("numeric", [1.0, float("inf")], optional=True).index == 1
    assert "numbers" in rejection("numeric", ["1", "2"]).expected
    assert "numbers" in rejection("numeric", [True]).expected


def test_columns_of_categories_are_read() -> None:
    assert one("categorical", ["a", None], optional=True) == (["a", ""], [True, False])
    assert one("categorical", ["b", "a"], dtype=pl.Categorical)[0] == ["b", "a"]
    assert one("categorical", ["b", "a"], dtype=pl.Enum(["a", "b"]))[0] == ["b", "a"]
    assert one("categorical", [7, -1])[0] == ["7", "-1"]
    assert rejection("categorical", ["a", None]).index == 1
    assert rejection("categorical", ["a", ""]).index == 1
    assert rejection("categorical", ["a", "x" * 257]).index == 1
    assert one("categorical", ["航" * 256])[0] == ["航" * 256]
    assert "strings" in rejection("categorical", [1.5]).expected


def test_columns_of_booleans_are_read() -> None:
    assert one("boolean", [True, None], optional=True) == ([True, False], [True, False])
    assert one("boolean", [1, 0, None], optional=True) == (
        [True, False, False],
        [True, True, False],
    )
    assert rejection("boolean", [1, 0, 2]).index == 2
    assert rejection("boolean", [True, None]).index == 1
    assert one("boolean", ["true", "False", "1"]) == ([True, False, True], [True] * 3)
    assert rejection("boolean", ["true", "yes"]).index == 1
    assert "booleans" in rejection("boolean", [1.5]).expected


MOMENT = datetime(2013, 7, 1, 12, 0, 0, 1999, tzinfo=UTC)
MOMENT_MS = 1_372_680_000_001


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_datetimes_with_a_zone_are_absolute(unit: Any) -> None:
    moments, present = one("timestamp", [MOMENT, None], dtype=pl.Datetime(unit, "UTC"), optional=1)

    assert moments == [MOMENT_MS, 0]
    assert present == [True, False]


def test_datetimes_without_a_zone_are_read_in_the_zone_of_the_schema() -> None:
    naive = MOMENT.replace(tzinfo=None)

    assert one("timestamp", [naive, None], optional=True)[0] == [MOMENT_MS + 4 * 3_600_000, 0]
    assert one("timestamp", [date(2013, 1, 1)])[0] == [1_357_016_400_000]


def test_milliseconds_before_1970_are_rounded_down() -> None:
    moment = datetime(1970, 1, 1, tzinfo=UTC) - timedelta(microseconds=1)

    assert one("timestamp", [moment], dtype=pl.Datetime("us", "UTC"))[0] == [-1]


def test_strings_with_and_without_offset_are_read() -> None:
    values = ["2013-07-01T12:00:00.001999Z", "2013-07-01 08:00:00.001", "2013-07-01", None]

    moments, present = one("timestamp", values, optional=True)

    assert moments == [MOMENT_MS, MOMENT_MS, 1_372_651_200_000, 0]
    assert present == [True, True, True, False]
    alike = ["2013-07-01T12:00:00.001Z", None, "2013-07-01T12:00:00.002Z"]
    assert one("timestamp", alike, optional=True)[0] == [MOMENT_MS, 0, MOMENT_MS + 1]


@pytest.mark.parametrize(
    "bad",
    ["soon", "2013-02-30T00:00:00Z", "1899-01-01T00:00:00Z", "1899-01-01", "2013-03-10T02:30:00"],
)
def test_invalid_timestamps_are_rejected(bad: str) -> None:
    assert rejection("timestamp", ["2013-07-01T12:00:00Z", bad]).index == 1


def test_nonexistent_local_times_are_rejected() -> None:
    error = rejection("timestamp", [datetime(2013, 3, 10, 1), datetime(2013, 3, 10, 2, 30)])

    assert error.index == 1
    assert "America/New_York" in error.expected
    assert "2013-03-10T02:30" in error.got


def test_ambiguous_local_times_are_the_earlier_one() -> None:
    assert one("timestamp", [datetime(2013, 11, 3, 1, 30)])[0] == [
        int(datetime(2013, 11, 3, 5, 30, tzinfo=UTC).timestamp() * 1000)
    ]


def test_integers_are_epoch_milliseconds_in_range() -> None:
    assert one("timestamp", [MOMENT_MS])[0] == [MOMENT_MS]
    assert rejection("timestamp", [0, 7_258_118_400_000]).index == 1
    assert rejection("timestamp", [0, -2_208_988_800_001]).index == 1
    assert rejection("timestamp", [0, 2**64 - 1], dtype=pl.UInt64).index == 1
    assert one("timestamp", [5, None], dtype=pl.Int16, optional=True) == ([5, 0], [True, False])
    assert "timestamps" in rejection("timestamp", [1.5]).expected
    assert rejection("timestamp", [0, None]).index == 1


def test_a_missing_column_is_rejected() -> None:
    frame = pl.DataFrame({"at": [0, 1]})

    with pytest.raises(DataError, match="load") as caught:
        columns_from_frame(SPARSE_TIMES, frame)
    assert caught.value.field == "load"

    optional_only = columns_from_frame(SPARSE_TIMES, pl.DataFrame({"load": [1.0, 2.0]}))
    assert not optional_only.present["at"].any()
    assert optional_only.values["at"].dtype == np.int64


@pytest.mark.parametrize("kind", ["numeric", "categorical", "boolean", "timestamp"])
def test_a_column_of_nulls_is_absent(kind: str) -> None:
    values, present = one(kind, [None, None], optional=True)

    assert present == [False, False]
    assert values == [{"categorical": ""}.get(kind, 0)] * 2
    assert rejection(kind, [None]).index == 0
