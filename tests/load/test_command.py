"""`make load` as its users run it: a process of its own, with Locust, against a live service."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from models.artifact.writing import write_artifact
from tests.support.machine import REPOSITORY
from tests.support.models import small_spec
from tests.support.oracle import contracting_weights
from tests.support.pipelines import SPEC
from tests.support.servers import until
from tests.support.service import running

pytestmark = pytest.mark.harness

WARNINGS = ("-W", "error", "-W", "ignore::ResourceWarning")
"""Locust's connection pool leaves its sockets to the garbage collector."""
SCENARIOS = ("steady", "ramp", "burst", "hot", "cold", "long")
NONE = ("wrong_answers", "error_share", "retry_share")
STAGES = ("queue", "load", "infer", "commit", "rest")
PATIENT = (
    *("--threshold=max_p95_ms=none", "--threshold=max_p99_ms=none"),
    *("--threshold=min_rate_share=none", "--threshold=min_chunks_per_s=none"),
    "--threshold=min_compared_events=1",
)
"""Without limits of what depends on the speed of the machine."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service of two models: `small` takes events, `probe` rows only."""
    folder, spec = tmp_path_factory.mktemp("load"), small_spec()
    write_artifact(folder / "models" / "small", spec, contracting_weights(spec, 3))
    write_artifact(folder / "models" / "probe", SPEC, contracting_weights(SPEC, 1))
    with running(folder, folder / "models") as service:
        yield service.url


def streams_left(url: str) -> list[str]:
    """Names of the streams of load tests that the service has."""
    page = httpx.get(f"{url}/v1/models/small/streams?prefix=load-").json()
    names: list[str] = page["streams"]
    return names


def start(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, *WARNINGS, "-m", "tests.load", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True)


def load(*options: str) -> tuple[int, str, str]:
    """The exit status of a load, and what it printed."""
    process = start(*options)
    output, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    return process.returncode, output, errors


def read_report(output: str) -> dict[str, dict[str, str]]:
    """By scenario what was printed: chunks, and the value of each threshold that passed."""
    report: dict[str, dict[str, str]] = {}
    for line in output.splitlines():
        if head := re.match(r"(\w+): ([\d,]+) chunks of", line):
            report[head[1]] = {"chunks": head[2].replace(",", "")}
        elif check := re.match(r"  (\w+) .* passed  (\S+)$", line):
            [*_, scenario] = report.values()
            scenario[check[1]] = check[2].replace(",", "")
    return report


def test_every_scenario_passes_against_a_correct_service(url: str, tmp_path: Path) -> None:
    status, output, errors = load(
        # Locust asks for the number of users once a second: two seconds have a burst
        *("--url", url, "--model", "small", "--users", "8", "--duration-s", "2"),
        *("--json-file", str(tmp_path / "statistics"), *PATIENT),
    )
    assert status == 0, output + errors
    assert output.endswith("load: every threshold passed\n")
    assert re.match(r"\d{4}-\S+, commit \w+.*, seed 1\n\S+: model small \w+ on ", output)
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    rows = {(row["method"], row["name"]): row for row in statistics}
    report = read_report(output)
    assert list(report) == list(SCENARIOS)
    for name, values in report.items():
        assert {values[f"max_{share}"] for share in NONE} == {"0"}
        assert float(values["min_compared_events"]) > 0
        requests = rows["POST", name]
        assert requests["num_requests"] == int(values["chunks"])
        stages = [rows["stage", f"{name} {stage}"] for stage in STAGES]
        assert {row["num_requests"] for row in stages} == {requests["num_requests"]}
        # the service's own are parts of the requests, and `rest` is what remains
        *of_service, rest = [row["total_response_time"] for row in stages]
        assert min(of_service) > 0
        assert min(row["min_response_time"] for row in stages) >= 0
        assert sum(of_service) + rest >= requests["total_response_time"]
    assert rows["chunk", "long long"]["num_requests"] > 0
    assert streams_left(url) == []


def test_terminated_load_deletes_its_streams(url: str) -> None:
    process = start("--url", url, "--model", "small")
    until(lambda: streams_left(url), "streams of the load")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert streams_left(url) == []


def test_missed_threshold_fails_its_scenario(url: str) -> None:
    status, output, _ = load(
        *("--url", url, "--model", "probe", "--scenario", "steady", "--duration-s", "1"),
        *("--users", "3", *PATIENT, "--threshold", "steady.max_p95_ms=0.1"),
    )
    assert status == 1
    failed = [line.split()[0] for line in output.splitlines() if "FAILED  " in line]
    assert failed == ["max_p95_ms"]
    assert output.endswith("load: FAILED: steady\n")


def test_load_needs_only_the_client_of_the_project() -> None:
    imported = (
        "import sys, tests.load.locustfile\n"
        "print([name for name in sys.modules if name.startswith(('models', 'service'))])"
    )
    command = [sys.executable, "-c", imported]
    assert subprocess.check_output(command, cwd=REPOSITORY, text=True) == "[]\n"
