"""A model is trained with detection, and scores events wherever it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

pytest.importorskip("tensorflow")

from models import commands
from models.artifact.artifact import Artifact, load_artifact
from models.artifact.fingerprint import compute_fingerprint
from models.artifact.writing import write_artifact
from models.errors import ArtifactError, DataError
from models.spec.detection import DetectionSpec
from models.spec.layout import output_spec
from models.spec.model import schema_of
from models.training.data import streams_of
from models.training.evaluate import evaluate, run_chunks
from models.training.files import read_data
from models.training.train_frame import train_frame
from models.training.trainer import train
from models.training.verdicts import verdict_line
from tests.support.command import carry
from tests.support.training import HOUR_MS, latch_frame, latch_spec, train_nothing

DETECTION = DetectionSpec(
    head="odd",
    memory_events=20,
    prior_events=5,
    outputs=("share", "nats"),
)


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return latch_frame(streams=48).sort("at")


@pytest.fixture(scope="module")
def artifact(frame: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    spec = latch_spec(epochs=1).model_copy(update={"detection": DETECTION})
    out = tmp_path_factory.mktemp("models") / "latch"
    return train(spec, frame, out, quiet=True).artifact


def test_the_fit_is_in_the_artifact(artifact: Artifact) -> None:
    spec = load_artifact(artifact.path).spec
    assert spec.detection is not None
    assert spec.detection.fit is not None
    # levels and changes with an average of each; forecasts; runs
    assert len(spec.detection.fit.tails) == 6
    assert 0 < spec.detection.fit.threshold(spec.detection.alarm.false_alarms_per_day) < 1
    assert artifact.state.slices.keys() >= {"odd.weight", "odd.peak", "odd.alarm"}


def test_chunks_and_carry_score_give_equal_outputs(
    artifact: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    streams = streams_of(artifact.spec, frame, "data")
    found = output_spec(artifact.spec).by_name(run_chunks(artifact, streams, chunk=5))
    frame.write_parquet(tmp_path / "events.parquet")
    files = [artifact.path, tmp_path / "events.parquet", tmp_path / "scores.parquet"]
    result = carry("score", *files)
    assert result.exit_code == 0, result.stderr
    scores = pl.read_parquet(files[-1])[streams.table_rows]
    for name in ("odd", "odd.probability", "odd.alarm"):
        np.testing.assert_allclose(scores[name].to_numpy(), found[name], rtol=1e-3, atol=1e-5)
    labels = next(o.labels for o in artifact.outputs.outputs if o.name == "odd.share")
    assert labels == (
        "noise.forecast",
        "noise.level",
        "noise.change",
        "noise.run",
        "kind.forecast",
    )
    assert np.allclose(found["odd.share"].sum(axis=1), 1)
    assert (found["odd.probability"] <= 1).all()
    np.testing.assert_allclose(found["odd.nats"].sum(axis=1), found["odd"], rtol=1e-4, atol=1e-5)
    assert evaluate(artifact, frame)["heads"]["odd"].keys() == {"nll"}


def test_too_few_events_for_detection_are_rejected_before_training(tmp_path: Path) -> None:
    spec = latch_spec(epochs=1).model_copy(update={"detection": DETECTION})
    epochs: list[object] = []
    with pytest.raises(DataError, match=r"at least 200 events .* to fit `detection` to, got"):
        train(
            spec, latch_frame(streams=8), tmp_path / "latch", quiet=True, after_epoch=epochs.append
        )
    assert not epochs


def test_detection_determines_the_fingerprint(artifact: Artifact) -> None:
    detection = artifact.spec.detection
    assert detection is not None
    other = detection.model_copy(update={"memory_events": 21})
    spec = artifact.spec.model_copy(update={"detection": other})
    assert compute_fingerprint(spec, artifact.weights) != artifact.fingerprint


def test_the_rate_of_alarms_does_not_change_the_fingerprint(artifact: Artifact) -> None:
    detection = artifact.spec.detection
    assert detection is not None
    spec = artifact.spec.model_copy(update={"detection": detection.with_alarm_rate(3.0)})
    assert compute_fingerprint(spec, artifact.weights) == artifact.fingerprint


def test_an_artifact_needs_the_fit(artifact: Artifact, tmp_path: Path) -> None:
    spec = artifact.spec.model_copy(update={"detection": DETECTION})
    with pytest.raises(ArtifactError, match="expected a fitted `detection`"):
        write_artifact(tmp_path / "model", spec, artifact.weights)


def test_anomalies_are_scored_by_the_labels_of_a_csv_file(
    artifact: Artifact, frame: pl.DataFrame, tmp_path: Path
) -> None:
    anomalous = pl.Series("anomaly", np.arange(frame.height) % 50 == 7)
    expected = evaluate(artifact, frame.with_columns(anomalous), anomalies="anomaly")
    assert expected["detection"]["anomalies"] > 0
    assert expected["detection_baselines"]["random"]["vus_pr"] > 0
    path = tmp_path / "labelled.csv"
    frame.with_columns(anomalous).write_csv(path)
    labelled = read_data(path, schema_of(artifact.spec))
    assert evaluate(artifact, labelled, anomalies="anomaly")["detection"] == expected["detection"]

    cell = pl.when(pl.int_range(pl.len()) == 4).then(pl.lit("perhaps")).otherwise("anomaly")
    with pytest.raises(DataError, match=r"'anomaly'.*row 5: one of .*, got 'perhaps'"):
        evaluate(artifact, labelled.with_columns(cell.alias("anomaly")), anomalies="anomaly")


def test_the_report_compares_detection_with_its_baselines(
    artifact: Artifact,
    frame: pl.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.detection.scoring.WORST", 2)
    labelled = frame.with_columns(anomaly=pl.Series(np.arange(frame.height) % 50 == 7))
    path = tmp_path / "labelled.parquet"
    labelled.write_parquet(path)
    plots = tmp_path / "plots"
    report = commands.evaluate(
        artifact.path,
        path,
        anomalies="anomaly",
        plots=plots,
        baselines=True,
        trees=False,
        quiet=True,
    )
    since = pl.lit(report["data"]["test_from"]).str.to_datetime("%+").dt.epoch("ms")
    expected = labelled.filter("anomaly", pl.col("at") >= since).height
    assert report["detection"]["anomalies"] == expected > 0
    baselines = report["detection_baselines"]
    assert baselines.keys() >= {"raw nats", "running level", "PCA", "random"}
    for scores in baselines.values():
        assert scores["anomalies"] == expected
    areas = {name: scores["vus_pr"] for name, scores in baselines.items()}
    (verdict,) = [each for each in report["verdicts"] if each["head"] == "odd.alarm"]
    assert {*verdict["better_than"], *verdict["worse_than"]} == areas.keys()
    own = report["detection"]["vus_pr"]
    assert verdict["worse_than"] == [name for name, area in areas.items() if area > own]
    worst = report["detection"]["worst"]
    drawn = [each.read_text(encoding="utf-8") for each in sorted(plots.glob("worst-*.svg"))]
    assert len(drawn) == len(worst) == 2
    for each, text in zip(worst, drawn, strict=True):
        assert f">latch: {each['stream']}<" in text


@pytest.mark.parametrize(("kept", "season"), [({}, 24), ({"season_events": None}, None)])
def test_training_derives_prints_and_stores_the_season(
    kept: dict[str, None],
    season: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_nothing(monkeypatch)
    hours = np.arange(24 * 20)
    noise = np.random.default_rng(0).normal(0, 0.2, len(hours))
    options = {"validate_from": "1970-01-11", "test_from": "1970-01-20"}
    spec = latch_spec(epochs=1, heads=["odd"], **options)
    spec = spec.model_copy(update={"detection": DetectionSpec(head="odd", **kept)})
    frame = pl.DataFrame(
        {
            "id": "a",
            "at": hours * HOUR_MS,
            "noise": np.sin(2 * np.pi * hours / 24) + noise,
            "flag": False,
            "mark": 1.0,
            "kind": "a",
        }
    )
    report = train(spec, frame, tmp_path / "model")
    stored = load_artifact(report.artifact.path).spec.detection
    assert stored is not None
    assert (stored.season_events, stored.alarm.hold_events) == (season, 6)
    assert report.derived == ({"season_events": 24} if season else {})
    line = "training options from the data: season_events 24\n"
    assert (line in capsys.readouterr().out) == bool(season)


def test_a_model_without_numeric_targets_is_trained_without_a_season(
    frame: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_nothing(monkeypatch)
    spec = latch_spec(epochs=1, heads=["odd"])
    head = spec.heads[0].model_copy(update={"targets": ("flag", "kind")})
    spec = spec.model_copy(update={"heads": (head,), "detection": DetectionSpec(head="odd")})
    report = train(spec, frame, tmp_path / "model", quiet=True)
    stored = load_artifact(report.artifact.path).spec.detection
    assert stored is not None
    assert stored.fit is not None
    assert (report.derived, stored.season_events, len(stored.fit.tails)) == ({}, None, 1)


def test_labels_that_cannot_be_read_are_an_error_before_training(
    frame: pl.DataFrame, tmp_path: Path
) -> None:
    spec = latch_spec(epochs=1, heads=["odd"]).model_copy(update={"detection": DETECTION})
    with pytest.raises(DataError, match=r"field 'anomaly': .*a column of the labels"):
        train_frame(spec, frame, tmp_path / "out", anomalies="anomaly")
    assert not list(tmp_path.iterdir())


def test_training_reports_alarms_on_the_held_out_events(
    frame: pl.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A network that learned nothing is a worse forecast than the last value."""
    train_nothing(monkeypatch)
    spec = latch_spec(epochs=1, heads=["odd"]).model_copy(update={"detection": DETECTION})
    frame = frame.with_columns(anomaly=pl.Series(np.arange(frame.height) % 50 == 7))
    for anomalies in (None, "anomaly"):
        out = tmp_path / str(anomalies)
        train_frame(spec, frame, out, trees=False, anomalies=anomalies)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert [each["level"] for each in report["detection"]["probabilities"]["levels"]] == [
            0.01,
            0.001,
        ]
        assert report["detection"]["time_in_alarm"] is not None
        assert set(report["detection"]["warnings"]) <= set(report["warnings"])
        assert ("recall" in report["detection"]) == (anomalies is not None)
        printed = capsys.readouterr().out
        for line in ("| time in alarm |", "\n- below 0.01: ", "\n- below 0.001: "):
            assert line in printed
        for verdict in report["verdicts"]:
            assert verdict_line(verdict) in printed
