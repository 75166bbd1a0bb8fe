"""A report of alarms says where its good scores are worth little."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

pytest.importorskip("tensorflow")

from models.spec.model import parse_spec
from models.training.alarm_report import detection_lines, detection_report, normal_events
from models.training.data import Streams, streams_of

HOUR_MS = 3_600_000
STEPS, VALIDATE, TEST = 700, 100, 200
SPEC = parse_spec(
    {
        "name": "meters",
        "events": {"fields": [{"kind": "numeric", "name": "value", "mean": 0.0, "std": 1.0}]},
        "layers": [{"kind": "lstm", "units": 2}],
        "heads": [{"kind": "anomaly", "name": "odd", "targets": ["value"]}],
        "detection": {
            "head": "odd",
            "season_events": 24,
            "alarm": {"false_alarms_per_day": 0.5, "hold_events": 6},
        },
        "training": {
            "stream": "id",
            "order_by": "at",
            "validate_from": "1970-01-05T04:00:00Z",
            "test_from": "1970-01-09T08:00:00Z",
            "epochs": 1,
            "patience": 1,
            "window_steps": 1,
            "segment_windows": 1,
            "batch_streams": 1,
            "learning_rate": 0.1,
        },
    }
)
Rows = NDArray[Any]
SINGLE = ("raw nats", "running level", "change", "seasonal naive")
UNFITTED = {"random", *SINGLE, *(f"{name} (last 12)" for name in SINGLE)}


@pytest.fixture(autouse=True)
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees of an isolation forest take the longest of all baselines."""
    monkeypatch.setattr("models.training.detection_baselines.TREES", 5)


def streams_from(values: Rows) -> Streams:
    """Streams `m00`, `m01`, ... of hourly values [S, STEPS]; the last 500 events are held out."""
    frame = pl.concat(
        pl.DataFrame({"id": f"m{at:02d}", "at": np.arange(STEPS) * HOUR_MS, "value": own})
        for at, own in enumerate(values)
    )
    return streams_of(SPEC, frame, "data")


def report_of(
    alarm: Rows, labels: Rows | None, probability: Rows | None = None, values: Rows | None = None
) -> dict[str, Any]:
    """The report of alarms, labels and tail probabilities [S, STEPS], on the held-out events."""
    random = np.random.default_rng(1)
    if probability is None:
        probability = random.random(alarm.shape)
    if values is None:
        values = random.normal(size=alarm.shape)
    outputs = {
        "odd": np.abs(values).ravel().astype(np.float32),
        "odd.probability": probability.ravel().astype(np.float32),
        "odd.alarm": alarm.ravel().astype(np.float32),
    }
    scored = np.tile(np.arange(STEPS) >= TEST, len(alarm))
    anomalous = None if labels is None else labels.ravel()
    return detection_report(SPEC, streams_from(values), outputs, scored, anomalous)


def labels_of(streams: int, *anomalies: tuple[int, int]) -> NDArray[np.bool_]:
    labels = np.zeros((streams, STEPS), np.bool_)
    for start, stop in anomalies:
        labels[:, TEST + start : TEST + stop] = True
    return labels


def alarms_of(streams: int, *alarms: tuple[int, int]) -> Rows:
    """Alarms from their opening to their closing event."""
    codes = np.zeros((streams, STEPS))
    for start, stop in alarms:
        codes[:, TEST + start : TEST + stop] = 2
        codes[:, TEST + start], codes[:, TEST + stop - 1] = 1, 3
    return codes


def warnings_with(report: dict[str, Any], *words: str) -> list[str]:
    return [text for text in report["detection"]["warnings"] if all(word in text for word in words)]


