"""Synthetic histories have the shape that they are asked for, and depend on their seed alone."""

from pathlib import Path

import polars as pl
import pytest

from models.errors import DataError
from models.events.frame import columns_from_frame
from tests.backfill.histories import STREAM, History, write_model

SMALL = History(events=30_000, streams=500, files=3)


def lengths(history: History) -> pl.Series:
    return pl.concat(history.frames()).group_by(STREAM).len()["len"].sort(descending=True)


def test_history_has_every_event_of_every_stream_in_files_in_order_of_time(tmp_path: Path) -> None:
    paths = SMALL.write(tmp_path / "history")
    assert paths == sorted(paths)
    frames = [pl.read_parquet(path) for path in paths]
    assert [frame.height for frame in frames] == [10_000] * 3
    whole = pl.concat(frames)
    assert whole[STREAM].n_unique() == 500
    assert whole["offset"].to_list() == list(range(30_000))
    starts = [frame["at"].min() for frame in frames]
    assert starts == sorted(starts)
    # as recorded events are: not quite in order
    assert not whole["at"].is_sorted()


def test_files_depend_on_the_seed_alone() -> None:
    first, again = pl.concat(SMALL.frames()), pl.concat(SMALL.frames())
    assert first.equals(again)
    other = History(events=30_000, streams=500, files=3, seed=2)
    assert not first.equals(pl.concat(other.frames()))


def test_csv_has_the_events_of_parquet(tmp_path: Path) -> None:
    schema = write_model(tmp_path / "machines", units=4).spec.events
    assert schema is not None
    (path, *_) = SMALL.write(tmp_path / "csv", "csv")
    read = columns_from_frame(schema, pl.read_csv(path))
    made = columns_from_frame(schema, next(SMALL.frames()))
    for name in ("at", "power", "heat", "remote", "kind"):
        assert (read.present[name] == made.present[name]).all()
        assert (read.values[name] == made.values[name])[made.present[name]].all()


def test_lengths_follow_a_power_law_and_one_stream_may_have_a_tenth() -> None:
    usual = lengths(SMALL)
    assert usual[0] > 10 * usual[-1]
    assert usual[0] < 3_000
    skewed = lengths(History(events=30_000, streams=500, files=3, skew=0.1))
    assert 2_700 < skewed[0] < 3_300
    assert skewed[1] < 1_500


def test_bad_events_and_duplicates_are_about_as_many_as_asked_for(tmp_path: Path) -> None:
    schema = write_model(tmp_path / "machines", units=4).spec.events
    assert schema is not None
    frame = pl.concat(History(events=30_000, streams=500, bad=0.1, duplicates=0.1).frames())
    rows, events = frame.height, frame["offset"].n_unique()
    assert events == 30_000
    assert 31_000 < rows < 35_000
    bad = frame.filter(pl.col("power").is_null())
    assert 2_000 < bad["offset"].n_unique() < 4_000
    assert columns_from_frame(schema, frame.filter(pl.col("power").is_not_null())) is not None
    with pytest.raises(DataError, match="power"):
        columns_from_frame(schema, bad)
