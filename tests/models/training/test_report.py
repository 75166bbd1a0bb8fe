import json
import warnings

import numpy as np
import polars as pl
import pytest

pytest.importorskip("tensorflow")

from models import commands
from models.artifact.artifact import load_artifact
from models.errors import ArtifactError, DataError, VerdictError
from models.training import trees
from models.training.baselines import LAST, RUNNING, TREES, baselines_of
from models.training.data import fitted_spec, streams_of
from models.training.evaluate import scored_rows
from models.training.measurements import entry_of
from models.training.report import make_report, report_lines
from models.training.scores import MODEL
from models.training.table import Table
from models.training.train_frame import train_frame
from models.training.trainer import checkpoint_path
from models.training.trees import TimeBudget, Trees, tree_features
from models.training.verdicts import verdict_line
from tests.support.training import HOUR_MS, latch_frame, latch_spec, train_nothing

VALIDATE, TEST = 16 * HOUR_MS, 22 * HOUR_MS


def table_of(frame: pl.DataFrame) -> Table:
    streams = streams_of(latch_spec(), frame)
    spec = fitted_spec(latch_spec(), streams, VALIDATE)
    assert spec.events is not None
    return Table(
        spec,
        streams,
        streams.encoded(spec.events),
        scored_rows(streams, None, VALIDATE),
        scored_rows(streams, VALIDATE, TEST),
        scored_rows(streams, TEST),
    )


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    """Forty trees and two tries are enough for tables this small."""
    monkeypatch.setattr(trees, "FULL", trees.Grid((0, 1), (2, 5), (7,), (5,), 0.1, 40))
    monkeypatch.setattr(trees, "SHORT", trees.Grid((0,), (5,), (7,), (5,), 0.1, 40))


@pytest.fixture(scope="module")
def table() -> Table:
    return table_of(latch_frame(60))


def test_a_constant_target_is_predicted_by_its_last_value(table):
    up, noise, odd = table.spec.heads
    scores = {b.name: b.scored for b in baselines_of(table, up, trees=True)}
    assert list(scores) == [LAST, RUNNING, TREES]
    for scored in scores.values():
        assert np.nanmean(scored.losses["log_loss"]) < 0.1
    for head in (noise, odd):
        names = [baseline.name for baseline in baselines_of(table, head, trees=False)]
        assert names == [LAST, RUNNING]


def test_a_target_that_never_changes_has_finite_baselines() -> None:
    table = table_of(latch_frame(20).with_columns(noise=pl.lit(0.25)))
    for baseline in baselines_of(table, table.spec.heads[2], trees=False):
        assert np.isfinite(baseline.scored.losses["nll"]).all()


def test_the_running_mean_of_noise_has_the_expected_loss(table):
    noise = table.spec.heads[1]
    baselines = {b.name: b for b in baselines_of(table, noise, trees=False)}
    last, running = (np.nanmean(baselines[n].scored.losses["mae"]) for n in (LAST, RUNNING))
    # E|x| of a standard normal is 0.80; of the difference of two it is 1.13.
    assert running == pytest.approx(0.80, abs=0.08)
    assert last > running + 0.15
    nll = {
        b.name: np.nanmean(b.scored.losses["nll"])
        for b in baselines_of(table, table.spec.heads[2], trees=False)
    }
    # A standard normal has 1.419 nats, a fair coin 0.693.
    assert nll[RUNNING] == pytest.approx(1.419 + 0.693, abs=0.1)


def test_no_baseline_is_fitted_on_held_out_events(table):
    """Held-out events of other streams do not change the predictions for a stream."""
    frame = latch_frame(60)
    other = (pl.col("at") >= TEST) & (pl.col("id") != "s00")
    changed_frame = table_of(
        frame.with_columns(
            noise=pl.when(other).then(50.0).otherwise("noise"),
            mark=pl.when(other).then(-pl.col("mark")).otherwise("mark"),
        )
    )
    start, stop = table.streams.spans[0]
    own = (table.test >= start) & (table.test < stop)
    assert own.any()
    for head in table.spec.heads:
        before = baselines_of(table, head, trees=head.name == "up")
        after = baselines_of(changed_frame, head, trees=head.name == "up")
        for one, two in zip(before, after, strict=True):
            assert one.settings == two.settings
            for metric, loss in one.scored.losses.items():
                np.testing.assert_array_equal(loss[own], two.scored.losses[metric][own])


