"""Training of a decoder: forecast origins, feedback, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from models import commands
from models.artifact.artifact import load_artifact
from models.networks.build import StepNetwork
from models.spec.decoder import DecoderTraining
from models.spec.model import ModelSpec, parse_spec, schema_of
from models.training.data import fitted_spec, moment_ms, streams_of
from models.training.decoder_training import (
    Anchors,
    DecoderTrainer,
    mean_loss,
    steps_ahead,
    truth_share,
)
from models.training.plan import Plan, Window, plan_of, windows_of
from models.training.train_frame import train_frame
from tests.support.oracle import contracting_weights

HOUR_MS = 3_600_000
DAYS, TRAINED, VALIDATED = 30, 20, 25
STREAMS = 3


def tides(gap: bool = False) -> pl.DataFrame:
    """Hourly levels: a wave of 24 hours whose height is the stream's own, and noise."""
    rows = []
    for stream in range(STREAMS):
        random = np.random.default_rng(stream)
        for hour in range(24 * DAYS):
            if gap and hour % 100 == 50:
                continue
            wave = (1 + stream) * np.sin(2 * np.pi * (hour + 8 * stream) / 24)
            rows.append(
                {
                    "place": f"p{stream}",
                    "at": hour * HOUR_MS,
                    "level": float(10 + wave + 0.1 * random.normal()),
                    "moon": float(np.cos(2 * np.pi * hour / 700)),
                }
            )
    return pl.DataFrame(rows)


def tide_spec(head: str = "quantiles", **decoder: Any) -> ModelSpec:
    return parse_spec(
        {
            "name": "tide",
            "events": {
                "fields": [
                    {"kind": "timestamp", "name": "at"},
                    {"kind": "numeric", "name": "level"},
                    {"kind": "numeric", "name": "moon", "optional": True},
                ]
            },
            "layers": [{"kind": "gru", "units": 12}],
            "heads": [{"kind": "sequence", "name": "memory"}],
            "decoder": {
                "step_s": 3600,
                "targets": ["level"],
                "known": ["moon"],
                "layers": [{"kind": "gru", "units": 12, "starts_from": "gru_1"}],
                "head": {"kind": head},
                "max_horizon": 6,
                **decoder,
            },
            "training": {
                "stream": "place",
                "validate_from": f"1970-01-{TRAINED + 1:02d}T00:00:00Z",
                "test_from": f"1970-01-{VALIDATED + 1:02d}T00:00:00Z",
                "epochs": 8,
                "patience": 8,
                "window_steps": 24,
                "segment_windows": 4,
                "batch_streams": 5,
                "learning_rate": 0.02,
                "average_decay": 0.9,
                "decoder": {"anchor_steps": 5},
            },
        }
    )


def plan_for(frame: pl.DataFrame, spec: ModelSpec) -> tuple[ModelSpec, Plan]:
    streams = streams_of(spec, frame)
    assert spec.training is not None
    schema = schema_of(spec)
    moments = [
        moment_ms(schema, text, "moment")
        for text in (spec.training.validate_from, spec.training.test_from)
    ]
    fitted = fitted_spec(spec, streams, moments[0])
    return fitted, plan_of(fitted, streams, {}, *moments)


@pytest.fixture(scope="module")
def trainer() -> tuple[StepNetwork, Plan, DecoderTrainer]:
    spec, plan = plan_for(tides(), tide_spec())
    assert spec.training is not None
    network = StepNetwork(spec)
    network.set_weights(contracting_weights(spec, 2))
    return network, plan, DecoderTrainer(network, plan, spec.training, 1)


def window_of(plan: Plan) -> Window:
    return next(iter(windows_of([plan.segments[0], plan.segments[-1]], 3, 24)))


def test_steps_ahead_end_at_a_split_or_an_irregular_step() -> None:
    side = np.array([True, True, True, False, True, True, False])
    moments = np.array([0, 1, 2, 3, 0, 1, 5]) * HOUR_MS
    assert steps_ahead(side, moments, None).tolist() == [3, 2, 1, 0, 2, 1, 0]
    assert steps_ahead(side, moments, HOUR_MS).tolist() == [3, 2, 1, 0, 1, 0, 0]