def test_alarms_that_are_open_for_83_percent_of_the_events_are_exposed() -> None:
    """They find 98% of the anomalies without a false alarm, one alarm in each stream."""
    labels = labels_of(4, *((at, at + 3) for at in range(5, 390, 8)), (450, 453))
    report = report_of(alarms_of(4, (0, 415)), labels)
    scores = report["detection"]
    assert (scores["recall"], scores["false_per_day"], scores["precision"]) == (0.98, 0.0, 1.0)

    assert scores["time_in_alarm"] == 0.83
    assert scores["normal_time_in_alarm"] > 0.7
    assert scores["recall_by_chance"] > 0.8
    assert scores["opening_recall"] == 0.0
    assert warnings_with(report, "alarms are open for 83% of the time")
    assert warnings_with(report, "at any other time would find 83%", "these find 98%")
    assert warnings_with(report, "an alarm opens in 0% of the anomalies", "open before")
    lines = "\n".join(detection_lines(report))
    for line in ("| recall | 0.980", "| time in alarm | 0.830", "in which an alarm opens | 0.000"):
        assert line in lines


def test_good_alarms_need_no_warning() -> None:
    labels = labels_of(12, (100, 110), (300, 320))
    random = np.random.default_rng(3)
    values = random.normal(size=labels.shape) + 50 * labels
    probability = np.where(labels, 1e-9, random.random(labels.shape))
    # 0.5 false alarms a day are 10 in 20 days
    false = [(at, at + 1) for at in (20, 60, 140, 180, 220, 260, 350, 390, 430, 470)]
    alarm = alarms_of(12, (101, 112), (300, 322), *false)
    report = report_of(alarm, labels, probability, values)
    assert report["detection"]["warnings"] == []
    assert report["detection"]["recall"] == report["detection"]["opening_recall"] == 1.0


def test_long_alarms_within_long_anomalies_need_no_warning() -> None:
    labels = labels_of(2, (100, 250))
    report = report_of(alarms_of(2, (100, 250)), labels)
    assert report["detection"]["time_in_alarm"] == 0.3
    assert report["detection"]["normal_time_in_alarm"] == 0.0
    assert not warnings_with(report, "alarms are open")


@pytest.mark.parametrize(("gap", "close"), [(6, 2), (7, 0)])
def test_anomalies_that_a_hold_joins_are_counted(gap: int, close: int) -> None:
    labels = labels_of(2, (100, 110), (110 + gap, 120))
    report = report_of(alarms_of(2, (100, 122)), labels)
    assert report["detection"]["merged"] == 1.0
    found = warnings_with(report, f"{close} of 4 anomalies begin within `hold_events` (6)")
    assert bool(found) == bool(close)


def test_labels_of_more_than_a_third_of_the_events_are_warned_of() -> None:
    few, many = labels_of(3, (0, 150)), labels_of(3, (0, 150))
    many[1] = labels_of(1, (0, 200))[0]
    assert not warnings_with(report_of(alarms_of(3), few), "labels cover")
    assert warnings_with(report_of(alarms_of(3), many), "labels cover 33%", "a third in 1 streams")


def test_a_table_without_a_labelled_anomaly_is_warned_of() -> None:
    text = "no anomaly is labelled in the scored events"
    assert warnings_with(report_of(alarms_of(2, (100, 110)), labels_of(2)), text)
    assert not warnings_with(report_of(alarms_of(2), labels_of(2, (100, 110))), text)


def test_a_stream_with_far_more_false_alarms_than_specified_is_named() -> None:
    """The rate of all streams together is as specified."""
    alarm = alarms_of(8, *((at, at + 1) for at in range(20, 500, 60)))
    alarm[5] = alarms_of(1, *((at, at + 1) for at in range(3, 500, 12)))[0]
    report = report_of(alarm, labels_of(8, (10, 12)))
    low, high = report["detection"]["intervals"]["false_per_day"]
    assert low < 0.5 < high
    assert not warnings_with(report, "times the 0.5")
    assert warnings_with(report, "1 of 8 streams", "3 times the false alarms", "m05, 4 times")
    assert report["detection"]["most_false"][0]["stream"] == "m05"
    quiet = report_of(alarms_of(8), labels_of(8, (10, 12)))
    assert warnings_with(quiet, "0 times the 0.5 that the model specifies")


def test_echoes_and_flickering_alarms_are_warned_of() -> None:
    labels = labels_of(4, (100, 120))
    single = alarms_of(4, (100, 120))
    assert not warnings_with(report_of(single, labels), "open")
    flickering = alarms_of(4, *((at, at + 2) for at in range(100, 120, 5)))
    assert warnings_with(report_of(flickering, labels), "4.0 alarms open in an anomaly")
    echoes = alarms_of(4, (100, 120), (150, 152))
    assert warnings_with(report_of(echoes, labels), "1.0 alarms open within 100 events after each")


