"""Training options that a specification leaves open scale with the table."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from models.errors import DataError
from models.spec.detection import AlarmSpec, DetectionSpec
from models.spec.model import ModelSpec, parse_spec
from models.training.data import streams_of, training_of
from models.training.defaults import (
    calendar_warning,
    index_warning,
    resolve_detection,
    resolve_training,
    zone_warning,
)
from tests.models.detection.test_detector import spec_of as detecting_spec
from tests.support.training import HOUR_MS

SIZES = ("window_steps", "segment_windows", "batch_streams", "learning_rate", "epochs", "patience")


def frame_of(streams: int, events: int, step_ms: int = HOUR_MS) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "id": [f"s{row // events}" for row in range(streams * events)],
            "at": [row % events * step_ms for row in range(streams * events)],
            "x": [0.0] * (streams * events),
        }
    )


def spec_of(*layers: dict[str, Any], **training: Any) -> ModelSpec:
    return parse_spec(
        {
            "name": "t",
            "events": {
                "timezone": "Europe/Vienna",
                "fields": [{"kind": "timestamp", "name": "at"}, {"kind": "numeric", "name": "x"}],
            },
            "layers": list(layers) or [{"kind": "lstm", "units": 2}],
            "heads": [{"kind": "label", "name": "up"}],
            "training": {"stream": "id", **training},
        }
    )


def derived(frame: pl.DataFrame, spec: ModelSpec) -> dict[str, Any]:
    resolved, values = resolve_training(spec, streams_of(spec, frame))
    options = training_of(resolved).model_dump()
    assert options == {**spec.training.model_dump(), **values}  # type: ignore[union-attr]
    return values


def test_small_tables_get_small_batches_and_windows_and_many_epochs() -> None:
    small = derived(frame_of(20, 500), spec_of())
    assert [small[name] for name in SIZES] == [32, 13, 8, 0.005, 61, 10]
    tiny = derived(frame_of(4, 60), spec_of())
    assert (tiny["window_steps"], tiny["batch_streams"], tiny["epochs"]) == (16, 8, 150)


def test_large_tables_keep_large_batches_and_windows() -> None:
    large = derived(frame_of(80, 2000), spec_of())
    assert [large[name] for name in SIZES] == [64, 16, 32, 0.002, 34, 5]
    assert large["time_limit_s"] == 600


def test_long_streams_are_cut_into_segments_that_fill_batches() -> None:
    one = derived(frame_of(1, 4000), spec_of())
    assert 2800 // (one["window_steps"] * one["segment_windows"]) >= 2 * one["batch_streams"]


def test_options_of_the_specification_are_kept() -> None:
    options = {
        "validate_from": "1970-01-02",
        "test_from": "1970-01-03",
        "window_steps": 5,
        "segment_windows": 6,
        "batch_streams": 7,
        "learning_rate": 0.5,
        "epochs": 40,
    }
    assert derived(frame_of(4, 60), spec_of(**options)) == {"patience": 6}


def test_a_network_on_whole_streams_gets_windows_of_the_longest() -> None:
    both_ways = {"kind": "bidirectional", "units": 2}
    options = {"validate_from": "1971-01-01", "test_from": "1971-01-02"}
    assert derived(frame_of(30, 90), spec_of(both_ways, **options))["window_steps"] == 90


def test_the_split_is_by_shares_of_the_events_in_the_time_zone() -> None:
    values = derived(frame_of(3, 100), spec_of())
    assert values["validate_from"] == "1970-01-03T23:00:00+01:00"
    assert values["test_from"] == "1970-01-04T14:00:00+01:00"
    later = derived(frame_of(3, 100), spec_of(validate_from="1970-01-04T17:00:00+01:00"))
    assert later["test_from"] == "1970-01-04T23:00:00+01:00"
    earlier = derived(frame_of(3, 100), spec_of(test_from="1970-01-02T10:00:00+01:00"))
    assert earlier["validate_from"] == "1970-01-02T04:00:00+01:00"


def test_less_than_a_week_of_timestamps_causes_a_warning() -> None:
    spec = spec_of()
    streams = streams_of(spec, frame_of(2, 400))
    warning = calendar_warning(spec, streams, 6 * 24 * HOUR_MS)
    assert warning is not None
    assert "span 6.0 days" in warning
    assert calendar_warning(spec, streams, 7 * 24 * HOUR_MS) is None


def test_timestamps_that_count_rows_cause_a_warning() -> None:
    spec, frame = spec_of(), frame_of(2, 400)
    assert index_warning(spec, streams_of(spec, frame)) is None
    counted = frame.with_columns(pl.int_range(1, 801).alias("at"))
    assert "multiply them" in str(index_warning(spec, streams_of(spec, counted)))


def test_times_without_an_offset_or_a_named_zone_cause_a_warning() -> None:
    written = spec_of().model_dump(exclude_unset=True)
    fields = written["events"]["fields"]
    frame = frame_of(2, 400)
    local = frame.with_columns(at=pl.from_epoch("at", time_unit="ms"))

    def warning(frame: pl.DataFrame, events: dict[str, Any]) -> str | None:
        spec = parse_spec({**written, "events": events})
        return zone_warning(spec, streams_of(spec, frame))

    assert "'at' without an offset are read as UTC" in str(warning(local, {"fields": fields}))
    assert warning(local, {"fields": fields, "timezone": "UTC"}) is None
    assert warning(frame, {"fields": fields}) is None


def test_events_of_a_single_moment_have_no_split() -> None:
    with pytest.raises(DataError, match=r"data: events at several times.*`validate_from`"):
        derived(frame_of(10, 1), spec_of())


def test_open_options_of_detection_are_resolved_and_named_ones_kept() -> None:
    def resolved(**options: Any) -> DetectionSpec:
        detection = resolve_detection(detecting_spec(["flow"], **options)).detection
        assert detection is not None
        return detection

    assert resolved().alarm == AlarmSpec(hold_events=6, close_above=0.01, backoff_nats=1)
    named = {"hold_events": 24, "backoff_nats": None}
    assert resolved(alarm=named).alarm == AlarmSpec(close_above=0.01)
    steep = AlarmSpec(hold_events=6, hysteresis=2.0, backoff_nats=1)
    assert resolved(alarm={"hysteresis": 2.0}).alarm == steep
    assert resolved(tail_levels=[0, 3, 6]).tail_levels == (0.0, 3.0, 6.0)
    assert resolve_detection(spec_of()) == spec_of()


@pytest.mark.parametrize("options", [{}, {"epochs": 10, "members": 3}], ids=["open", "set"])
def test_a_quick_training_has_a_quarter_of_the_epochs(options: dict[str, Any]) -> None:
    spec, frame = spec_of(**options), frame_of(4, 200)
    streams = streams_of(spec, frame)
    usual = training_of(resolve_training(spec, streams)[0])
    quick_spec, derived = resolve_training(spec, streams, quick=True)
    quick = training_of(quick_spec)
    assert quick.epochs == -(-usual.epochs // 4) == derived["epochs"]
    assert quick.networks == 1
    assert quick.window_steps == usual.window_steps