def test_the_share_of_true_values_decays_through_one_half() -> None:
    for kind in ("linear", "inverse_sigmoid"):
        training = DecoderTraining(feedback=kind, half_at=0.4, floor=0.1)
        shares = [truth_share(training, p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > 0.9
        assert shares[2] == pytest.approx(0.5)
        assert shares[-1] == 0.1
    assert truth_share(DecoderTraining(feedback="teacher"), 1.0) == 1.0


def test_targets_are_the_rows_that_follow_a_forecast_origin_in_its_split(
    trainer: tuple[StepNetwork, Plan, DecoderTrainer],
) -> None:
    _, plan, decoder = trainer
    window = window_of(plan)
    firsts = set()
    for number in range(20):
        anchors = decoder.anchors(window, number, 0.5)
        firsts.add(int(anchors.cuts[0]))
        batch_size = len(window.lengths)
        for at in range(len(anchors.values)):
            slot, cut = at % batch_size, int(anchors.cuts[at // batch_size])
            row = int(window.index[slot, cut - 1])
            for step in range(decoder.horizon):
                counts = cut <= window.lengths[slot] and bool(
                    plan.trained[row : row + step + 1].all()
                )
                assert bool(anchors.there[at, step, 0]) == counts
                if counts:
                    assert anchors.values[at, step, 0] == plan.rows[row + 1 + step, 5]
                    # calendar, moon and its absence
                    np.testing.assert_array_equal(
                        anchors.known[at, step], plan.rows[row + 1 + step, [1, 2, 3, 4, 6, 7]]
                    )
    assert firsts == {1, 2, 3, 4, 5}
    assert not decoder.anchors(window, 0, None).there.any()


def test_cutting_a_window_at_forecast_origins_does_not_change_outputs(
    trainer: tuple[StepNetwork, Plan, DecoderTrainer],
) -> None:
    network, plan, decoder = trainer
    window = window_of(plan)
    rows = plan.rows[window.index]
    state = np.random.default_rng(1).uniform(-1, 1, (3, network.state_size)).astype(np.float32)
    anchors = decoder.anchors(window, 3, 0.5)
    result, states = decoder.forward(rows, window.lengths, state, anchors, False)
    uncut = network.forward(rows, window.lengths, state)
    np.testing.assert_allclose(result.state, uncut.state, atol=1e-6)
    np.testing.assert_allclose(result.raw["memory"], uncut.raw["memory"], atol=1e-6)
    for number, cut in enumerate(anchors.cuts):
        lengths = np.minimum(window.lengths, cut).astype(np.int32)
        until = network.forward(rows, lengths, state).state
        np.testing.assert_allclose(states[3 * number : 3 * number + 3], until, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_decoder_feeds_back_the_true_value_or_the_point(
    trainer: tuple[StepNetwork, Plan, DecoderTrainer], share: float
) -> None:
    network, plan, decoder = trainer
    assert network.decoder is not None
    drawn_anchors = decoder.anchors(window_of(plan), 1, 0.5)
    anchors = Anchors(*drawn_anchors[:4], np.float32(share), drawn_anchors.seed)
    random = np.random.default_rng(4)
    states = random.uniform(-1, 1, (len(drawn_anchors.values), network.state_size)).astype(
        np.float32
    )
    sums, counts = decoder.losses(states, anchors, False)
    state, previous = states[:, :12], states[:, 12:]
    expected = []
    for step in range(decoder.horizon):
        row = np.concatenate([previous, drawn_anchors.known[:, step]], axis=1)[:, None]
        outputs, after = network.decoder.step(row, np.ones(len(row), np.int32), state)
        state, quantiles = np.asarray(after), np.asarray(outputs)[:, 0]
        truth, there = drawn_anchors.values[:, step], drawn_anchors.there[:, step]
        error = truth - quantiles
        levels = np.array([0.1, 0.5, 0.9])
        loss = np.maximum(levels * error, (levels - 1) * error).mean(axis=1, keepdims=True)
        expected.append(loss[there].sum())
        previous = np.where(there & (share == 1.0), truth, quantiles[:, 1:2])
    np.testing.assert_allclose(sums, expected, rtol=1e-4)
    np.testing.assert_array_equal(counts, drawn_anchors.there.sum(axis=(0, 2)))
    assert float(mean_loss(sums, counts)) > 0


@pytest.mark.parametrize("head", ["quantiles", "gaussian"])
def test_decoder_learns_and_is_scored_by_step(tmp_path: Path, head: str) -> None:
    frame = tides(gap=head == "gaussian")
    plain = tide_spec(head).model_dump(mode="json")
    # shorter windows have fewer forecast origins, which are traced one by one
    spec = parse_spec({**plain, "training": {**plain["training"], "window_steps": 12}})
    train_frame(spec, frame, tmp_path / "m", trees=False, quiet=True)
    artifact = load_artifact(tmp_path / "m")
    assert (tmp_path / "m" / "plots" / "horizon.png").is_file()
    assert artifact.manifest["metrics"]["held_out"]["decoder.level"]["mae"] < 0.7
    frame.write_parquet(tmp_path / "tides.parquet")
    since = f"1970-01-{VALIDATED + 1:02d}T00:00:00Z"
    report = commands.evaluate(tmp_path / "m", tmp_path / "tides.parquet", since=since, quiet=True)
    level = report["decoder"]["targets"]["level"]
    assert report["decoder"]["forecasts"] > 20
    assert all(steps > 20 for steps in level["steps"])
    model, last, season = (level["mae"][n] for n in ("model", "last value", "seasonal naive"))
    assert model[5] < 0.5 * last[5]
    assert season[5] == pytest.approx(0.11, abs=0.04)
