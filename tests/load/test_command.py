"""`make load` as its users run it: a process of its own, with Locust, against a live service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.load.conftest import Live
from tests.load.faulty_service import WRONG_ANSWERS, Behavior, delay
from tests.load.scenarios import SCENARIOS
from tests.support.servers import free_port

WARNINGS = ("-W", "error", "-W", "ignore::ResourceWarning")
"""Locust's connection pool leaves its sockets to the garbage collector."""
REPOSITORY = Path(__file__).resolve().parents[2]
LENIENT = ("max_p95_ms=20000", "max_p99_ms=20000", "min_compared_events=20")
PATIENT = tuple(
    option
    for scenario, throughput in {
        "steady": "min_rate_share",
        "ramp": "min_chunks_per_s",
        "burst": "min_rate_share",
        "hot": "min_chunks_per_s",
        "cold": "min_chunks_per_s",
        "long": "min_rate_share",
    }.items()
    for limit in (*LENIENT, f"{throughput}=0.01")
    for option in ("--threshold", f"{scenario}.{limit}")
)
"""Whatever else the machine has to do meanwhile."""


def load(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *WARNINGS, "-m", "tests.load", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def summary(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_every_scenario_passes_against_a_correct_service(live: Live, tmp_path: Path) -> None:
    target = tmp_path / "made" / "summary.json"
    done = load(
        *("--url", live.url, "--model", "small", "--users", "8", "--duration-s", "2"),
        *("--summary", str(target), *PATIENT),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.endswith("load: every threshold passed\n")
    found = summary(target)
    assert found["passed"] is True
    assert found["model"]["name"] == "small"
    assert found["model"]["runtimes"] == ["numpy"]
    assert found["commit"]
    assert "cores" in found["machine"]
    assert found["date"].startswith("20")
    assert [each["scenario"] for each in found["scenarios"]] == list(SCENARIOS)
    for each in found["scenarios"]:
        assert each["errors"] == each["retries"] == 0
        assert each["wrong_answers"] == {}
        assert each["compared"]["events"] >= 20
        assert each["chunks"] == each["service"]["infer"]["count"]
        parts = sum(each["service"][part]["mean_ms"] for part in each["service"])
        latencies = [kind for kind in each["latency"].values() if kind]
        total_ms = sum(kind["mean_ms"] * kind["count"] for kind in latencies) / each["chunks"]
        assert parts == pytest.approx(total_ms, rel=0.05)
    *_, mixed = found["scenarios"]
    # the 13th chunk is the first at which the rarer kind is further behind its share
    assert (mixed["latency"]["long"] is not None) == (mixed["chunks"] >= 13)
    assert streams_of(live, "small") == []


def streams_of(live: Live, model: str) -> list[str]:
    """The names of the load's own streams that are still there."""
    page = httpx.get(f"{live.url}/v1/models/{model}/streams?prefix=load-").json()
    names: list[str] = page["streams"]
    return names


@pytest.mark.parametrize(
    ("behavior", "failed"),
    [
        pytest.param(WRONG_ANSWERS["a wrong output"][0], "max_wrong_answers", id="wrong output"),
        pytest.param(delay, "max_p95_ms", id="slow"),
    ],
)
def test_failed_threshold_fails_the_run(
    live: Live, tmp_path: Path, behavior: Behavior, failed: str
) -> None:
    live.faults.choose(behavior)
    done = load(
        *("--url", live.url, "--model", "small", "--scenario", "steady", "--users", "3"),
        *("--duration-s", "2", "--summary", str(tmp_path / "summary.json"), *PATIENT),
        *("--threshold", "max_error_share=1", "--threshold", "min_compared_events=none"),
        *(("--threshold", "max_p95_ms=100") if behavior is delay else ()),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.endswith("load: FAILED: steady\n")
    (found,) = summary(tmp_path / "summary.json")["scenarios"]
    assert found["passed"] is False
    assert [each["name"] for each in found["thresholds"] if not each["passed"]] == [failed]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url", "http://127.0.0.1:{port}"], "nothing answers at http://127.0.0.1:{port} "),
        (["--scenario", "sturdy"], "--scenario sturdy: expected one of steady, ramp, burst"),
        (["--url", "{live}"], "--model: choose one of probe, small"),
        (
            ["--url", "{live}", "--model", "probe", "--artifact", "{small}"],
            "--artifact {small}: expected version",
        ),
    ],
)
def test_load_that_cannot_run_prints_one_line(live: Live, options: list[str], said: str) -> None:
    known = {"port": free_port(), "live": live.url, "small": live.models["small"].path}
    done = load(*(option.format(**known) for option in options))
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith(f"load: {said.format(**known)}")
    assert done.stderr.count("\n") == 1


def test_load_needs_only_the_client_of_the_project() -> None:
    imported = (
        "import sys, tests.load.__main__\n"
        "print([name for name in sys.modules if name.startswith(('models', 'service.'))"
        " and not name.startswith('service.client')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", imported], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
