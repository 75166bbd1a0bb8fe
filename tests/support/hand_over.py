"""Events of a topic, backfills of a part of them, and what consumers make of the rest."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.writing import write_artifact
from models.spec.model import schema_of
from service.backfill.engines import ThisProcess
from service.backfill.run import run_backfill
from tests.support.backfill import job_of, random_events
from tests.support.models import random_weights, small_spec

STREAMS = 7
Outputs = dict[str, dict[int, NDArray[np.float32]]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model whose sessions are of several of these events, so that their states matter."""
    spec = small_spec().model_copy(update={"session_gap_s": 60_000.0, "training": None})
    path = tmp_path_factory.mktemp("model") / "small"
    write_artifact(path, spec, random_weights(spec))
    return load_artifact(path)


@pytest.fixture(scope="module")
def events(small: Artifact) -> pl.DataFrame:
    """Events of streams in order, each with its entry in a topic."""
    number = pl.int_range(420)
    entry = pl.format("{}-{}", number // 3 + 1, number % 3)
    return random_events(schema_of(small.spec), 420, streams=STREAMS).with_columns(entry=entry)


def backfill(artifact: Artifact, events: pl.DataFrame, folder: Path, **changes: Any) -> Path:
    """Compute a history; returns the output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    events.write_parquet(folder / "events.parquet")
    job = job_of(artifact, [folder / "events.parquet"], folder / "out", **changes)
    run_backfill(job, ThisProcess(job))
    return folder / "out"


def outputs_in(out: Path) -> Outputs:
    """The outputs of a backfill, by stream and position."""
    found: Outputs = {}
    table = pl.read_parquet(out / "outputs" / "*.parquet")
    values = table.drop("stream", "time", "position", "file", "row").to_numpy()
    for name, position, row in zip(table["stream"], table["position"], values, strict=True):
        found.setdefault(name, {})[position] = row
    return found


def packed(outputs: dict[str, Any]) -> NDArray[np.float32]:
    """Outputs of one event in JSON as a row."""
    return np.concatenate([np.ravel(np.asarray(each, np.float32)) for each in outputs.values()])


def body_of(row: dict[str, Any]) -> dict[str, Any]:
    """The event of a row, as it is sent."""
    at = datetime.fromtimestamp(row["at"] / 1000, UTC).isoformat()
    return {
        name: at if name == "at" else value
        for name, value in row.items()
        if name not in ("stream", "entry") and value is not None
    }


def publish(client: Any, events: pl.DataFrame) -> None:
    """Add events to their topic."""
    pipe = client.pipeline(transaction=False)
    for row in events.iter_rows(named=True):
        fields = {"stream": row["stream"], "event": json.dumps(body_of(row))}
        pipe.xadd("events", fields, id=row["entry"])
    pipe.execute()


def lengths_of(events: pl.DataFrame) -> dict[str, int]:
    return dict(events.group_by("stream").len().iter_rows())
