"""Event schema: columns, codes, and validation."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from models.events.schema import CategoricalField, Column, EventSchema
from models.spec.layout import state_spec
from models.spec.model import parse_spec
from tests.support.events import FULL_SCHEMA, SPARSE_TIMES


def test_columns_follow_the_fields_in_order() -> None:
    assert FULL_SCHEMA.columns == (
        Column("load", "load"),
        Column("delay", "delay"),
        Column("delay.missing", "delay"),
        *(
            Column(f"at.{feature}", "at")
            for feature in ("gap", "hour_sin", "hour_cos", "weekday_sin", "weekday_cos")
        ),
        Column("carrier", "carrier", codes=5, embedding=3),
        Column("gate", "gate", codes=4, embedding=8),
        Column("heavy", "heavy"),
        Column("late", "late"),
        Column("late.missing", "late"),
    )
    assert FULL_SCHEMA.column_index["gate"] == 9
    assert [column.name for column in SPARSE_TIMES.columns][5:] == ["at.missing", "load"]
    assert sum(column.width for column in FULL_SCHEMA.columns) == 11 + 3 + 8


def test_categorical_codes_follow_the_vocabulary() -> None:
    field = CategoricalField(name="c", optional=True, vocabulary=("b", "a"))

    assert field.code_of == {"b": 1, "a": 2}
    assert field.absent_code == 3
    assert field.codes == 4
    assert field.labels == ("<unknown>", "b", "a", "<absent>")


def test_a_copied_schema_recomputes_derived_values() -> None:
    field = CategoricalField(name="c", vocabulary=("a",))
    assert field.code_of == {"a": 1}

    assert field.model_copy(update={"vocabulary": ("b", "c")}).code_of == {"b": 1, "c": 2}
    assert field.model_copy() == field
    with pytest.raises(ValidationError):
        field.model_copy(update={"embedding": 0})
    assert FULL_SCHEMA.model_copy(update={"timezone": "UTC"}).fields == FULL_SCHEMA.fields


def test_a_schema_is_fitted_when_every_field_is() -> None:
    assert FULL_SCHEMA.fitted
    for index, field in enumerate(FULL_SCHEMA.fields):
        for name in ("mean", "std", "gap_mean", "gap_std", "vocabulary"):
            if name in type(field).model_fields:
                fields = list(FULL_SCHEMA.fields)
                fields[index] = field.model_copy(update={name: None})
                assert not FULL_SCHEMA.model_copy(update={"fields": tuple(fields)}).fitted


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"fields": []}, "at least 1"),
        ({"fields": [{"kind": "number", "name": "x"}]}, "kind"),
        ({"fields": [{"kind": "numeric", "name": "x.y"}]}, "pattern"),
        ({"fields": [{"kind": "numeric", "name": "x", "std": 0}]}, "greater than 0"),
        ({"fields": [{"kind": "numeric", "name": "x", "mean": float("nan")}]}, "finite"),
        ({"fields": [{"kind": "numeric", "name": "x", "unit": "t"}]}, "not permitted"),
        ({"fields": [{"kind": "numeric", "name": "x"}] * 2}, "distinct field names"),
        (
            {"fields": [{"kind": "timestamp", "name": "a"}, {"kind": "timestamp", "name": "b"}]},
            "at most one timestamp",
        ),
        ({"fields": [{"kind": "categorical", "name": "c", "vocabulary": ["a", "a"]}]}, "distinct"),
        ({"fields": [{"kind": "categorical", "name": "c", "vocabulary": [""]}]}, "1 to 256"),
        (
            {"fields": [{"kind": "categorical", "name": "c", "vocabulary": ["x" * 257]}]},
            "got one of 257",
        ),
        (
            {"timezone": "Mars/Olympus", "fields": [{"kind": "numeric", "name": "x"}]},
            "IANA time zone",
        ),
    ],
)
def test_invalid_schemas_are_rejected(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EventSchema.model_validate(data)


def test_seasons_of_all_fields_fit_the_header_of_a_stored_state() -> None:
    def schema(season: int) -> EventSchema:
        normalised = {"kind": "numeric", "normalisation": {}}
        fields: list[dict[str, Any]] = [{**normalised, "name": f"f{at}"} for at in range(255)]
        fields += [{"kind": "timestamp", "name": "at"}]
        for field in fields[:16]:
            field["season_events"] = season
        return EventSchema.model_validate({"fields": fields})

    spec = parse_spec(
        {
            "name": "pump",
            "events": schema(3999).model_dump(),
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": [{"kind": "sequence", "name": "hidden"}],
        }
    )
    assert state_spec(spec).int_size <= 2**16 - 1
    with pytest.raises(ValidationError, match=r"at most 64000 .* got 64016"):
        schema(4000)
