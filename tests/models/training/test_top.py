"""Scores of a head with the most probable categories, and the n-grams beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from models.spec.heads import DEFAULT_TOP, MAX_ALL, Head
from models.spec.model import ModelSpec, parse_spec, schema_of
from models.training.baselines import NGRAMS, baselines_of
from models.training.data import Streams, fitted_spec, split_of, streams_of
from models.training.evaluate import head_metrics, target_rows
from models.training.table import Table
from models.training.train_frame import train_frame
from tests.support.training import train_nothing

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    field = {"kind": "categorical", "name": "kind", "vocabulary": NAMES}
    training = {"stream": "s", "order_by": "at", "epochs": 1, "patience": 1, "window_steps": 4}
    training |= {"segment_windows": 1, "batch_streams": 2, "learning_rate": 0.01}
    split = {"validate_from": "2021-01-01T00:00:00Z", "test_from": "2022-01-01T00:00:00Z"}
    return parse_spec(
        {
            "name": "m",
            "events": {"fields": [field]},
            "layers": [{"kind": "lstm", "units": 2}],
            "heads": [{"kind": "classification", "name": "next", "target": "kind", "top": 2}],
            "training": {**training, **split},
        }
    )


@pytest.fixture(scope="module")
def streams(spec: ModelSpec) -> Streams:
    """Of each year two streams, in which c comes after two b, and b after c or one b."""
    parts = [
        {"s": f"{year}-{at}", "at": f"{year}-01-0{at + 1}T00:00:00Z", "kind": ["b", "b", "c"] * 8}
        for year in (2020, 2021, 2022)
        for at in (1, 2)
    ]
    return streams_of(spec, pl.DataFrame(parts).explode("kind"))


def target(spec: ModelSpec) -> Head:
    (head,) = spec.heads
    return head


def test_losses_are_of_the_events_own_surprise_and_of_the_categories_before(
    spec: ModelSpec, streams: Streams
) -> None:
    outputs = np.zeros((streams.events, 5), np.float32)
    outputs[:, 2:4] = [2, 3]  # b and c at every event, b as the most probable
    outputs[:, 4] = np.arange(streams.events)
    at = target_rows(target(spec), streams, {}, split_of(spec).test)
    (metrics,) = head_metrics(spec, outputs, streams, {}, split_of(spec).test).values()
    is_c = np.array(streams.frame["kind"].to_list())[at] == "c"
    assert metrics == {"log_loss": at.mean(), "error": is_c.mean(), "top_2_error": 0.0}


def test_a_large_vocabulary_has_its_most_probable_categories_as_outputs(spec: ModelSpec) -> None:
    names = [f"n{at % (MAX_ALL + 1)}" for at in range(2 * MAX_ALL + 2)]
    frame = pl.DataFrame({"kind": names, "s": "x", "at": "2020-01-01T00:00:00Z"})
    head = {**target(spec).model_dump(), "top": None}
    field = spec.events.fields[0].model_dump() | {"vocabulary": None} if spec.events else {}
    plain = parse_spec({**spec.model_dump(), "events": {"fields": [field]}, "heads": [head]})
    tops = []
    for rows in (MAX_ALL, MAX_ALL + 1):
        few = streams_of(plain, frame.head(rows))
        (fitted,) = fitted_spec(plain, few, split_of(plain).validate).heads
        tops.append(fitted.model_dump().get("top"))
    assert tops == [None, DEFAULT_TOP]


def test_ngrams_are_the_baselines_and_find_the_longer_history(
    spec: ModelSpec, streams: Streams
) -> None:
    head, split = target(spec), split_of(spec)

    def rows(start: int | None, stop: int | None) -> NDArray[np.int64]:
        return target_rows(head, streams, {}, start, stop)

    table = Table(
        spec,
        streams,
        streams.encoded(schema_of(spec)),
        rows(None, split.validate),
        rows(split.validate, split.test),
        rows(split.test, None),
    )
    last, ngrams = baselines_of(table, head)
    assert ngrams.name == NGRAMS
    assert ngrams.settings["order"] >= 2
    assert 3 * ngrams.scored.means()["log_loss"] < last.scored.means()["log_loss"]
    assert len(ngrams.scored.losses["log_loss"]) == len(table.test)


def test_each_network_of_several_seeds_is_scored(
    spec: ModelSpec, streams: Streams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorflow")
    train_nothing(monkeypatch)
    plain = spec.model_dump()
    plain["training"]["seeds"] = 2
    train_frame(parse_spec(plain), streams.frame, tmp_path / "m", trees=False, quiet=True)
    head = json.loads((tmp_path / "m" / "report.json").read_text())["heads"]["next"]
    assert list(head["seeds"]) == ["1", "2"]
    kept = {metric: score["value"] for metric, score in head["scores"]["model"].items()}
    assert head["seeds"]["1"] == pytest.approx(kept)
    assert head["seeds"]["2"] != pytest.approx(kept)
