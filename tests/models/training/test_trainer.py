import json
import re

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from models.artifact.artifact import load_artifact  # noqa: E402
from models.errors import ArtifactError, SpecError  # noqa: E402
from models.training.data import fitted_spec, streams_of  # noqa: E402
from models.training.ensemble import merge_members  # noqa: E402
from models.training.evaluate import run_chunks  # noqa: E402
from models.training.loop import Loop  # noqa: E402
from models.training.plan import plan_of  # noqa: E402
from models.training.train_frame import train_frame  # noqa: E402
from models.training.trainer import checkpoint_path, train  # noqa: E402
from tests.support.training import (  # noqa: E402
    HOUR_MS,
    latch_frame,
    latch_spec,
    states_of_one_run,
    train_nothing,
)


class Stopped(Exception):
    """Raised by a test to interrupt a training."""


def loop_over(frame, **training) -> Loop:
    """A loop over the frame, with dropout by default."""
    spec = latch_spec(**training)
    streams = streams_of(spec, frame)
    fitted = fitted_spec(spec, streams, 16 * HOUR_MS)
    return Loop(fitted, plan_of(fitted, streams, {}, 16 * HOUR_MS, 22 * HOUR_MS), 1)


@pytest.fixture(scope="module")
def frame():
    return latch_frame()


@pytest.fixture(scope="module")
def whole_training(frame, tmp_path_factory):
    """A training of two members from beginning to end, and its checkpoint within the second."""
    out = tmp_path_factory.mktemp("whole") / "model"
    checkpoints = []

    def keep(record):
        if (record["member"], record["epoch"]) == (2, 1):
            assert not out.exists()
            checkpoints.append(checkpoint_path(out).read_bytes())

    result = train(latch_spec(members=2, epochs=2), frame, out, quiet=True, after_epoch=keep)
    return result, *checkpoints


@pytest.fixture(scope="module")
def uninterrupted(whole_training):
    return whole_training[0]


@pytest.fixture(scope="module")
def checkpoint(whole_training):
    return whole_training[1]


OPTIONS = {"peepholes": True, "layer_normalization": True, "projection": 5}
RECURRENT = [
    {"kind": "lstm", "units": 8},
    {"kind": "lstm", "units": 8, **OPTIONS},
    {"kind": "gru", "units": 8, "reset_after": False},
]


@pytest.mark.parametrize("recurrent", RECURRENT, ids=["lstm", "options", "gru"])
def test_the_carried_state_equals_one_run_over_the_stream(frame, recurrent):
    """With constant weights, a segment ends in the state of one run over the stream so far."""
    still = {"learning_rate": 1e-30, "weight_decay": 0.0}
    loop = loop_over(frame, dropout=0.0, recurrent=recurrent, heads=["odd"], **still)
    for epoch in range(4):
        for _ in loop.train_epoch(epoch):
            pass
    np.testing.assert_allclose(loop.arrays()["ended"], states_of_one_run(loop), atol=1e-6)


def test_the_gradient_stops_between_windows(frame):
    """The gradient of a window depends on its initial state, not on the windows before it."""
    loop = loop_over(frame)
    window = next(loop._cut(loop.plan.groups[0]))
    tensors = loop._tensors(window, loop.plan.trained, {})
    state = tf.constant(
        np.random.default_rng(5).normal(size=(8, loop.network.state_size)).astype(np.float32)
    )
    with tf.GradientTape() as tape:
        tape.watch(state)
        loss, _ = loop._train_window(
            *tensors, state * 2.0, tf.constant([1e-3, 0.9]), tf.constant(1.0)
        )
    assert tape.gradient(loss, state) is None
    assert float(loss) > 0


def test_an_interrupted_training_leaves_its_checkpoint(frame, tmp_path, monkeypatch):
    train_nothing(monkeypatch)

    def stop(record):
        raise Stopped

    with pytest.raises(Stopped):
        train(latch_spec(epochs=2), frame, tmp_path / "a", quiet=True, after_epoch=stop)
    assert checkpoint_path(tmp_path / "a").read_bytes()
    assert not (tmp_path / "a").exists()


def test_resumed_training_equals_uninterrupted_training(frame, uninterrupted, checkpoint, tmp_path):
    records = [(record["member"], record["epoch"]) for record in uninterrupted.history]
    assert records == [(1, 1), (1, 2), (2, 1), (2, 2)]
    out = tmp_path / "model"
    checkpoint_path(out).write_bytes(checkpoint)
    spec = latch_spec(members=2, epochs=2)
    resumed = train(spec, frame, out, quiet=True, resume=True)
    assert resumed.artifact.fingerprint == uninterrupted.artifact.fingerprint
    for one, two in zip(uninterrupted.history, resumed.history, strict=True):
        assert one["validation"] == two["validation"]
    assert not checkpoint_path(out).exists()
    # the members are of different seeds
    assert resumed.history[0]["validation"] != resumed.history[2]["validation"]


