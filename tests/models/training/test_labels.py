"""Labels: read from a column, used in their own split only, scored beside baselines."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import polars as pl
import pytest

pytest.importorskip("tensorflow")

from models import commands
from models.artifact.artifact import load_artifact
from models.errors import ArtifactError, DataError, SpecError
from models.spec.model import ModelSpec, parse_spec
from models.training import label_baselines
from models.training.data import fitted_spec, streams_of
from models.training.evaluate import target_rows
from models.training.labels import labels_of
from models.training.loop import Loop
from models.training.plan import plan_of
from models.training.table import Table
from models.training.train_frame import train_frame
from models.training.trainer import train
from tests.support.training import HOUR_MS, latch_frame, latch_spec, train_nothing

VALIDATE, TEST = 16 * HOUR_MS, 22 * HOUR_MS


def label_spec(*heads: dict[str, Any], **training: Any) -> ModelSpec:
    """The latch's network with label heads in place of its own."""
    spec = latch_spec(**training).model_dump()
    events = [field for field in spec["events"]["fields"] if field["name"] != "mark"]
    return parse_spec({**spec, "events": {**spec["events"], "fields": events}, "heads": heads})


UP = {"kind": "label", "name": "up"}
STATE = {"kind": "label", "name": "state", "classes": ["off", "on", "none"]}


def labelled_frame(streams: int = 24) -> pl.DataFrame:
    """`up` and `state` say what the first flag of the stream was, half of the time."""
    has_label = pl.int_range(pl.len()) % 2 == 0
    up = pl.col("mark") > 0
    return latch_frame(streams).with_columns(
        up=pl.when(has_label).then(up),
        state=pl.when(has_label).then(pl.when(up).then(pl.lit("on")).otherwise(pl.lit("off"))),
    )


def test_cells_are_parsed_to_classes() -> None:
    frame = pl.DataFrame(
        {"up": ["true", None, "0", " False "], "state": ["on", "off", None, "none"]}
    )
    labels = labels_of(label_spec(UP, STATE), frame)
    np.testing.assert_array_equal(labels["up"], np.float32([1, np.nan, 0, 0]))
    np.testing.assert_array_equal(labels["state"], np.float32([1, 0, np.nan, 2]))
    same = labels_of(label_spec(UP), pl.DataFrame({"up": [True, None, False, False]}))
    np.testing.assert_array_equal(same["up"], labels["up"])