def test_boosted_trees_stop_at_their_time_limit(table):
    """The best so far is kept; a forecast whose quantiles would take longer has none."""
    up, noise, _ = table.spec.heads
    for head, names in ((up, [LAST, RUNNING, TREES]), (noise, [LAST, RUNNING])):
        notes = []
        found = baselines_of(table, head, trees=True, budget=TimeBudget(0.0, notes.append))
        assert [baseline.name for baseline in found] == names
        assert sum("trees" in note for note in notes) == 1


def test_an_ensemble_grows_to_its_best_size(monkeypatch):
    """It is doubled until its best size is at most half of it, as one fit would have chosen."""
    monkeypatch.setattr(trees, "FIRST_TREES", 20)
    random = np.random.default_rng(3)
    x = random.normal(size=(600, 2)).astype(np.float32)
    truth = np.append([0.0], x[:-1, 0] ** 2 + random.normal(size=599))
    rows = np.arange(1, 600)
    grid = trees.Grid((0,), (1,), (7,), (5,), 0.05, 320)
    notes = []
    model = Trees.tune(
        "squared_error",
        lambda k, categorical: (x, [False, False]),
        truth,
        rows[:400],
        rows[400:],
        grid,
        TimeBudget(note=notes.append),
    )
    features = lambda k, categorical: (x, [False, False])  # noqa: E731
    whole = Trees("squared_error", features, truth, rows[:400], grid)
    losses = whole._stage_losses(whole._fit({**model.settings}, 320), rows[400:])
    assert model.settings["trees"] == min(losses, key=losses.__getitem__)
    assert model.settings["validation"] == pytest.approx(min(losses.values()))
    grown = [int(note.split()[0]) for note in notes]
    assert grown == [20 * 2**at for at in range(len(grown))]
    assert grown[-1] < 320


def test_tree_lags_stay_within_the_stream(table):
    features, categories = tree_features(table.spec, table.rows, table.streams.spans, 5)
    assert features.shape[0] == table.streams.events
    assert sum(categories) == 1
    plain, none = tree_features(table.spec, table.rows, table.streams.spans, 5, False)
    assert not any(none)
    np.testing.assert_array_equal(plain, features)
    start, stop = table.streams.spans[1]
    noise = table.rows[:, [column.name for column in table.spec.columns].index("noise")]
    columns_of_lag = [
        at
        for at in range(features.shape[1])
        if np.array_equal(features[start + 4 : stop, at], noise[start : stop - 4])
    ]
    assert len(columns_of_lag) == 1
    assert np.isnan(features[start : start + 4, columns_of_lag[0]]).all()


class Stopped(Exception):
    """Raised by a test to interrupt a command."""


def stop(*_, **__):
    raise Stopped


def baselines_that_warn(*args, **options):
    warnings.warn("of a library, which no user is to see", UserWarning, stacklevel=2)
    return baselines_of(*args, **options)


