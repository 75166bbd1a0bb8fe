import numpy as np
import polars as pl
import pytest

from models.errors import DataError, SpecError
from models.spec.model import schema_of
from models.training.data import fitted_spec, moment_ms, streams_of
from models.training.files import read_data
from models.training.plan import plan_of
from tests.support.training import HOUR_MS, latch_frame, latch_spec


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return latch_frame()


def write(frame: pl.DataFrame, path) -> None:
    match path.suffix:
        case ".csv":
            frame.write_csv(path)
        case ".parquet":
            frame.write_parquet(path)
        case _:
            frame.write_ndjson(path)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.ndjson", "t.parquet"])
@pytest.mark.parametrize("moments", ["ms", "text", "local"])
def test_files_of_every_kind_give_the_same_rows(tmp_path, frame, name, moments):
    spec = latch_spec()
    moment = pl.from_epoch("at", "ms")
    if moments == "text":
        table = frame.with_columns(at=moment.dt.strftime("%Y-%m-%dT%H:%M:%S%.3fZ"))
    elif moments == "local":
        table = frame.with_columns(at=moment.dt.strftime("%Y-%m-%d %H:%M:%S%.3f"))
    else:
        table = frame
    write(table, tmp_path / name)
    expected = streams_of(spec, frame)
    streams = streams_of(spec, read_data(tmp_path / name, schema_of(spec)))
    fitted = fitted_spec(spec, expected, 16 * HOUR_MS).events
    assert streams.names == expected.names
    assert streams.spans == expected.spans
    np.testing.assert_array_equal(streams.moments_ms, expected.moments_ms)
    np.testing.assert_array_equal(streams.encoded(fitted), expected.encoded(fitted))


def test_events_of_a_stream_are_in_the_order_of_time(frame):
    streams = streams_of(latch_spec(), frame)
    for start, stop in streams.spans:
        assert (np.diff(streams.moments_ms[start:stop]) > 0).all()
        assert streams.frame["id"][start:stop].n_unique() == 1


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("noise", "row 3: a number"),
        ("flag", "row 3: true or false"),
        ("at", "row 3: an RFC 3339 timestamp"),
    ],
)
def test_a_wrong_cell_is_named(tmp_path, frame, cell, expected):
    path = tmp_path / "t.csv"
    table = frame.cast(pl.String)
    cells = pl.when(pl.int_range(pl.len()) == 2).then(pl.lit("seven")).otherwise(pl.col(cell))
    table.with_columns(cells.alias(cell)).write_csv(path)
    with pytest.raises(DataError, match=expected) as caught:
        streams_of(latch_spec(), read_data(path, schema_of(latch_spec())), str(path))
    assert str(path) in str(caught.value)
    assert caught.value.field == cell
    assert "seven" in str(caught.value)


def test_an_empty_cell_of_a_required_field_is_named(tmp_path, frame):
    path = tmp_path / "t.csv"
    hole = pl.when(pl.int_range(pl.len()) == 4).then(None).otherwise(pl.col("noise"))
    frame.with_columns(hole.alias("noise")).write_csv(path)
    with pytest.raises(DataError, match="row 5: a value"):
        streams_of(latch_spec(), read_data(path, schema_of(latch_spec())), str(path))


def test_moments_without_a_zone_are_local():
    schema = latch_spec().events.model_copy(update={"timezone": "America/New_York"})
    assert moment_ms(schema, "1970-01-01", "x") == 5 * HOUR_MS
    assert moment_ms(schema, "1970-01-01T00:00:00Z", "x") == 0
    with pytest.raises(SpecError, match=r"x: .*'soon'"):
        moment_ms(schema, "soon", "x")


def test_held_out_events_do_not_leak_into_training(frame):
    """Events from the split on change neither the fitted schema nor the training rows."""
    spec, split_ms = latch_spec(), 16 * HOUR_MS
    changed_frame = frame.with_columns(
        noise=pl.when(pl.col("at") >= split_ms).then(pl.col("noise") * 100 + 7).otherwise("noise"),
        kind=pl.when(pl.col("at") >= split_ms).then(pl.lit("new")).otherwise("kind"),
    )
    plans = []
    for data in (frame, changed_frame):
        streams = streams_of(spec, data)
        fitted = fitted_spec(spec, streams, split_ms)
        plan = plan_of(fitted, streams, {}, split_ms, 22 * HOUR_MS)
        plans.append((fitted, plan, streams))
    (first, plan, streams), (second, other, _) = plans
    assert first == second
    np.testing.assert_array_equal(plan.trained, other.trained)
    training_rows = np.concatenate([np.arange(s.start, s.stop) for s in plan.segments])
    np.testing.assert_array_equal(plan.rows[training_rows], other.rows[training_rows])
    assert (streams.moments_ms[training_rows] < split_ms).all()
    target_rows = plan.following[np.flatnonzero(plan.trained)]
    assert (streams.moments_ms[target_rows] < split_ms).all()
    validated_ms = streams.moments_ms[plan.following[np.flatnonzero(plan.validated)]]
    assert ((validated_ms >= split_ms) & (validated_ms < 22 * HOUR_MS)).all()
    assert not (plan.trained & plan.validated).any()


def test_out_of_order_events_do_not_leak_past_the_split(frame):
    """Ordered by another column, moments may go back; what follows a held-out event is late."""
    spec = latch_spec(order_by="rank")
    data = frame.sort("id", "at").with_columns(rank=pl.int_range(pl.len()).over("id"))
    back = (pl.col("rank") == 18) & (pl.col("id") == "s00")
    data = data.with_columns(at=pl.when(back).then(0).otherwise("at"))
    streams = streams_of(spec, data)
    fitted = fitted_spec(spec, streams, 16 * HOUR_MS)
    plan = plan_of(fitted, streams, {}, 16 * HOUR_MS, 22 * HOUR_MS)
    start, stop = streams.spans[0]
    assert streams.moments_ms[start + 18] == 0
    assert not plan.trained[start + 15 : stop].any()


def test_a_split_without_events_on_both_sides_is_rejected(frame):
    spec = latch_spec()
    streams = streams_of(spec, frame)
    with pytest.raises(DataError, match="before `validate_from`"):
        fitted_spec(spec, streams, -1)
    fitted = fitted_spec(spec, streams, 99 * HOUR_MS)
    with pytest.raises(DataError, match="0 to validate on"):
        plan_of(fitted, streams, {}, 99 * HOUR_MS, 99 * HOUR_MS)


def test_tables_of_pandas_are_rejected_with_the_conversion() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": ["a"], "noise": [1.0]}, index=pandas.Index([0], name="at"))
    message = r"polars\.from_pandas\(frame\.reset_index\(\)\), got one of pandas, .* is 'at'"
    with pytest.raises(DataError, match=message):
        streams_of(latch_spec(), frame)
    with pytest.raises(DataError, match=r"from_pandas\(frame\), got one of pandas$"):
        streams_of(latch_spec(), frame.reset_index())
