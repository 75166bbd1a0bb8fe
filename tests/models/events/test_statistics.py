"""Standardisation by a stream's own values: against the oracle, and what it makes of streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.errors import SpecError, StateError
from models.events.encode import Clock, encode
from models.events.fit import fit_schema
from models.events.schema import EventSchema, Normalisation, NumericField
from models.events.values import standardise
from models.spec.layout import state_spec
from models.spec.model import parse_spec
from tests.support.events import NORMALISED
from tests.support.oracle_statistics import statistics_of
from tests.support.strict_events import columns_from_events

BASE: dict[str, Any] = {"kind": "numeric", "name": "load", "mean": 3.0, "std": 2.0}


def schema_of(season: int | None = None, **options: Any) -> EventSchema:
    field = {**BASE, "optional": True, "normalisation": {"std": 0.5, **options}}
    return EventSchema.model_validate({"fields": [{**field, "season_events": season}]})


def rows_of(schema: EventSchema, values: list[float | None]) -> dict[str, NDArray[np.float32]]:
    """The encoded columns of one stream, by name."""
    chunk = [{"load": value} for value in values]
    rows, _ = encode(schema, columns_from_events(schema, chunk), Clock())
    return {name: rows[:, at] for name, at in schema.column_index.items()}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.none() | st.floats(-50, 50) | st.sampled_from([3.0, 1e4]), max_size=40),
    st.sampled_from(["load", "delay", "heat"]),
)
def test_statistics_match_the_oracle(values: list[float | None], name: str) -> None:
    field = NORMALISED.field(name)
    assert isinstance(field, NumericField)
    field = field.model_copy(update={"name": "load", "optional": True})
    schema = EventSchema(fields=(field,))

    found = rows_of(schema, values)

    expected = np.array(statistics_of(field, values), np.float64).reshape(-1, 4)
    names = {"load": 0, "load.mean": 1, "load.std": 2, "load.season": 3}
    assert set(found) <= {*names, "load.missing", "load.value"}
    for column, at in names.items():
        if column in found:
            np.testing.assert_allclose(found[column], expected[:, at], rtol=1e-5, atol=1e-5)


def test_digits_of_a_small_change_at_a_high_level_survive() -> None:
    # A float32 has a resolution of 64 at 1e9.
    values = [1e9 + step % 2 for step in range(40)]

    found = rows_of(schema_of(prior_events=2), values)["load"]

    np.testing.assert_allclose(found[30:], np.resize([-1.0, 1.0], 10), atol=0.1)


def test_the_first_value_is_standardised_by_the_training_data() -> None:
    found = rows_of(schema_of(prior_events=4), [None, 7.0, 7.25])

    assert found["load"].tolist() == [0.0, (7.0 - 3.0) / 2.0, pytest.approx(0.25 / 0.75**0.5 / 0.5)]
    assert found["load.mean"].tolist() == [3.0, 7.0, 7.125]
    assert found["load.std"][:2].tolist() == [2.0, pytest.approx(0.75**0.5 * 0.5)]


def test_a_level_shift_is_forgotten_within_the_memory() -> None:
    values = np.random.default_rng(8).normal(size=1200)
    values[400:] += 1000

    found = rows_of(schema_of(memory_events=50), values.tolist())

    assert found["load"][400] == 10.0
    assert found["load.mean"][1199] == pytest.approx(1000, abs=1)
    assert found["load.std"][1199] == pytest.approx(1, rel=0.5)


def test_the_season_is_the_value_one_season_before_the_next_event() -> None:
    field = {**BASE, "optional": True, "season_events": 3}
    schema = EventSchema.model_validate({"fields": [field]})

    found = rows_of(schema, [5.0, 7.0, 9.0, 11.0, None, 13.0, 3.0])

    # in the place of the fifth value is the one a season before it, 7
    assert found["load.season"].tolist() == [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 2.0]


def test_statistics_of_a_stream_are_parts_of_its_state() -> None:
    spec = spec_of([NORMALISED.field("delay").model_dump()])
    layout = state_spec(spec)
    chunk = columns_from_events(spec.events, [{"delay": 1.0}, {}, {"delay": 2.0}])  # type: ignore[arg-type]
    _, clock = encode(spec.events, chunk, Clock())  # type: ignore[arg-type]

    ints = clock.into_ints(layout, layout.zero().ints)

    parts = layout.by_name(layout.zero()._replace(ints=ints))
    assert parts["events.delay.count"] == 2
    assert parts["events.delay.mean"] == pytest.approx(np.log1p([1.0, 2.0]).mean())
    assert parts["events.delay.variance"] == pytest.approx(np.log1p([1.0, 2.0]).var())
    assert parts["events.delay.events"] == 3
    assert parts["events.delay.season"].shape == (5,)
    assert Clock.from_ints(layout, ints) == clock
    assert not Clock().into_ints(layout, ints).any()


@pytest.mark.parametrize(
    ("part", "value"), [("count", -1), ("count", 2**62 + 1), ("events", -1), ("variance", -0.5)]
)
def test_impossible_statistics_are_rejected(part: str, value: float) -> None:
    layout = state_spec(spec_of([NORMALISED.field("delay").model_dump()]))
    ints = layout.zero().ints
    at = layout.slices[f"events.delay.{part}"]
    ints[at] = np.array([value]).view(np.int64) if part == "variance" else int(value)

    with pytest.raises(StateError, match=rf"events\.delay\.{part}"):
        Clock.from_ints(layout, ints)


def test_the_prior_is_the_median_deviation_of_the_training_streams() -> None:
    values = {"a": [0.0, 2.0] * 15, "b": [1000.0, 1008.0] * 15, "c": [5.0] * 30, "d": [-9.0, 9.0]}
    frame = pl.DataFrame(
        [{"s": name, "load": value} for name, column in values.items() for value in column]
    )
    field = NumericField(name="load", normalisation=Normalisation())

    (fitted,) = fit_schema(EventSchema(fields=(field,)), frame, stream="s").fields

    assert isinstance(fitted, NumericField)
    assert fitted.normalisation == Normalisation(std=2.5)
    assert fitted.fitted
    assert not field.fitted
    assert fitted.mean == frame["load"].mean()


def spec_of(fields: list[dict[str, Any]], **members: Any) -> Any:
    return parse_spec(
        {
            "name": "pump",
            "events": {"fields": fields},
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": [{"kind": "sequence", "name": "hidden"}],
            **members,
        }
    )


def test_a_bound_is_compared_with_the_value_standardised_by_the_training_data() -> None:
    field = schema_of(season=2, clip=1.0).fields[0]
    values = [3.0, 3.5, 2.5, None, 1e6, -1e6]
    assert isinstance(field, NumericField)

    found = rows_of(EventSchema(fields=(field,)), values)["load.value"]

    present = np.array([value is not None for value in values])
    given = [0.0 if value is None else value for value in values]
    expected = np.where(present, standardise(field, given), 0)
    assert found.tobytes() == expected.astype(np.float32).tobytes()


def test_a_dense_head_cannot_predict_a_normalised_field() -> None:
    head = {"kind": "dense", "name": "next", "units": 1, "targets": ["load"]}
    with pytest.raises(SpecError, match="expected a target without `normalisation`"):
        spec_of([NORMALISED.field("load").model_dump()], heads=[head])


@pytest.mark.parametrize("part", ["targets", "known"])
def test_a_decoder_of_a_normalised_field_is_rejected(part: str) -> None:
    decoder = {
        "targets": ["heat"],
        "layers": [{"kind": "lstm", "units": 2, "starts_from": "lstm_1"}],
        "max_horizon": 3,
        part: ["load"],
    }
    fields = [NORMALISED.field("load").model_dump(), {**BASE, "name": "heat"}]
    with pytest.raises(SpecError, match="expected fields without `normalisation`"):
        spec_of(fields, decoder=decoder)


def test_options_at_their_defaults_are_left_out_of_the_manifest() -> None:
    plain = EventSchema.model_validate({"fields": [BASE, {"kind": "timestamp", "name": "at"}]})

    number, time = plain.model_dump(mode="json")["fields"]

    assert not {"normalisation", "season_events", "calendar"} & {*number, *time}
    assert EventSchema.model_validate(NORMALISED.model_dump(mode="json")) == NORMALISED
