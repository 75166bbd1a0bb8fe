"""Verdicts of a report: the direction of each metric, and a model that is worse than naive."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from models.errors import VerdictError
from models.training.progress import LINE_EVERY_S, Progress
from models.training.train_frame import check_verdicts
from models.training.trees import TimeBudget
from models.training.verdicts import verdict_lines, verdicts


def report_of(model: float, **baselines: float) -> dict[str, Any]:
    names = {"model": model, **{name.replace("_", " "): v for name, v in baselines.items()}}
    scores = {name: {"pinball": {"value": value}} for name, value in names.items()}
    difference = {
        name: {"pinball": {"interval": [value - model - 0.05, value - model + 0.05]}}
        for name, value in names.items()
        if name != "model"
    }
    head = {"scores": scores, "difference": difference}
    return {"heads": {"next": head}, "warnings": ["slow"]}


def test_a_model_worse_than_the_last_value_gets_that_verdict() -> None:
    report = report_of(0.5, last_value=0.4, running_mean=0.6)
    (found,) = verdicts(report)
    assert found == {
        "head": "next",
        "metric": "pinball",
        "better_than": ["running mean"],
        "level_with": [],
        "worse_than": ["last value"],
        "worse_than_naive": "last value",
        "is_for_detection": False,
    }
    lines = verdict_lines({**report, "verdicts": [found]})
    assert lines[0] == ("warning: slow", False)
    assert lines[1][1]
    assert "worse than the last value: do not serve it" in lines[1][0]
    better = verdicts(report_of(0.3, last_value=0.4, boosted_trees=0.2))
    ((line, is_worse),) = verdict_lines({"verdicts": better})
    assert not is_worse
    assert line == (
        "next: better than last value; worse than boosted trees, by pinball (lower is better)"
    )


def test_a_difference_that_may_be_chance_is_level_as_in_a_comparison() -> None:
    (found,) = verdicts(report_of(0.5, last_value=0.46, boosted_trees=0.4, running_mean=0.54))
    assert found["level_with"] == ["last value", "running mean"]
    assert found["worse_than_naive"] is None
    ((line, is_worse),) = verdict_lines({"verdicts": [found]})
    assert not is_worse
    assert "next: level with last value and running mean; worse than boosted trees," in line


def test_a_model_for_detection_is_judged_as_a_forecast_and_by_its_alarms() -> None:
    report = report_of(0.5, last_value=0.4)
    (found,) = verdicts(report, "next")
    ((line, is_worse),) = verdict_lines({"verdicts": [found]})
    assert found["worse_than_naive"] == "last value"
    assert not is_worse
    assert "do not serve it for forecasts of next. That says nothing of its alarms" in line
    # another head of the same model is for its forecast
    (other,) = verdicts(report, "odd")
    ((line, is_worse),) = verdict_lines({"verdicts": [other]})
    assert is_worse
    assert "do not serve it for next. Let the head" in line


def test_alarms_are_compared_by_their_area_with_each_baseline() -> None:
    areas = {"random": 0.1, "PCA": 0.6, "raw nats": 0.2}
    baselines = {name: {"vus_pr": area} for name, area in areas.items()}
    report = {"heads": {}, "detection": {"vus_pr": 0.5}, "detection_baselines": baselines}
    (found,) = verdicts(report, "next")
    ((line, is_worse),) = verdict_lines({"verdicts": [found]})
    assert not is_worse
    assert line == (
        "next.alarm: better than random and raw nats; worse than PCA, by vus_pr (higher is better)"
    )
    report["detection"] = {"vus_pr": 0.05}
    (found,) = verdicts(report, "next")
    ((line, is_worse),) = verdict_lines({"verdicts": [found]})
    assert is_worse
    assert line.endswith("These alarms are worse than random ones: do not serve it for detection")
    # without labels nothing is known
    assert verdicts({"heads": {}, "detection": {"time_in_alarm": 0.1}}, "next") == []


def test_a_decoder_is_compared_over_its_horizon() -> None:
    target = {"mae": {"model": [1.0, 3.0], "last value": [0.5, None], "seasonal naive": [3.0, 2.0]}}
    (found,) = verdicts({"heads": {}, "decoder": {"targets": {"x": target}}})
    assert found["head"] == "decoder.x"
    assert found["worse_than_naive"] == "last value"
    assert found["better_than"] == ["seasonal naive"]


def test_progress_is_a_line_every_few_seconds_without_a_terminal() -> None:
    now, out = [0.0], io.StringIO()
    progress = Progress(Console(file=out, width=200), lambda: now[0])
    with progress.task("training", 100) as advance:
        for done in range(100):
            now[0] += LINE_EVERY_S / 10
            advance(done, f"loss {done}")
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "training 9%: loss 9"
    quiet = io.StringIO()
    Progress(Console(file=quiet, quiet=True)).say("nothing")
    assert quiet.getvalue() == ""


def test_parts_of_a_time_budget_share_the_remaining_time() -> None:
    now, notes = [0.0], []
    budget = TimeBudget(12.0, notes.append, lambda: now[0])
    first = budget.part(3, "one")
    first.note("fit")
    assert notes == ["one, fit"]
    now[0] = 3.9
    assert not first.is_expired
    now[0] = 6.0
    assert first.is_expired
    second = budget.part(2)
    now[0] = 8.9
    assert not second.is_expired
    now[0] = 9.0
    assert second.is_expired
    assert not budget.is_expired
    now[0] = np.inf
    assert not TimeBudget(None, now_s=lambda: now[0]).part(9).is_expired


def test_a_strict_training_fails_by_its_verdicts(tmp_path: Path) -> None:
    with pytest.raises(VerdictError, match="expected a report, got no events held out"):
        check_verdicts(tmp_path)
    remark = "next is not scored: none of its targets from 2026 on"
    unscored = json.dumps({"heads": {}, "warnings": [remark], "verdicts": []})
    (tmp_path / "report.json").write_text(unscored)
    with pytest.raises(VerdictError, match=f"expected a verdict on a head, got none; {remark}"):
        check_verdicts(tmp_path)
    for model, is_rejected in ((0.3, False), (0.5, True)):
        report = report_of(model, last_value=0.4, boosted_trees=0.2)
        text = json.dumps({**report, "verdicts": verdicts(report)})
        (tmp_path / "report.json").write_text(text)
        if is_rejected:
            with pytest.raises(VerdictError, match=r"next: worse than .* do not serve it"):
                check_verdicts(tmp_path)
        else:
            check_verdicts(tmp_path)
