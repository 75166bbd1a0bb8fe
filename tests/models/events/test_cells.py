"""Rejected rows of tables and text cells: all at once, each by itself, by the rules of one row."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import DataError
from models.events.cells import parse_cells
from models.events.frame import canonical_frame, columns_from_canonical, columns_from_frame
from models.events.schema import EventSchema

SCHEMA = EventSchema.model_validate(
    {
        "timezone": "Europe/Vienna",
        "fields": [
            {"kind": "timestamp", "name": "at", "without_offset": "local"},
            {"kind": "numeric", "name": "x"},
            {"kind": "boolean", "name": "on", "coerce": True, "optional": True},
            {"kind": "categorical", "name": "name", "optional": True},
        ],
    }
)
CELLS = {
    "at": [
        "1750413600000",
        "2025-06-20T12:00:00",
        "2025-06-20",
        "2025-03-30T02:30:00",
        "1.5",
        "soon",
        "99999999999999",
        None,
    ],
    "x": [" 1.5 ", "-0", "nan", "inf", "one", None],
    "on": ["true", "FALSE ", "1", "0", "yes", None],
    "name": ["a", "航", "x" * 257, "", None],
}
ROWS = st.tuples(*[st.sampled_from(cells) for cells in CELLS.values()])


def read(frame: pl.DataFrame) -> tuple[list[tuple[Any, ...]], set[int]]:
    """The values and the rejected rows of a table of text."""
    typed, in_cells = parse_cells(SCHEMA, frame)
    canonical, in_values = canonical_frame(SCHEMA, typed)
    invalid = np.zeros(frame.height, np.bool_)
    for each in [*in_cells, *in_values]:
        invalid |= each.rows
        assert each.got(int(np.argmax(each.rows)))
    return canonical.rows(), set(np.flatnonzero(invalid).tolist())


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=12))
def test_each_row_of_text_is_read_by_itself(rows: list[tuple[str | None, ...]]) -> None:
    layout = dict.fromkeys(CELLS, pl.String)
    values, invalid = read(pl.DataFrame(rows, schema=layout, orient="row"))

    for index, row in enumerate(rows):
        (alone,), rejected = read(pl.DataFrame([row], schema=layout, orient="row"))
        assert (index in invalid) == bool(rejected)
        if not rejected:
            assert values[index] == alone


@pytest.mark.parametrize("dropped", [None, "2025-06-20 12:00:00.5", "2025-03-30T02:30:00"])
def test_many_times_of_a_form_are_read_as_each_alone(dropped: str | None) -> None:
    forms = [
        "2025-06-20T12:00:00",
        "2025-06-20 12:00:00.5",
        "2025-06-20T12:00:00.123456",
        "2025-12-31",
        "2025-06-20T12:00:00Z",
        "2025-06-20T12:00:00.001+05:30",
        "2025-03-30T02:30:00",
        "2025-02-30",
        "1899-12-31T23:30:00",
        "soon",
        None,
    ]
    times = [form for form in forms if form != dropped] * 50
    frame = pl.DataFrame({"at": times}, schema={"at": pl.String}).with_columns(x=pl.lit("1"))
    values, invalid = read(frame)
    for row in range(len(forms)):
        (alone,), rejected = read(frame[row : row + 1])
        assert values[row] == alone or rejected
        assert (row in invalid) == bool(rejected)


def test_all_rejected_rows_are_found_with_their_reasons() -> None:
    frame = pl.DataFrame(
        {
            "at": ["2025-06-20T12:00:00Z", "2025-03-30T02:30:00", None, "later"],
            "x": [1.0, float("inf"), 2.0, float("nan")],
            "on": [1, 2, 0, None],
            "name": ["a", "", "b", "c"],
        }
    )
    _, invalid = canonical_frame(SCHEMA, frame)
    found = {(each.field, row) for each in invalid for row in np.flatnonzero(each.rows).tolist()}
    assert found == {("at", 1), ("at", 2), ("at", 3), ("x", 1), ("x", 3), ("on", 1), ("name", 1)}
    with pytest.raises(DataError) as caught:
        columns_from_frame(SCHEMA, frame)
    assert (caught.value.field, caught.value.index) == ("at", 3)


def test_booleans_that_must_be_written_out_are_read_cell_by_cell() -> None:
    schema = EventSchema.model_validate(
        {"fields": [{"kind": "boolean", "name": "x", "coerce": False}]}
    )
    typed, (invalid,) = parse_cells(schema, pl.DataFrame({"x": ["true", "1", "False", "no"]}))
    assert typed["x"].to_list() == [True, None, False, None]
    assert np.flatnonzero(invalid.rows).tolist() == [1, 3]


def test_a_missing_number_of_epoch_seconds_is_absent() -> None:
    schema = EventSchema.model_validate(
        {"fields": [{"kind": "timestamp", "name": "x", "epoch": "s", "optional": True}]}
    )
    columns = columns_from_frame(schema, pl.DataFrame({"x": [1.5, float("nan"), None]}))
    assert columns.present["x"].tolist() == [True, False, False]


def test_valid_rows_of_a_canonical_table_are_events() -> None:
    frame = pl.DataFrame({"at": [0, 1], "x": [-0.0, 2.0], "name": ["a", None]})
    canonical, invalid = canonical_frame(SCHEMA, frame)
    assert not invalid
    columns = columns_from_canonical(SCHEMA, canonical)
    assert np.signbit(columns.values["x"]).tolist() == [False, False]
    assert columns.values["name"].tolist() == ["a", ""]
    assert columns.present["name"].tolist() == [True, False]
    assert columns.present["on"].tolist() == [False, False]
