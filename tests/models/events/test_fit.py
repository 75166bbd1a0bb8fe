"""Fitting of a schema: statistics of the data, and those that the specification states."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from models.errors import DataError
from models.events.encode import Clock, encode
from models.events.fit import fit_schema
from models.events.frame import columns_from_frame
from models.events.schema import CategoricalField, EventSchema, NumericField, TimestampField

ROWS = pl.DataFrame(
    {
        "tail": ["b", "a", "b", "a", "a", "b"],
        "at": [9_000, 1_000, 2_000, 4_000, 3_000, 12_000],
        "load": [1.0, 2.0, 4.0, None, 8.0, 16.0],
        "log": [-1.0, 0.0, 3.0, 7.0, 15.0, -31.0],
        "same": [0.1] * 6,
        "carrier": ["AA", "UA", "AA", "B6", None, "UA"],
    }
).sort("at")


def schema(**changes: dict[str, Any]) -> EventSchema:
    fields: list[dict[str, Any]] = [
        {"kind": "timestamp", "name": "at"},
        {"kind": "numeric", "name": "load", "optional": True},
        {"kind": "numeric", "name": "log", "transform": "signed_log1p"},
        {"kind": "numeric", "name": "same"},
        {"kind": "categorical", "name": "carrier", "optional": True},
    ]
    return EventSchema.model_validate(
        {"fields": [{**field, **changes.get(field["name"], {})} for field in fields]}
    )


def test_numeric_fields_are_fitted_on_present_values() -> None:
    fitted = fit_schema(schema(), ROWS, stream="tail")

    load, log, same = (fitted.field(name) for name in ("load", "log", "same"))
    assert isinstance(load, NumericField)
    assert isinstance(log, NumericField)
    assert isinstance(same, NumericField)
    present = np.array([1.0, 2, 4, 8, 16])
    logs = np.log(2) * np.array([-1.0, 0, 2, 3, 4, -5])
    assert load.mean == pytest.approx(present.mean())
    assert load.std == pytest.approx(np.sqrt(((present - present.mean()) ** 2).mean()))
    assert log.mean == pytest.approx(logs.mean())
    assert log.std == pytest.approx(logs.std())
    assert same.mean == pytest.approx(0.1)
    assert same.std == 1.0
    assert fitted.fitted


def test_vocabularies_are_ordered_by_frequency_and_then_by_name() -> None:
    fitted = fit_schema(schema(), ROWS, stream="tail").field("carrier")
    capped = fit_schema(schema(carrier={"max_vocabulary": 1}), ROWS, stream="tail").field("carrier")

    frequent = fit_schema(schema(carrier={"min_count": 2}), ROWS, stream="tail").field("carrier")

    assert isinstance(fitted, CategoricalField)
    assert isinstance(capped, CategoricalField)
    assert isinstance(frequent, CategoricalField)
    assert fitted.vocabulary == ("AA", "UA", "B6")
    assert capped.vocabulary == ("AA",)
    assert frequent.vocabulary == ("AA", "UA")
    assert fitted.codes == 5


def test_gaps_are_fitted_within_each_stream() -> None:
    at = fit_schema(schema(), ROWS, stream="tail").timestamp

    assert isinstance(at, TimestampField)
    gaps = np.log1p([0, 2, 1, 0, 7, 3])
    assert at.gap_mean == pytest.approx(gaps.mean())
    assert at.gap_std == pytest.approx(gaps.std())


def test_rows_of_a_stream_keep_their_order() -> None:
    times = [1000 * step for step in range(3000)]
    long = pl.DataFrame({"tail": [f"s{step % 7}" for step in range(3000)], "at": times})
    only = EventSchema.model_validate({"fields": [{"kind": "timestamp", "name": "at"}]})

    at = fit_schema(only, long, stream="tail").timestamp
    assert isinstance(at, TimestampField)
    assert at.gap_mean == pytest.approx(np.log(8) * (1 - 7 / 3000))


def test_fitted_numbers_standardise_encoded_values() -> None:
    fitted = fit_schema(schema(), ROWS, stream="tail")
    rows = []
    for _, stream in ROWS.sort("at").group_by("tail"):
        rows.append(encode(fitted, columns_from_frame(fitted, stream), Clock())[0])
    encoded = np.concatenate(rows)

    for name in ("at.gap", "log"):
        column = encoded[:, fitted.column_index[name]]
        assert column.mean() == pytest.approx(0, abs=1e-6)
        assert column.std() == pytest.approx(1, abs=1e-6)
    assert encoded[:, fitted.column_index["same"]] == pytest.approx(0, abs=1e-6)


def test_statistics_of_the_specification_are_kept() -> None:
    given = schema(
        at={"gap_std": 9.0},
        load={"mean": 5.0},
        log={"mean": 1.0, "std": 2.0},
        carrier={"vocabulary": ["ZZ"]},
    )
    fitted = fit_schema(given, ROWS, stream="tail")

    at, load = fitted.timestamp, fitted.field("load")
    assert isinstance(at, TimestampField)
    assert isinstance(load, NumericField)
    assert at.gap_std == 9.0
    assert at.gap_mean is not None
    assert load.mean == 5.0
    assert load.std == pytest.approx(np.std([1, 2, 4, 8, 16]))
    assert fitted.field("log") == given.field("log")
    assert fitted.field("carrier") == given.field("carrier")
    assert fit_schema(fitted, ROWS, stream="tail") == fitted


def test_fields_without_values_are_fitted() -> None:
    empty = ROWS.with_columns(load=None, carrier=None)

    fitted = fit_schema(schema(), empty, stream="tail")

    load, carrier = fitted.field("load"), fitted.field("carrier")
    assert isinstance(load, NumericField)
    assert isinstance(carrier, CategoricalField)
    assert (load.mean, load.std) == (0.0, 1.0)
    assert carrier.vocabulary == ()


def test_fit_errors_name_the_column() -> None:
    with pytest.raises(DataError, match="flight"):
        fit_schema(schema(), ROWS, stream="flight")
    huge = ROWS.with_columns(load=pl.Series([1e308, -1e308] * 3))
    with pytest.raises(DataError, match="signed_log1p") as caught:
        fit_schema(schema(), huge, stream="tail")
    assert caught.value.field == "load"
