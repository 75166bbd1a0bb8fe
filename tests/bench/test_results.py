"""Rows, ratios, targets, the written page, and the check of outputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from tests.bench.results import Results, Sample, check_targets, show
from tests.bench.traffic import WrongReplyError
from tests.bench.workloads import Bodies, check_answers, make_traffic, standard_model
from tests.support.oracle import oracle_step

pytestmark = pytest.mark.harness

ABOUT = {"commit": "abc123", "machine": "a machine", "date": "2026-01-02T03:04:05+00:00"}
BASE = Sample(1000.0, 16000.0, 50.0, 1.5, 4.0, 9.0, 120.0, 0.5, 0.25)
CARRY = "carry-onnxruntime"


def make_results() -> Results:
    results, rates = Results(ABOUT), {CARRY: (800, 900, 1000), "fastapi": (1000, 1000, 800)}
    for name, each in rates.items():
        row = [BASE._replace(chunks_per_s=rate, cpu_us_per_chunk=rate) for rate in each]
        results.rows[f"peak/32/{name}"] = row
    results.compare(f"peak/{CARRY} over fastapi", *results.rows.values())
    results.figure(f"cold/{CARRY} s", [1.5, 2.5, 3.5])
    results.notes.append("something was left out")
    return results


def test_ratio_is_taken_round_by_round() -> None:
    figures = make_results().figures
    assert figures[f"peak/{CARRY} over fastapi"] == (0.9, 0.8, 1.25)
    assert figures[f"peak/{CARRY} over fastapi, by CPU"] == pytest.approx((1 / 0.9, 0.8, 1.25))


def test_targets_are_checked_and_shown() -> None:
    results = make_results()
    verdicts = {(name, bound): verdict for name, bound, _, verdict in check_targets(results)}
    expected = {
        (f"peak/{CARRY} over fastapi", ">= 0.8"): "reached",
        (f"peak/{CARRY} over fastapi", ">= 1"): "not reached",
        (f"cold/{CARRY} s", "<= 2"): "not reached",
    }
    # there may be targets for the same figures by CPU
    assert verdicts.items() >= expected.items()
    assert {name.removesuffix(", by CPU") for name, _ in verdicts} == {name for name, _ in expected}
    shown = show(results)
    for part in ("abc123", f"32/{CARRY}", "0.9 (0.8 to 1.25)", "not reached", "was left out"):
        assert part in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda outputs: outputs, None),
        (lambda outputs: outputs[::-1], "differ"),
        (lambda outputs: outputs[:-1], "expected outputs"),
        (lambda outputs: outputs * np.nan, "finite"),
    ],
)
def test_wrong_outputs_are_detected(
    change: Callable[[Any], Any], message: str | None, tmp_path: Path
) -> None:
    artifact, bodies = standard_model(tmp_path, 8), Bodies.random(16)
    spec, zero = make_traffic(artifact, bodies, "s", 2), artifact.state.zero().floats
    sent = np.concatenate([bodies.rows[spec.body(0, chunk)] for chunk in range(3)])
    outputs, _ = oracle_step(artifact.spec, artifact.weights, sent, zero)
    parts = outputs[:16], outputs[16:32], change(outputs[32:])
    sampled = [orjson.dumps({"outputs": {"out": part.tolist()}}) for part in parts]
    if message is None:
        check_answers(artifact, spec, bodies.rows, sampled)
        return
    with pytest.raises(WrongReplyError, match=message):
        check_answers(artifact, spec, bodies.rows, sampled)