def test_training_writes_the_artifact_then_report_and_plots(tmp_path, monkeypatch, capsys):
    """A run that stops in its report is resumed there, without training again."""
    latch_frame(24).write_csv(tmp_path / "events.csv")
    spec = latch_spec(epochs=1).model_dump(mode="json")
    (tmp_path / "SPEC.yaml").write_text(json.dumps(spec))
    out = tmp_path / "model"
    files = (tmp_path / "SPEC.yaml", tmp_path / "events.csv", out)
    with monkeypatch.context() as patch:
        patch.setattr("models.training.report.make_report", stop)
        with pytest.raises(Stopped):
            commands.train(*files, trees=False, quiet=True)
    artifact = load_artifact(out)
    assert not (out / "report.json").exists()
    assert checkpoint_path(out).exists()
    with monkeypatch.context() as patch:
        patch.setattr("models.training.loop.Loop.train_epoch", stop)
        patch.setattr("models.training.report.baselines_of", baselines_that_warn)
        with pytest.raises(VerdictError, match=r"model: up: worse than .*: do not serve it for up"):
            commands.train(*files, trees=False, resume=True, strict=True)
    assert not checkpoint_path(out).exists()
    assert load_artifact(out).fingerprint == artifact.fingerprint
    artifact = load_artifact(out)
    report = json.loads((out / "report.json").read_text())
    assert report["version"] == artifact.version
    printed = capsys.readouterr().out
    for verdict in report["verdicts"]:
        assert verdict_line(verdict) in printed
    assert {verdict["head"] for verdict in report["verdicts"]} == {"up", "next", "odd"}
    assert report["run"]["resampled"] == "20 blocks of time"
    assert report["data"]["held_out"] > 50
    for head in ("up", "next", "odd"):
        scores = report["heads"][head]["scores"]
        assert list(scores) == [MODEL, LAST, RUNNING]
        for metric in scores[MODEL].values():
            low, high = metric["interval"]
            assert low <= metric["value"] <= high
    assert len(report["heads"]["up"]["calibration"]) == 10
    assert len(report["heads"]["next"]["calibration"]) == 3
    assert any("| model |" in line for line in report_lines(report))
    assert artifact.ranges is not None
    assert entry_of(report["burn_in"]) == {"burn_in": artifact.manifest["burn_in"]}
    assert "burn-in: " in printed
    for plot in ("learning", "skill", "calibration", "burn-in"):
        assert (out / "plots" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    evaluated = commands.evaluate(
        out, tmp_path / "events.csv", since="1970-01-01T22:00:00Z", chunk=3, quiet=True
    )
    held_out = artifact.manifest["metrics"]["held_out"]
    assert evaluated["heads"]["up"]["log_loss"] == pytest.approx(
        held_out["up"]["log_loss"], rel=1e-5
    )
    assert evaluated["scored"] == report["data"]["held_out"]
    compared = commands.evaluate(
        out, tmp_path / "events.csv", baselines=True, trees=False, quiet=True
    )
    for head, scores in report["heads"].items():
        for name, metrics in scores["scores"].items():
            for metric, score in metrics.items():
                again = compared["heads"][head]["scores"][name][metric]
                assert again["value"] == pytest.approx(score["value"], rel=1e-5)
                assert again["interval"] == pytest.approx(score["interval"], rel=1e-5)
    with pytest.raises(DataError, match="to fit the baselines of 'up' to, got 0 and"):
        make_report(artifact, latch_frame().filter(pl.col("at") >= VALIDATE), since="1970-01-01")
    with pytest.raises(ArtifactError, match=r"is not empty; .* --overwrite"):
        train_frame(latch_spec(), latch_frame(), out, quiet=True)


def test_no_report_without_held_out_events(tmp_path, monkeypatch, capsys):
    train_nothing(monkeypatch)
    spec = latch_spec(epochs=1, test_from="1970-02-01")
    train_frame(spec, latch_frame(), tmp_path / "model")
    assert "burn-in: " in capsys.readouterr().out
    assert not (tmp_path / "model" / "report.json").exists()
    artifact = load_artifact(tmp_path / "model")
    assert artifact.manifest["training"]["best_epochs"] == [1]
    assert artifact.manifest["burn_in"]["windows"] > 0
    assert artifact.ranges is not None


def test_the_last_value_skips_absent_ones(table):
    noise = table.encoded("noise")
    holed = np.where(np.arange(len(noise)) % 3 == 0, noise, np.nan)
    last = table.last_known(holed)
    for start, stop in table.streams.spans:
        expected = np.nan
        for at in range(start, stop):
            expected = noise[at] if at % 3 == 0 else expected
            np.testing.assert_equal(last[at], expected)