def test_of_several_seeds_the_best_by_validation_is_kept(frame, tmp_path, monkeypatch, capsys):
    """All are scored on the held-out events, so that the report has their spread."""
    losses = iter([3.0, 2.0, 2.5, 1.0, 4.0, 5.0])
    monkeypatch.setattr(Loop, "validate", lambda loop: {"loss": next(losses)})
    spec = latch_spec(seeds=3, epochs=2, seed=5, heads=["up"])
    artifact = train_frame(spec, frame, tmp_path / "model", trees=False)
    assert artifact.manifest["training"]["seeds"] == [6]
    assert artifact.manifest["training"]["best_epochs"] == [2]
    report = json.loads((tmp_path / "model" / "report.json").read_text())
    up = report["heads"]["up"]
    assert list(up["seeds"]) == ["5", "6", "7"]
    kept = up["scores"]["model"]["log_loss"]["value"]
    assert up["seeds"]["6"]["log_loss"] == pytest.approx(kept, rel=1e-5)
    assert up["seeds"]["5"]["log_loss"] != pytest.approx(kept, rel=1e-3)
    printed = capsys.readouterr().out
    values = [each["log_loss"] for each in up["seeds"].values()]
    assert (
        f"| mean and deviation | {np.mean(values):.4f} +- {np.std(values, ddof=1):.4f} |" in printed
    )
    assert re.search(r"takes about \d+ s at most: 2 epochs of .* in \d\.\d GiB of memory", printed)
    assert "kept epoch 2 of seed 6" in printed


def test_a_quick_training_says_that_seeds_are_left_out(frame, tmp_path, monkeypatch, capsys):
    train_nothing(monkeypatch)
    result = train(latch_spec(seeds=3, epochs=1), frame, tmp_path / "model", quick=True)
    assert "warning: trained with --quick" in capsys.readouterr().out
    assert "one network instead of 3" in result.warnings[0]


def test_several_of_the_seeds_are_merged(frame, tmp_path, monkeypatch):
    """The best by validation, in the order of their seeds."""
    losses = iter([2.0, 3.0, 1.0])
    monkeypatch.setattr(Loop, "train_epoch", lambda loop, epoch: iter([0.0]))
    monkeypatch.setattr(Loop, "validate", lambda loop: {"loss": next(losses)})
    spec = latch_spec(seeds=3, members=2, epochs=1, heads=["up"])
    result = train(spec, frame, tmp_path / "model", quiet=True)
    assert result.artifact.manifest["training"]["seeds"] == [1, 3]
    assert result.artifact.manifest["metrics"]["validation"] == [{"loss": 2.0}, {"loss": 1.0}]
    fitted, first = result.networks[1]
    merged = merge_members(fitted, [first, result.networks[3][1]])[1]
    for name, value in merged.items():
        np.testing.assert_array_equal(result.artifact.weights[name], value)


def test_measuring_the_cost_changes_no_weight(frame, tmp_path):
    spec = latch_spec(epochs=1, heads=["up"])
    printed, silent = (
        train(spec, frame, tmp_path / str(quiet), quiet=quiet) for quiet in (False, True)
    )
    assert printed.artifact.fingerprint == silent.artifact.fingerprint


def test_a_checkpoint_of_another_run_is_rejected(frame, checkpoint, tmp_path):
    spec = latch_spec(members=2, epochs=2)
    path = checkpoint_path(tmp_path / "a")
    path.write_bytes(checkpoint)
    with pytest.raises(ArtifactError, match="another model or specification, or other data"):
        train(latch_spec(seed=9), frame, tmp_path / "a", quiet=True, resume=True)
    with pytest.raises(ArtifactError, match="another model or specification, or other data"):
        train(spec, frame[1:], tmp_path / "a", quiet=True, resume=True)
    with pytest.raises(ArtifactError, match="no checkpoint"):
        train(spec, frame, tmp_path / "b", quiet=True, resume=True)
    path.write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="expected a checkpoint"):
        train(spec, frame, tmp_path / "a", quiet=True, resume=True)


@pytest.mark.parametrize(
    ("patience", "epochs", "best"), [(1, 3, 2), (2, 4, 2), (3, 6, 5), (9, 6, 5)]
)
def test_training_stops_after_patience_epochs_without_a_better_loss(
    frame, tmp_path, monkeypatch, patience, epochs, best
):
    """An equal loss is not an improvement; the weights of the best epoch are kept."""
    losses = [3.0, 2.0, 2.5, 2.0, 1.0, 1.5]
    averaged = Loop.averaged_weights
    validated = []

    def validate(loop):
        validated.append(losses[len(validated)])
        return {"loss": validated[-1]}

    def marked(loop):
        return {name: np.full_like(w, len(validated)) for name, w in averaged(loop).items()}

    monkeypatch.setattr(Loop, "train_epoch", lambda loop, epoch: iter([0.0]))
    monkeypatch.setattr(Loop, "validate", validate)
    monkeypatch.setattr(Loop, "averaged_weights", marked)
    result = train(latch_spec(epochs=6, patience=patience), frame, tmp_path / "a", quiet=True)
    assert [record["validation"]["loss"] for record in result.history] == losses[:epochs]
    assert result.best_epochs == (best,)
    assert {value for w in result.artifact.weights.values() for value in w.ravel()} == {best}


