"""A short version of `python -m tests.client.kills`, compared with the float64 oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.events.encode import Clock, encode
from tests.client.kills import flights, send_with_kills
from tests.support.oracle import oracle_step

EVENTS = 1500


def test_killed_service_and_store_lose_and_double_nothing(tmp_path: Path, model_dir: Path) -> None:
    outcome = send_with_kills(tmp_path, model_dir, EVENTS, 16, [EVENTS // 2])
    assert outcome.positions.tolist() == list(range(EVENTS))
    assert outcome.last.skipped == 0
    assert outcome.last.retries >= 1
    artifact = flights()
    assert artifact.spec.events is not None
    rows, _ = encode(artifact.spec.events, outcome.columns, Clock())
    zero = artifact.state.zero().floats
    expected, _ = oracle_step(artifact.spec, artifact.weights, rows, zero)
    np.testing.assert_allclose(outcome.outputs, expected, rtol=1e-5, atol=1e-5)
