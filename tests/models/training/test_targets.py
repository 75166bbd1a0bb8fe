"""Tables without usable targets, or with cells that would be misread, are rejected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

pytest.importorskip("tensorflow")

from models.errors import DataError
from models.spec.model import ModelSpec, parse_spec, schema_of
from models.training.data import fitted_spec, split_of, streams_of
from models.training.defaults import resolve_training
from models.training.evaluate import evaluate
from models.training.files import read_data
from models.training.labels import labels_of
from models.training.plan import check_targets
from models.training.train_frame import train_frame
from models.training.trainer import train
from tests.support.training import HOUR_MS, train_nothing

DAY_MS = 24 * HOUR_MS
VALIDATE_MS, TEST_MS = 12 * HOUR_MS, 18 * HOUR_MS
BASE_MS = 1_700_006_400_000
"""2023-11-15T00:00:00Z."""


def table(streams: int = 8, steps: int = 24) -> pl.DataFrame:
    """Random events of two days, in a random order, with a label `up`."""
    random = np.random.default_rng(0)
    count = streams * steps
    rows = pl.DataFrame(
        {
            "id": [f"s{row // steps}" for row in range(count)],
            "at": [BASE_MS + row % steps * HOUR_MS + row // steps for row in range(count)],
            "noise": random.normal(size=count),
            "extra": random.normal(size=count),
            "flag": random.integers(2, size=count).astype(bool),
            "kind": ["ab"[each] for each in random.integers(2, size=count)],
            "up": random.integers(2, size=count).astype(bool),
        }
    )
    return rows[random.permutation(count)]


def spec_of(*heads: dict[str, Any]) -> ModelSpec:
    return parse_spec(
        {
            "name": "t",
            "events": {
                "fields": [
                    {"kind": "timestamp", "name": "at"},
                    {"kind": "numeric", "name": "noise"},
                    {"kind": "numeric", "name": "extra", "optional": True},
                    {"kind": "boolean", "name": "flag"},
                    {"kind": "categorical", "name": "kind", "embedding": 2},
                ]
            },
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": heads,
            "training": {
                "stream": "id",
                "validate_from": "2023-11-15T12:00:00Z",
                "test_from": "2023-11-15T18:00:00Z",
                "epochs": 1,
                "window_steps": 24,
                "batch_streams": 8,
            },
        }
    )


UP: dict[str, Any] = {"kind": "label", "name": "up"}
NEXT: dict[str, Any] = {"kind": "forecast", "name": "next", "targets": ["extra"]}
ODD: dict[str, Any] = {"kind": "anomaly", "name": "odd", "targets": ["noise", "extra"]}
POINT: dict[str, Any] = {"kind": "dense", "name": "point", "units": 1, "targets": ["extra"]}


def classes(target: str, **more: Any) -> dict[str, Any]:
    return {"kind": "classification", "name": "next", "target": target, **more}


def before(moment_ms: int) -> pl.Expr:
    return pl.col("at") < BASE_MS + moment_ms


TRAINING = r"before 2023-11-15T12:00:00Z \(validate_from\)"
VALIDATION = r"from 2023-11-15T12:00:00Z to before 2023-11-15T18:00:00Z \(test_from\)"


@pytest.mark.parametrize(
    ("head", "column", "cells", "actual"),
    [
        (UP, "up", pl.lit(True), "true alone"),
        (UP, "up", ~before(VALIDATE_MS), "false alone"),
        ({**UP, "classes": ["on", "off"]}, "up", pl.lit("off"), "'off' alone"),
        (classes("flag"), "flag", pl.lit(False), "false alone"),
        (classes("kind"), "kind", pl.lit("a"), "'a' alone"),
        (classes("noise", above=9.5), "noise", pl.col("noise"), "numbers at most 9.5 alone"),
    ],
    ids=["label", "label before the split", "classes", "boolean", "category", "above"],
)
def test_a_single_class_is_rejected(
    tmp_path: Path, head: dict[str, Any], column: str, cells: pl.Expr, actual: str
) -> None:
    frame = table().with_columns(cells.alias(column))
    with pytest.raises(
        DataError, match=rf"t\.csv: two classes.*{TRAINING}, got {actual}$"
    ) as caught:
        train(spec_of(head), frame, tmp_path / "out", quiet=True, source="t.csv")
    assert caught.value.field == column
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("head", "column"),
    [(NEXT, "extra"), (ODD, "extra"), (POINT, "extra"), (classes("extra", above=0.0), "extra")],
    ids=["forecast", "anomaly", "dense", "above"],
)
@pytest.mark.parametrize("cells", ["no column", "none", "before", "after"])
def test_a_target_without_values_is_rejected(
    tmp_path: Path, head: dict[str, Any], column: str, cells: str
) -> None:
    """If its optional column is missing, empty, or empty on one side of the split."""
    frame, value = table(), pl.col(column)
    side, actual = TRAINING, "none"
    match cells:
        case "no column":
            frame, actual = frame.drop(column), "no such column"
        case "none":
            frame = frame.with_columns(pl.lit(None, pl.Float64).alias(column))
        case "before":
            frame = frame.with_columns(pl.when(~before(VALIDATE_MS)).then(value).alias(column))
        case _:
            frame = frame.with_columns(pl.when(before(VALIDATE_MS)).then(value).alias(column))
            side = VALIDATION
    with pytest.raises(
        DataError, match=rf"t\.csv: values for head .* {side}, got {actual}$"
    ) as caught:
        train(spec_of(head), frame, tmp_path / "out", quiet=True, source="t.csv")
    assert caught.value.field == column
    assert not list(tmp_path.iterdir())


def test_a_label_without_values_is_rejected(tmp_path: Path) -> None:
    """Also if another head has targets."""
    frame = table().with_columns(up=pl.lit(None, pl.Boolean))
    with pytest.raises(DataError, match=rf"values for head 'up' {TRAINING}, got none$"):
        train(spec_of(classes("flag"), UP), frame, tmp_path / "out", quiet=True)


def test_an_invalid_label_is_reported_with_its_row(tmp_path: Path) -> None:
    """Rows are sorted by stream, but the first invalid one in the table is reported."""
    cells = pl.col("up").cast(pl.String)
    bad = pl.int_range(pl.len()).is_in([10, 11, 150])
    frame = table().with_columns(up=pl.when(bad).then(pl.lit("perhaps")).otherwise(cells))
    with pytest.raises(DataError, match=r"t\.csv, row 11: one of .*, got 'perhaps'"):
        train(spec_of(UP), frame, tmp_path / "out", quiet=True, source="t.csv")


def test_a_stream_without_timestamps_is_reported() -> None:
    spec = spec_of(UP)
    assert spec.events is not None
    assert spec.training is not None
    at = spec.events.fields[0].model_copy(update={"optional": True})
    spec = spec.model_copy(
        update={
            "events": spec.events.model_copy(update={"fields": (at, *spec.events.fields[1:])}),
            "training": spec.training.model_copy(update={"order_by": "noise"}),
        }
    )
    frame = table().with_columns(at=pl.when(pl.col("id") != "s3").then("at"))
    first = frame.with_row_index().filter(pl.col("id") == "s3").sort("noise")["index"][0]
    message = rf"t\.csv, row {first + 1}: a moment in stream 's3', got none"
    with pytest.raises(DataError, match=message) as caught:
        streams_of(spec, frame, "t.csv")
    assert caught.value.field == "at"


def test_heads_without_held_out_targets_are_not_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the AUC if they have a single class."""
    train_nothing(monkeypatch)
    frame = table().with_columns(
        extra=pl.when(before(TEST_MS)).then(pl.col("extra")),
        up=before(TEST_MS) & pl.col("up"),
    )
    spec = spec_of(NEXT, UP)
    artifact = train_frame(spec, frame, tmp_path / "out", trees=False)
    assert set(artifact.manifest["metrics"]["held_out"]) == {"up"}
    assert set(artifact.manifest["metrics"]["held_out"]["up"]) == {"log_loss", "brier"}
    printed = capsys.readouterr().out
    assert "next is not scored: none of its targets from 2023-11-15T18:00:00Z on" in printed
    assert "nan" not in printed
    scores = evaluate(artifact, frame, since="2023-11-15T18:00:00Z")
    assert scores["heads"] == {"up": scores["heads"]["up"]}
    assert set(scores["heads"]["up"]) == {"log_loss", "brier"}


