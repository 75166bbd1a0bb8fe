"""Two artifacts are compared on the same events, with intervals of their paired differences."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

pytest.importorskip("tensorflow")

from carry.cli import app
from models import commands
from models.artifact.artifact import load_artifact
from models.artifact.writing import write_artifact
from models.errors import DataError, SpecError, VerdictError
from models.events.schema import NumericField
from models.networks.initial_weights import draw_weights
from models.spec.model import ModelSpec, parse_spec, schema_of
from models.training.compare import comparison_lines
from models.training.data import fitted_spec, streams_of
from models.training.evaluate import evaluate
from tests.support.training import HOUR_MS, latch_frame, latch_spec

VALIDATE = 16 * HOUR_MS


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return latch_frame()


@pytest.fixture(scope="module")
def spec(frame: pl.DataFrame) -> ModelSpec:
    plain = latch_spec(dropout=0.0)
    return fitted_spec(plain, streams_of(plain, frame), VALIDATE)


@pytest.fixture
def folder(tmp_path: Path, frame: pl.DataFrame, spec: ModelSpec) -> Path:
    """A table, an artifact, and one whose `up` says the opposite with more certainty."""
    frame.write_csv(tmp_path / "events.csv")
    weights = draw_weights(spec, 1)
    write_artifact(tmp_path / "usual", spec, weights)
    confident = {**weights, "heads.up.bias": np.full(1, 9.0, np.float32)}
    write_artifact(tmp_path / "confident", spec, confident)
    return tmp_path


def test_an_artifact_is_level_with_itself(folder: Path) -> None:
    files = folder / "usual", folder / "usual", folder / "events.csv"
    compared = commands.compare(*files, quiet=True)
    assert compared["verdict"] == "level"
    for head in compared["heads"].values():
        assert head["difference"][head["metric"]] == {"value": 0.0, "interval": [0.0, 0.0]}
    with pytest.raises(VerdictError, match=r"expected a model better than .*, got level for"):
        commands.compare(*files, quiet=True, fail_if="not-better")


def test_a_worse_head_decides_the_verdict_on_the_second(folder: Path) -> None:
    a, b, data = folder / "usual", folder / "confident", folder / "events.csv"
    compared = commands.compare(a, b, data, quiet=True)
    verdicts = {name: head["verdict"] for name, head in compared["heads"].items()}
    assert verdicts == {"up": "worse", "next": "level", "odd": "level"}
    assert compared["verdict"] == "worse"
    difference = compared["heads"]["up"]["difference"]["log_loss"]
    assert 0 < difference["interval"][0] < difference["value"] < difference["interval"][1]
    assert commands.compare(b, a, data, quiet=True, fail_if="not-better")["verdict"] == "better"


def test_the_scores_are_those_of_an_evaluation(folder: Path, frame: pl.DataFrame) -> None:
    """Of the events that both hold out; nats are of values in their units."""
    artifact = load_artifact(folder / "usual")
    events = schema_of(artifact.spec)
    later = artifact.spec.model_copy(
        update={
            "training": latch_spec(test_from="1970-01-02T01:00:00Z").training,
        }
    )
    write_artifact(folder / "later", later, artifact.weights)
    since = {"test": "1970-01-01T22:00:00Z", "later": "1970-01-02T01:00:00Z"}
    for second, moment in (("usual", since["test"]), ("later", since["later"])):
        scores = evaluate(artifact, frame, since=moment)
        data = folder / "events.csv"
        heads = commands.compare(folder / second, folder / "usual", data, quiet=True)["heads"]
        for name in ("up", "next"):
            for metric, score in heads[name]["scores"]["b"].items():
                assert score["value"] == pytest.approx(scores["heads"][name][metric])
        noise = next(each for each in events.fields if each.name == "noise")
        assert isinstance(noise, NumericField)
        assert noise.std is not None
        assert heads["odd"]["scores"]["b"]["nll"]["value"] == pytest.approx(
            scores["heads"]["odd"]["nll"] + np.log(noise.std)
        )


def test_heads_of_another_task_are_not_compared(folder: Path, spec: ModelSpec) -> None:
    plain = spec.model_dump()
    plain["heads"] = [
        {**plain["heads"][0], "above": 0.5},
        {**plain["heads"][1]},
        {**plain["heads"][2], "name": "strange"},
    ]
    other = parse_spec(plain)
    write_artifact(folder / "other", other, draw_weights(other, 1))
    compared = commands.compare(folder / "usual", folder / "other", folder / "events.csv")
    assert compared["heads"].keys() == {"next"}
    assert compared["not_compared"] == {
        "odd": "only A has it",
        "strange": "only B has it",
        "up": "it predicts something else in A than in B",
    }
    plain["heads"] = plain["heads"][:1]
    none = parse_spec(plain)
    write_artifact(folder / "none", none, draw_weights(none, 1))
    with pytest.raises(SpecError, match=r"expected a head that both artifacts have.*next: only A"):
        commands.compare(folder / "usual", folder / "none", folder / "events.csv")


@pytest.mark.parametrize(
    "head",
    [
        {"kind": "classification", "target": "kind"},
        {"kind": "classification", "target": "kind", "top": 2},
        {"kind": "anomaly", "targets": ["kind"]},
    ],
    ids=lambda head: f"{head['kind']} {head.get('top', '')}",
)
def test_an_artifact_that_knows_fewer_categories_gains_nothing_by_it(
    folder: Path, spec: ModelSpec, head: dict[str, Any]
) -> None:
    """Always predicting "unknown" is right for each category that it does not know."""
    plain = spec.model_dump()
    field = next(each for each in plain["events"]["fields"] if each["name"] == "kind")
    plain["heads"] = [{"name": "next", **head}]
    for name, vocabulary in (("both", ("a", "b")), ("other order", ("b", "a")), ("few", ("a",))):
        field["vocabulary"] = vocabulary
        one = parse_spec(plain)
        weights = draw_weights(one, 1)
        bias = np.zeros(1 + len(vocabulary), np.float32)
        bias[0] = 5.0 if name == "few" else -5.0
        weights = {**weights, "heads.next.bias": bias}
        write_artifact(folder / name, one, weights)
    data = folder / "events.csv"
    compared = commands.compare(folder / "both", folder / "few", data, quiet=True)["heads"]["next"]
    assert compared["verdict"] == "worse"
    assert compared["unknown"] > 0
    whole = commands.compare(folder / "both", folder / "other order", data, quiet=True)
    assert whole["heads"]["next"]["unknown"] == 0
    assert whole["heads"]["next"]["events"] == compared["events"] + compared["unknown"]
    lines = "\n".join(comparison_lines({**whole, "heads": {"next": compared}}))
    left_out = f"next: {compared['unknown']} events whose category A and B do not both know"
    assert left_out in lines


def test_artifacts_of_other_streams_are_rejected(folder: Path, spec: ModelSpec) -> None:
    training = {**spec.model_dump()["training"], "stream": "kind"}
    other = parse_spec({**spec.model_dump(), "training": training})
    write_artifact(folder / "other", other, draw_weights(other, 1))
    with pytest.raises(DataError, match=r"the same streams, .* got id and kind"):
        commands.compare(folder / "usual", folder / "other", folder / "events.csv")


def test_the_command_exits_with_a_status_of_its_own_for_a_worse_artifact(folder: Path) -> None:
    files = [str(folder / name) for name in ("usual", "confident", "events.csv")]
    result = CliRunner().invoke(app, ["compare", *files, "--json", "--fail-if", "worse"])
    assert result.exit_code == 3
    assert json.loads(result.stdout)["heads"]["up"]["verdict"] == "worse"
    assert re.search(
        "expected a model no worse than .*, got worse for up, level for", result.stderr
    )
    result = CliRunner().invoke(app, ["compare", *files])
    assert result.exit_code == 0
    assert "up: B is worse than A, by log_loss (lower is better)" in result.stdout
    missing = CliRunner().invoke(app, ["compare", *files[:2], "none.csv", "--fail-if", "worse"])
    assert missing.exit_code == 1