def test_an_lstm_with_its_options_trains_and_is_packaged_for_both_runtimes(frame, tmp_path):
    recurrent = {"kind": "lstm", "units": 8, "dropout": 0.1, "recurrent_dropout": 0.1, **OPTIONS}
    spec = latch_spec(recurrent=recurrent, heads=["up"], epochs=2)
    result = train(spec, frame, tmp_path / "a", quiet=True)
    artifact = load_artifact(tmp_path / "a")
    assert artifact.manifest["runtimes"] == ["onnxruntime", "tensorflow"]
    for name in ("peepholes", "kernel_gamma", "recurrent_gamma", "carry_gamma", "carry_beta"):
        weight = artifact.weights[f"lstm_1.{name}"]
        assert np.abs(weight - (1.0 if name.endswith("gamma") else 0.0)).max() > 1e-4
    assert result.history[1]["validation"]["loss"] < result.history[0]["validation"]["loss"]


def test_outputs_do_not_depend_on_chunks(frame, uninterrupted):
    artifact = load_artifact(uninterrupted.artifact.path)
    assert artifact.fingerprint == uninterrupted.artifact.fingerprint
    streams = streams_of(artifact.spec, frame)
    uncut = run_chunks(artifact, streams, chunk=1000, batch=1)
    for chunk, seed, batch in ((1, 0, 64), (7, 1, 3), (64, 2, 5)):
        cut = run_chunks(artifact, streams, chunk=chunk, seed=seed, batch=batch)
        np.testing.assert_allclose(cut, uncut, rtol=1e-5, atol=1e-5)
    assert np.abs(uncut).max() > 0


def test_specs_that_cannot_be_trained_are_rejected(frame, tmp_path):
    with pytest.raises(SpecError, match="at or after validate_from"):
        train(latch_spec(test_from="1970-01-01"), frame, tmp_path / "a", quiet=True)
    bare = latch_spec().model_copy(update={"training": None})
    with pytest.raises(SpecError, match="expected `training`"):
        train(bare, frame, tmp_path / "a", quiet=True)
    with pytest.raises(SpecError, match="loss_weights"):
        latch_spec(loss_weights={"none": 1.0})


def test_unknown_rate_hides_a_share_of_the_categories_that_depends_on_the_seed(frame):
    loop = loop_over(frame, dropout=0.0, unknown_rate=0.4)
    rows = loop.plan.rows[:300].reshape(3, 100, -1)
    kind = [column.name for column in loop.spec.columns].index("kind")
    masked = loop._hide_categories(tf.constant(rows), tf.constant([1, 7])).numpy()
    hidden = masked[..., kind] == 0
    assert 0.3 < hidden.mean() < 0.5
    assert (rows[..., kind] > 0).all()
    np.testing.assert_array_equal(masked[~hidden], rows[~hidden])
    np.testing.assert_array_equal(np.delete(masked, kind, -1), np.delete(rows, kind, -1))
    other_rows = loop._hide_categories(tf.constant(rows), tf.constant([1, 8])).numpy()
    assert not np.array_equal(masked, other_rows)
    window = next(loop._cut(loop.plan.groups[0]))
    tensors = loop._tensors(window, loop.plan.trained, {})
    losses = []
    for seed in (1, 2, 1):
        loop.restart(1)
        weights = loop.network.get_weights()
        loop.restart(seed)
        loop.network.set_weights(weights)
        zero = tf.zeros((8, loop.network.state_size))
        loss, _ = loop._train_window(*tensors, zero, tf.zeros(2), tf.constant(1.0))
        losses.append(float(loss))
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("weigh", ["steps", "windows"])
def test_steps_or_windows_have_equal_weight(frame, weigh):
    loop = loop_over(frame, weigh=weigh)
    shares, counts = [], []
    for group in loop.plan.groups:
        for window in loop._cut(group):
            mask = loop._tensors(window, loop.plan.trained, {})[3]
            shares.append(float(loop._share("up", tf.constant(mask), {})))
            counts.append(np.count_nonzero(mask))
    assert len(shares) == loop.windows_per_epoch
    assert len(set(counts)) > 1
    expected = np.divide(counts, np.mean(counts)) if weigh == "steps" else np.ones(len(counts))
    np.testing.assert_allclose(shares, expected, rtol=1e-5)
