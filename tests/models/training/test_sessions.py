"""Training and evaluation cut streams where the model resets their states by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from models.artifact.writing import write_artifact
from models.events.encode import Clock, encode
from models.offline.runner import Runner
from models.offline.verification import Received, verify_outputs
from models.spec.layout import network_state
from models.spec.model import ModelSpec, parse_spec
from models.training.data import Streams, fitted_spec, streams_of
from models.training.evaluate import run_chunks
from models.training.plan import plan_of
from tests.support.oracle import contracting_weights, oracle_step
from tests.support.training import HOUR_MS, latch_frame, latch_spec

RESETS = [{"reset_every": 7}, {"session_gap_s": 7200}, {"reset_every": 5, "session_gap_s": 7200}]


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    """Every ninth event comes two hours later than it would, and so do those after it."""
    table = latch_frame(streams=6)
    step = pl.col("at") // HOUR_MS
    return table.with_columns(at=pl.col("at") + 2 * HOUR_MS * (step // 9))


def given(frame: pl.DataFrame, resets: dict[str, Any]) -> tuple[ModelSpec, Streams]:
    spec = parse_spec({**latch_spec().model_dump(mode="json"), **resets})
    streams = streams_of(spec, frame)
    return fitted_spec(spec, streams, 16 * HOUR_MS), streams


def sessions_of(spec: ModelSpec, streams: Streams) -> list[tuple[int, int]]:
    """Written out event by event."""
    sessions: list[tuple[int, int]] = []
    for start, stop in streams.spans:
        first = start
        for row in range(start + 1, stop):
            gap_s = (streams.moments_ms[row] - streams.moments_ms[row - 1]) / 1000
            is_late = spec.session_gap_s is not None and gap_s > spec.session_gap_s
            is_due = spec.reset_every is not None and (row - start) % spec.reset_every == 0
            if is_late or is_due:
                sessions.append((first, row))
                first = row
        sessions.append((first, stop))
    return sessions


def oracle(spec: ModelSpec, weights: Any, streams: Streams) -> np.ndarray:
    """The outputs of each session as a stream of its own."""
    parts = []
    for start, stop in sessions_of(spec, streams):
        rows, _ = encode(spec.events, streams.columns[start:stop], Clock())
        zero = network_state(spec).zero().floats
        parts.append(oracle_step(spec, weights, rows, zero)[0])
    return np.concatenate(parts)


@pytest.mark.parametrize("resets", RESETS, ids=str)
def test_the_gaps_that_are_fitted_are_those_of_serving(
    frame: pl.DataFrame, resets: dict[str, Any]
) -> None:
    spec, streams = given(frame, resets)
    gaps_s = np.concatenate(
        [
            np.diff(streams.moments_ms[start:stop], prepend=streams.moments_ms[start]) / 1000
            for start, stop in sessions_of(spec, streams)
        ]
    )[streams.moments_ms < 16 * HOUR_MS]
    field = spec.events.timestamp
    assert field.gap_mean == pytest.approx(np.log1p(gaps_s).mean())
    assert field.gap_std == pytest.approx(np.log1p(gaps_s).std())


@pytest.mark.parametrize("resets", RESETS, ids=str)
def test_training_starts_each_session_from_the_initial_state(
    frame: pl.DataFrame, resets: dict[str, Any]
) -> None:
    spec, streams = given(frame, resets)
    sessions = sessions_of(spec, streams)
    assert list(streams.sessions) == sessions
    assert len(sessions) > len(streams.spans)
    plan = plan_of(spec, streams, {}, 16 * HOUR_MS, 22 * HOUR_MS)
    starts = {start for start, _ in sessions}
    for segment in plan.segments:
        assert (segment.before is None) == (segment.start in starts)
        assert any(start <= segment.start < segment.stop <= stop for start, stop in sessions)
    for segment in plan.validation:
        assert any(start <= segment.start < segment.stop <= stop for start, stop in sessions)
    rows = [
        encode(spec.events, streams.columns[start:stop], Clock())[0] for start, stop in sessions
    ]
    np.testing.assert_array_equal(plan.rows, np.concatenate(rows))


def test_evaluation_equals_the_oracle_on_each_session(frame: pl.DataFrame, tmp_path: Path) -> None:
    spec, streams = given(frame, RESETS[2])
    artifact = write_artifact(tmp_path / "latch", spec, contracting_weights(spec, 3))
    expected = oracle(spec, artifact.weights, streams)
    found = run_chunks(artifact, streams, chunk=3, seed=1, batch=4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_replays_are_verified_session_by_session(frame: pl.DataFrame) -> None:
    spec, streams = given(frame, RESETS[2])
    weights = contracting_weights(spec, 3)
    outputs = oracle(spec, weights, streams).astype(np.float32)

    def step(
        rows: np.ndarray, lengths: np.ndarray, states: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        values = np.zeros((*rows.shape[:2], outputs.shape[1]), np.float32)
        for row, length in enumerate(lengths):
            assert not states[row].any()
            values[row, :length] = oracle_step(spec, weights, rows[row, :length], states[row])[0]
        return values, states

    runner = Runner(spec, weights, step)
    received = [
        Received(name, streams.columns[start:stop], outputs[start:stop])
        for name, (start, stop) in zip(streams.names, streams.spans, strict=True)
    ]
    verification = verify_outputs(spec, runner, received)
    assert verification.holds
    assert verification.compared == streams.events
    received[1].outputs[13] += 1e-2
    wrong = verify_outputs(spec, runner, received)
    assert {(check.stream, check.step) for check in wrong.outputs} == {(streams.names[1], 13)}
