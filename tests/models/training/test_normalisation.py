"""A pooled network on streams of different scales: units of outputs and scores, and the split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from models import commands
from models.artifact.artifact import Artifact, load_artifact
from models.errors import DataError, SpecError
from models.spec.layout import output_spec
from models.spec.model import ModelSpec, parse_spec
from models.training.data import fitted_spec, split_of, streams_of, without_normalisation
from models.training.defaults import resolve_training
from models.training.evaluate import evaluate, run_chunks
from models.training.plan import plan_of
from models.training.report import make_report, report_lines
from models.training.trainer import train
from tests.support.oracle_statistics import statistics_of

HOUR_MS = 3_600_000
LENGTHS = {"long": 160, "short": 80, "late": 100}
LEVELS = {"long": (0.0, 1.0), "short": (1e6, 1e3), "late": (-5.0, 1e-3)}
"""Level and deviation of each stream."""


def frame_of(lengths: dict[str, int] = LENGTHS) -> pl.DataFrame:
    """Streams that begin at different times; every tenth value is missing."""
    random = np.random.default_rng(3)
    parts = []
    for number, (name, length) in enumerate(lengths.items()):
        level, scale = LEVELS[name]
        wave = np.sin(np.arange(length) / 2) + 0.3 * random.normal(size=length)
        load = [None if at % 10 == 9 else level + scale * x for at, x in enumerate(wave)]
        times = (np.arange(length) + 50 * number) * HOUR_MS
        parts.append(pl.DataFrame({"unit": name, "at": times, "load": load}))
    return pl.concat(parts)


def spec_of(**training: Any) -> ModelSpec:
    split = training or {"validate_share": 0.2, "test_share": 0.3}
    return parse_spec(
        {
            "name": "pooled",
            "events": {
                "fields": [
                    {"kind": "timestamp", "name": "at", "calendar": ["hour"]},
                    {
                        "kind": "numeric",
                        "name": "load",
                        "optional": True,
                        "normalisation": {"prior_events": 5, "memory_events": 50},
                        "season_events": 12,
                    },
                ]
            },
            "layers": [{"kind": "gru", "units": 4}],
            "heads": [
                {"kind": "forecast", "name": "next", "targets": ["load"]},
                {"kind": "anomaly", "name": "surprise", "targets": ["load"]},
            ],
            "training": {
                "stream": "unit",
                "epochs": 2,
                "window_steps": 16,
                "batch_streams": 4,
                **split,
            },
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("pooled") / "artifact"
    train(spec_of(), frame_of(), out, quiet=True)
    return load_artifact(out)


@pytest.fixture(scope="module")
def outputs(trained: Artifact) -> NDArray[np.float32]:
    return run_chunks(trained, streams_of(trained.spec, frame_of()), chunk=7)


@pytest.fixture
def computed(outputs: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are computed from these outputs, since each run compiles the network again."""
    for module in ("evaluate", "report"):
        monkeypatch.setattr(f"models.training.{module}.run_chunks", lambda *_, **__: outputs)


def test_forecasts_are_in_the_units_of_each_stream(
    trained: Artifact, outputs: NDArray[np.float32]
) -> None:
    streams = streams_of(trained.spec, frame_of())

    medians = output_spec(trained.spec).by_name(outputs)["next"][:, 0, 1]

    for name, (start, stop) in zip(streams.names, streams.spans, strict=True):
        level, scale = LEVELS[name]
        off = (medians[start + 20 : stop].astype(float) - level) / scale
        assert np.abs(off).max() < 4
        assert np.std(off) > 0.01


@pytest.mark.usefixtures("computed")
def test_scores_are_in_stated_units(trained: Artifact, outputs: NDArray[np.float32]) -> None:
    frame, spec = frame_of(), trained.spec
    streams = streams_of(spec, frame)
    by_head = output_spec(spec).by_name(outputs)
    field = spec.events.field("load")  # type: ignore[union-attr]
    nats, scaled = [], []
    for start, stop in streams.spans:
        values = frame_values(streams, start, stop)
        rows = statistics_of(field, values)  # type: ignore[arg-type]
        for at in range(1, stop - start):
            if values[at] is None:
                nats.append(0.0)
                continue
            std = rows[at - 1].std
            nats.append(float(by_head["surprise"][start + at]) + np.log(std / field.std))  # type: ignore[union-attr]
            median = float(by_head["next"][start + at - 1, 0, 1])
            scaled.append(abs(values[at] - median) / std)

    heads = evaluate(trained, frame)["heads"]

    assert heads["surprise"]["nll"] == pytest.approx(np.mean(nats), rel=1e-4)
    assert heads["next"]["scaled_mae"] == pytest.approx(np.mean(scaled), rel=1e-2)
    assert next(iter(heads["next"])) == "scaled_pinball"