def test_without_labels_the_report_has_what_needs_none() -> None:
    alarm = alarms_of(3, (10, 60), (100, 140))
    report = report_of(alarm, None)
    scores = report["detection"]
    assert report.keys() == {"detection"}
    assert scores["alarms"] == 6
    assert scores["false_per_day"] == pytest.approx(2 / (499 / 24))
    assert scores["time_in_alarm"] == pytest.approx(90 / 500)
    assert scores.keys().isdisjoint({"recall", "precision", "vus_pr", "worst"})
    assert scores["probabilities"]["events"] == 1500
    assert "6 alarms, without labels, all events taken as normal;" in "\n".join(
        detection_lines(report)
    )
    assert warnings_with(report, "alarms are open for 18% of the time")
    assert "| time in alarm | 0.180" in "\n".join(detection_lines(report))


def test_events_that_the_model_was_fitted_to_are_warned_of() -> None:
    outputs = {
        "odd": np.zeros(STEPS, np.float32),
        "odd.probability": np.ones(STEPS, np.float32),
        "odd.alarm": np.zeros(STEPS, np.float32),
    }
    streams, everything = streams_from(np.zeros((1, STEPS))), np.ones(STEPS, np.bool_)
    report = detection_report(SPEC, streams, outputs, everything, None)
    assert warnings_with(report, "200 of 700 scored events are not held out")
    # their probabilities do not count as those of held-out events
    assert report["detection"]["probabilities"]["events"] == 500


def test_events_soon_after_an_anomaly_are_not_normal() -> None:
    streams = streams_from(np.zeros((2, STEPS)))
    labels = np.zeros((2, STEPS), np.bool_)
    labels[0, [10, 11, 690]] = True
    normal = normal_events(streams, labels.ravel()).reshape(2, STEPS)
    assert np.flatnonzero(~normal[0]).tolist() == [*range(10, 112), *range(690, 700)]
    assert normal[1].all()


def test_a_baseline_that_is_better_than_detection_is_named() -> None:
    labels = labels_of(6, (100, 130), (300, 310))
    random = np.random.default_rng(4)
    values = random.normal(size=labels.shape) + 20 * labels
    report = report_of(alarms_of(6, (100, 130)), labels, random.random(labels.shape), values)
    baselines = report["detection_baselines"]
    assert baselines.keys() == UNFITTED | {"isolation forest", "k nearest neighbours", "PCA"}
    level = baselines["running level"]
    assert level["vus_pr"] > 0.95
    assert level["recall"] == 1.0
    assert level["opening_recall"] > 0.8
    low, high = level["vus_pr_minus_model"]["interval"]
    assert 0 < low < level["vus_pr_minus_model"]["value"] < high
    assert warnings_with(report, "running level: VUS-PR of", "more than the model's")
    assert not warnings_with(report, "random: VUS-PR")
    assert "| running level |" in "\n".join(detection_lines(report))


def test_baselines_of_held_out_events_alone_have_no_alarms() -> None:
    streams = streams_from(np.random.default_rng(2).normal(size=(3, STEPS)))
    late = streams.windows([(start + TEST, stop) for start, stop in streams.spans])
    labels = np.tile(np.arange(STEPS - TEST) % 100 == 50, 3)
    outputs = {
        "odd": np.ones(late.events, np.float32),
        "odd.probability": np.ones(late.events, np.float32),
        "odd.alarm": np.zeros(late.events, np.float32),
    }
    report = detection_report(SPEC, late, outputs, np.ones(late.events, np.bool_), labels)
    assert report["detection_baselines"].keys() == UNFITTED
    for each in report["detection_baselines"].values():
        assert each["vus_pr"] is not None
        assert "recall" not in each
    assert warnings_with(report, "no k nearest neighbours, PCA and isolation forest")
    assert "| random | 0" in "\n".join(detection_lines(report))
