"""A stream is plotted with the values, forecasts, scores, alarms and labels that it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

pytest.importorskip("tensorflow")

from models.artifact.artifact import Artifact
from models.commands import plot
from models.errors import ArtifactError, DataError
from models.events.schema import NumericField
from models.networks.initial_artifact import initialise_artifact
from models.spec.detection import DetectionFit, Tail
from models.spec.model import ModelSpec, parse_spec
from models.training.baselines import in_units
from models.training.data import streams_of
from models.training.stream_plot import by_field
from tests.support.command import carry

HOUR_MS, EVENTS = 3_600_000, 60
USUAL = Tail(threshold=1.0, exceeded=0.05, scale=1.0, shape=0.1)
FIT = DetectionFit(
    tails=(USUAL,) * 6,
    combined=USUAL,
    rates=(0.05,),
    thresholds=(1e-4,),
    events_per_day=24.0,
)
FIELD = {"kind": "numeric", "name": "level", "mean": 5.0, "std": 2.0}
SPEC = {
    "name": "tanks",
    "layers": [{"kind": "lstm", "units": 2}],
    "heads": [
        {"kind": "anomaly", "name": "odd", "targets": ["level"]},
        {"kind": "forecast", "name": "next", "targets": ["level"], "quantiles": [0.1, 0.5, 0.9]},
        {"kind": "classification", "name": "high", "target": "level", "above": 5.0},
    ],
    "detection": {"head": "odd", "alarm": {"close_above": 0.05}},
    "training": {"stream": "tank"},
}


def spec_of(field: dict[str, object], **changes: object) -> ModelSpec:
    time = {"kind": "timestamp", "name": "at", "gap_mean": 8.0, "gap_std": 1.0}
    parsed = parse_spec({**SPEC, "events": {"fields": [time, {**FIELD, **field}]}, **changes})
    assert parsed.detection is not None
    detection = parsed.detection.model_copy(update={"fit": FIT})
    return parsed.model_copy(update={"detection": detection})


def table() -> pl.DataFrame:
    values = 5 + np.sin(np.arange(EVENTS) / 3)
    values[40] = 60.0
    return pl.DataFrame(
        {
            "tank": "t1",
            "at": np.arange(EVENTS) * HOUR_MS,
            "level": values,
            "anomaly": np.arange(EVENTS) == 40,
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "events.parquet"
    table().write_parquet(path)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return initialise_artifact(spec_of({}), tmp_path_factory.mktemp("models") / "tanks", 1)


def test_a_plot_shows_values_forecasts_scores_and_alarms(
    artifact: Artifact, data: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    plot(artifact.path, data, "t1", first, anomalies="anomaly")
    text = first.read_text(encoding="utf-8")
    for shown in (
        ">tanks: t1<",
        ">level<",
        ">predicted<",
        ">quantiles 0.1 to 0.9<",
        ">tail probability<",
        ">threshold<",
        ">alarm<",
        " above the value before<",
        ">labelled<",
        ">high<",
    ):
        assert shown in text, shown
    plot(artifact.path, data, "t1", second, until="1970-01-02T12:00:00Z", overwrite=True)
    assert ">alarm<" not in second.read_text(encoding="utf-8")


def test_a_plot_leaves_out_fields_that_the_stream_does_not_have(tmp_path: Path) -> None:
    fields = [{**FIELD, "optional": True}, {**FIELD, "name": "inflow", "optional": True}]
    time = {"kind": "timestamp", "name": "at", "gap_mean": 8.0, "gap_std": 1.0}
    heads = [{"kind": "anomaly", "name": "odd", "targets": ["level", "inflow"]}]
    spec = parse_spec({**SPEC, "events": {"fields": [time, *fields]}, "heads": heads})
    assert spec.detection is not None
    detection = spec.detection.model_copy(update={"fit": FIT})
    spec = spec.model_copy(update={"detection": detection})
    artifact = initialise_artifact(spec, tmp_path / "tanks", 1)
    frame = table().with_columns(inflow=pl.lit(None, pl.Float64))
    frame.write_parquet(tmp_path / "events.parquet")
    plot(artifact.path, tmp_path / "events.parquet", "t1", tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert ">level<" in text
    assert ">inflow<" not in text


def test_plot_errors_name_the_cause(artifact: Artifact, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "plot.svg"
    for stream, path, options, message in (
        ("t2", out, {}, r"events of stream 't2', got \['t1'\]"),
        ("t1", out, {"since": "2001-01-01"}, "events of 't1' in that time, got none; .* to 1970-"),
        ("t1", out, {"anomalies": "label"}, "a column of the labels of anomalies"),
        ("t1", tmp_path / "plot.txt", {}, "OUT to end in .svg, .png, .pdf"),
    ):
        with pytest.raises(DataError, match=message):
            plot(artifact.path, data, stream, path, **options)
    pl.DataFrame({"at": [0]}).write_parquet(tmp_path / "nameless.parquet")
    with pytest.raises(DataError, match="a column of that name"):
        plot(artifact.path, tmp_path / "nameless.parquet", "t1", out)
    done = carry("plot", artifact.path, data, "t2", out)
    assert done.exit_code == 1
    assert "events of stream 't2'" in done.stderr
    out.write_text("here")
    with pytest.raises(ArtifactError, match=r"exists; .* --overwrite"):
        plot(artifact.path, data, "t1", out)


@pytest.mark.parametrize("transform", ["none", "signed_log1p"])
def test_values_standardised_by_the_stream_return_to_their_units(transform: str) -> None:
    field = {"normalisation": {"std": 1.0, "memory_events": 20}, "transform": transform}
    spec = spec_of(field, heads=SPEC["heads"][:1])  # type: ignore[index]
    assert spec.events is not None
    streams = streams_of(spec, table().with_columns(level=pl.col("level").clip(upper_bound=6)), "d")
    level = spec.events.field("level")
    assert isinstance(level, NumericField)
    rows = streams.encoded(spec.events)[:, spec.events.column_index["level"]].astype(np.float64)
    found = in_units(spec, "level", by_field(spec, streams, level, rows))
    np.testing.assert_allclose(found, streams.columns.values["level"], rtol=1e-5)