def frame_values(streams: Any, start: int, stop: int) -> list[float | None]:
    present = streams.columns.present["load"][start:stop].tolist()
    values = streams.columns.values["load"][start:stop].tolist()
    return [value if there else None for value, there in zip(values, present, strict=True)]


@pytest.mark.usefixtures("computed")
def test_a_report_scores_baselines_on_globally_standardised_values(trained: Artifact) -> None:
    frame = frame_of()

    report = make_report(trained, frame, trees=False, draws=20)

    next_ = report["heads"]["next"]
    scores = next_["scores"]
    for settings in next_["settings"].values():
        assert settings["errors_in"] == "deviations of the stream"
    assert {name for name, each in scores.items() if "scaled_mae" in each} == set(scores)
    assert "in the last 0.3 of each stream" in report_lines(report)[0]
    plain = without_normalisation(trained.spec)
    globally = streams_of(plain, frame).encoded(plain.events)[:, 3]  # type: ignore[arg-type]
    assert [c.name for c in plain.columns][3] == "load"
    assert np.std(globally[streams_of(plain, frame).columns.present["load"]]) > 0.3
    assert report["data"]["held_out"] == sum(held_out(length) for length in LENGTHS.values())


def held_out(length: int) -> int:
    return sum(at * 1_000_000 // length >= 700_000 for at in range(length))


@pytest.mark.usefixtures("computed")
def test_held_out_events_are_scored_by_share_or_from_a_moment(
    trained: Artifact, tmp_path: Path
) -> None:
    frame = frame_of()
    frame.write_parquet(tmp_path / "data.parquet")
    scored = commands.evaluate(trained.path, tmp_path / "data.parquet", held_out=True, quiet=True)
    assert scored["scored"] == sum(held_out(length) for length in LENGTHS.values())

    since = evaluate(trained, frame, since="1970-01-07T00:00:00Z")
    moment_ms = 6 * 24 * HOUR_MS
    assert since["scored"] == int((frame["at"] >= moment_ms).sum())

    with pytest.raises(SpecError, match="--since: expected none for a model that is split by"):
        make_report(trained, frame, trees=False, since="1970-01-07T00:00:00Z")


def test_a_split_by_share_trains_on_the_beginning_of_each_stream() -> None:
    spec, streams = spec_of(), streams_of(spec_of(), frame_of())
    resolved, _ = resolve_training(spec, streams)
    split = split_of(resolved)
    fitted = fitted_spec(resolved, streams, split.validate)

    plan = plan_of(fitted, streams, {}, split.validate, split.test)

    for start, stop in streams.spans:
        length = stop - start
        # step t predicts event t + 1, which decides the side
        sides = [(at + 1) * 1_000_000 // length for at in range(length - 1)]
        assert plan.trained[start : stop - 1].tolist() == [side < 500_000 for side in sides]
        expected = [500_000 <= side < 700_000 for side in sides]
        assert plan.validated[start : stop - 1].tolist() == expected
        assert not plan.trained[stop - 1]
    # what is fitted depends on training events alone
    changed = frame_of().with_columns(
        load=pl.when(streams_keys(streams) < 500_000).then(pl.col("load")).otherwise(1e9)
    )
    again = fitted_spec(resolved, streams_of(resolved, changed), split.validate)
    assert again.events == fitted.events


def streams_keys(streams: Any) -> pl.Series:
    """The keys in the order of the table."""
    keys = np.zeros(streams.events, np.int64)
    keys[streams.table_rows] = streams.split_keys
    return pl.Series(keys)


def test_an_open_share_has_a_default() -> None:
    _, derived = resolve_training(spec_of(test_share=0.3), streams_of(spec_of(), frame_of()))

    assert derived["validate_share"] == 0.15
    assert "validate_from" not in derived


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"validate_share": 0.2, "test_from": "2020-01-01"}, "expected test_from or shares"),
        ({"validate_share": 0.6, "test_share": 0.4}, "that leave events to train on"),
        ({"validate_share": 0.0}, "greater than 0"),
    ],
)
def test_a_contradictory_split_is_rejected(training: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(**training)


def test_a_split_by_share_without_training_events_is_rejected(tmp_path: Path) -> None:
    frame = frame_of().group_by("unit", maintain_order=True).head(1)
    with pytest.raises(DataError):
        train(spec_of(), frame, tmp_path / "none", quiet=True)
