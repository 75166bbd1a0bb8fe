"""A small model and a history of it, for a module's tests."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from models.artifact.artifact import Artifact
from models.spec.model import schema_of
from tests.support.backfill import EVENTS, random_events, small_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return small_artifact(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def frame(artifact: Artifact) -> pl.DataFrame:
    return random_events(schema_of(artifact.spec), EVENTS, streams=9)


@pytest.fixture(scope="module")
def history(frame: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The events in two files, neither of them in order."""
    folder = tmp_path_factory.mktemp("history")
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=3)
    shuffled.head(150).write_parquet(folder / "a.parquet")
    shuffled.tail(-150).write_csv(folder / "b.csv")
    return [folder / "a.parquet", folder / "b.csv"]