@pytest.mark.parametrize(
    ("column", "cells", "message"),
    [
        ("up", ["true", "yes"], r"t\.csv, row 2: one of .*'true', .*, got 'yes'"),
        ("state", ["on", None, "On"], "row 3: one of .*'off', 'on', 'none'"),
        ("other", ["on"], "a column of the labels of 'up'"),
    ],
)
def test_a_wrong_cell_or_column_is_named(column: str, cells: list[str], message: str) -> None:
    head = STATE if column == "state" else UP
    with pytest.raises(DataError, match=message):
        labels_of(label_spec(head), pl.DataFrame({column: cells}), "t.csv")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({**UP, "column": "noise"}, "'noise' is one of their fields"),
        ({**STATE, "classes": ["on"]}, "two or more distinct classes"),
        ({**STATE, "classes": ["on", "on"]}, "two or more distinct classes"),
    ],
)
def test_labels_that_are_event_fields_or_have_one_class_are_rejected(
    head: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        label_spec(head)


def test_labels_are_used_in_their_own_split_only() -> None:
    spec = label_spec(UP)
    streams = streams_of(spec, labelled_frame())
    labels = labels_of(spec, streams.frame)
    plan = plan_of(fitted_spec(spec, streams, VALIDATE), streams, labels, VALIDATE, TEST)
    trained = ~np.isnan(plan.trained_labels["up"])
    validated = ~np.isnan(plan.validated_labels["up"])
    has_label, moments = ~np.isnan(labels["up"]), streams.moments_ms
    np.testing.assert_array_equal(trained, has_label & (moments < VALIDATE))
    np.testing.assert_array_equal(validated, has_label & (moments >= VALIDATE) & (moments < TEST))
    head = spec.heads[0]
    held_out = target_rows(head, streams, labels, TEST)
    np.testing.assert_array_equal(held_out, np.flatnonzero(has_label & (moments >= TEST)))


def test_labels_of_past_events_are_learned_better_than_by_stateless_baselines(tmp_path) -> None:
    """The flag is in the first event only, so a later label needs a state."""
    frame = labelled_frame(60)
    spec = label_spec(UP, STATE, epochs=8, learning_rate=0.03)
    few = label_baselines.Grid((0,), (1,), (7,), (5,), 0.1, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_baselines, "SINGLE", few)
        patch.setattr(label_baselines, "SEVERAL", few)
        train_frame(spec, frame, tmp_path / "model", quiet=True)
    artifact = load_artifact(tmp_path / "model")
    frame.write_csv(tmp_path / "events.csv")
    evaluation = commands.evaluate(
        tmp_path / "model",
        tmp_path / "events.csv",
        since="1970-01-01T22:00:00Z",
        chunk=3,
        quiet=True,
    )
    held_out = artifact.manifest["metrics"]["held_out"]
    for name in ("up", "state"):
        loss = evaluation["heads"][name]["log_loss"]
        assert loss == pytest.approx(held_out[name]["log_loss"], rel=1e-4)
        assert loss < 0.2
    report = orjson.loads((tmp_path / "model" / "report.json").read_bytes())
    for name in ("up", "state"):
        scores = report["heads"][name]["scores"]
        assert list(scores)[1:] == [
            label_baselines.BASE,
            label_baselines.LOGISTIC,
            label_baselines.THIS,
            label_baselines.LAST_EVENTS,
        ]
        for baseline in (label_baselines.BASE, label_baselines.LOGISTIC, label_baselines.THIS):
            assert scores[baseline]["log_loss"]["value"] > 0.5
    assert evaluation["scored"] == report["data"]["held_out"]


def test_no_report_without_held_out_labels(tmp_path, monkeypatch) -> None:
    """A head without targets does not cause a report either."""
    train_nothing(monkeypatch)
    spec = label_spec(UP, {"kind": "sequence", "name": "hidden"}, epochs=1)
    frame = labelled_frame(8).with_columns(up=pl.when(pl.col("at") < TEST).then("up"))
    artifact = train_frame(spec, frame, tmp_path / "model", trees=False, quiet=True)
    assert not (artifact.path / "report.json").exists()


def test_a_checkpoint_of_other_labels_is_rejected(tmp_path, monkeypatch) -> None:
    train_nothing(monkeypatch)

    class Stopped(Exception):
        pass

    def stop(_: dict[str, Any]) -> None:
        raise Stopped

    spec, frame = label_spec(UP, epochs=1), labelled_frame(8)
    with pytest.raises(Stopped):
        train(spec, frame, tmp_path / "model", quiet=True, after_epoch=stop)
    other = frame.with_columns(up=~pl.col("up"))
    with pytest.raises(ArtifactError, match="other data"):
        train(spec, other, tmp_path / "model", quiet=True, resume=True)


def test_padding_has_no_labels() -> None:
    spec = label_spec(UP)
    streams = streams_of(spec, labelled_frame(5))
    labels = labels_of(spec, streams.frame)
    fitted = fitted_spec(spec, streams, VALIDATE)
    loop = Loop(fitted, plan_of(fitted, streams, labels, VALIDATE, TEST), 1)
    padded = 0
    for window in (window for group in loop.plan.groups for window in loop._cut(group)):
        *_, lengths, _, window_labels = loop._tensors(window, loop.plan.trained, labels)
        beyond = np.arange(window_labels["up"].shape[1]) >= lengths[:, None]
        padded += int(beyond.sum())
        assert np.isnan(window_labels["up"][beyond]).all()
        np.testing.assert_array_equal(
            window_labels["up"][~beyond], labels["up"][window.index[~beyond]]
        )
    assert padded > 0


def test_label_baselines_see_the_labelled_event(monkeypatch) -> None:
    few = label_baselines.Grid((0,), (2,), (7,), (5,), 0.2, 60)
    monkeypatch.setattr(label_baselines, "SINGLE", few)
    monkeypatch.setattr(label_baselines, "SEVERAL", few)
    head = {"kind": "label", "name": "big"}
    frame = latch_frame(40).with_columns(big=pl.col("noise") > 0)
    spec = label_spec(head)
    streams = streams_of(spec, frame)
    labels = labels_of(spec, streams.frame)
    fitted = fitted_spec(spec, streams, VALIDATE)
    rows = [
        target_rows(spec.heads[0], streams, labels, start, stop)
        for start, stop in ((None, VALIDATE), (VALIDATE, TEST), (TEST, None))
    ]
    table = Table(fitted, streams, streams.encoded(fitted.events), *rows, labels)
    losses = {
        baseline.name: float(baseline.scored.losses["log_loss"].mean())
        for baseline in label_baselines.label_baselines(table, fitted.heads[0])
    }
    assert losses.pop(label_baselines.BASE) > 0.6
    assert all(loss < 0.1 for loss in losses.values()), losses