def few(count: int, since_ms: int) -> pl.Expr:
    """Labels of which so many from a moment on are true, and all before it are random."""
    later = pl.when(before(since_ms)).then(None).otherwise(pl.col("at"))
    return pl.when(before(since_ms)).then(pl.col("up")).otherwise(later.rank("ordinal") <= count)


@pytest.mark.parametrize(
    ("head", "cells", "warnings"),
    [
        (UP, pl.col("up"), []),
        (
            UP,
            few(3, VALIDATE_MS) & before(TEST_MS),
            [
                rf"head 'up': 3 of 48 events are true {VALIDATION}; expected 10 or more to choose",
                r"head 'up': 0 of 48 events are true from 2023-11-15T18.* on; .* more to score",
            ],
        ),
        (
            classes("flag"),
            pl.struct("id", "at").rank("ordinal") == 5,
            [
                rf"head 'next': 1 of 88 events are true {TRAINING}; expected 10 or more to learn",
                rf"head 'next': 0 of 48 events are true {VALIDATION}",
                r"head 'next': 0 of 48 events are true from",
            ],
        ),
        (
            classes("kind"),
            pl.when(before(TEST_MS)).then(pl.col("kind")).otherwise(pl.lit("a")),
            [r"head 'next': all 48 events are 'a' from 2023-11-15T18.* more to score"],
        ),
    ],
    ids=["many", "label", "one true", "one class"],
)
def test_few_events_of_a_class_are_a_warning(
    head: dict[str, Any], cells: pl.Expr, warnings: list[str]
) -> None:
    column = head.get("target", "up")
    frame = table().with_columns(cells.alias(column))
    streams = streams_of(spec_of(head), frame)
    spec, _ = resolve_training(spec_of(head), streams)
    spec = fitted_spec(spec, streams, split_of(spec).validate)
    labels = labels_of(spec, streams.frame, rows=streams.table_rows)
    found = check_targets(spec, streams, labels)
    for text, pattern in zip(found, warnings, strict=True):
        assert re.search(pattern, text), text


def test_unnamed_columns_are_ignored(tmp_path: Path) -> None:
    """As some spreadsheets add at the end of every line."""
    path = tmp_path / "t.csv"
    path.write_text("".join(f"{line},,\n" for line in table().write_csv().splitlines()))
    streams_of(spec_of(UP), read_data(path, schema_of(spec_of(UP))))


def test_a_json_row_with_a_duplicate_member_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = table().write_ndjson().splitlines()
    lines[6] = lines[6].replace('"extra"', '"noise"')
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"t\.jsonl, line 7: each member once, got 'noise' 2 times"):
        read_data(path, schema_of(spec_of(UP)))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_epoch_seconds_are_rejected(tmp_path: Path, name: str) -> None:
    frame = table().with_columns(at=pl.col("at") // 1000)
    path = tmp_path / name
    {"csv": frame.write_csv, "jsonl": frame.write_ndjson, "parquet": frame.write_parquet}[
        name.split(".")[1]
    ](path)
    seconds = frame["at"][0]
    message = rf"{name}, row 1: epoch milliseconds, got {seconds}, which is 2023-11-15T.*Z in epoch"
    with pytest.raises(DataError, match=message) as caught:
        streams_of(spec_of(UP), read_data(path, schema_of(spec_of(UP))), name)
    assert caught.value.field == "at"
