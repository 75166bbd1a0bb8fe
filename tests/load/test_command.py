"""`make load` as its users run it: a process of its own, with Locust, against a live service."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from models.artifact.artifact import write_artifact
from tests.support.models import small_spec
from tests.support.oracle import contracting_weights
from tests.support.pipelines import SPEC
from tests.support.servers import free_port, until
from tests.support.service import running

WARNINGS = ("-W", "error", "-W", "ignore::ResourceWarning")
"""Locust's connection pool leaves its sockets to the garbage collector."""
REPOSITORY = Path(__file__).resolve().parents[2]
SCENARIOS = ("steady", "ramp", "burst", "hot", "cold", "long")
STAGES = ("queue", "load", "infer", "commit", "rest")
PATIENT = tuple(
    option
    for limit in (
        *("max_p95_ms=20000", "max_p99_ms=20000", "min_compared_events=20"),
        *(f"{scenario}.min_rate_share=0.01" for scenario in ("steady", "burst", "long")),
        "min_chunks_per_s=0.01",
    )
    for option in ("--threshold", limit)
)
"""Whatever else the machine has to do meanwhile."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models: `small` takes events, `probe` rows only."""
    folder = tmp_path_factory.mktemp("load")
    spec = small_spec()
    write_artifact(folder / "models" / "small", spec, contracting_weights(spec, 3))
    write_artifact(folder / "models" / "probe", SPEC, contracting_weights(SPEC, 1))
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """A service of these models."""
    with running(folder, folder / "models") as service:
        yield service.url


@contextmanager
def wrong_outputs(url: str) -> Iterator[str]:
    """A proxy that adds 1e-3 to the outputs of chunks."""

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {"content-type": "application/json"}
            reply = httpx.request(self.command, url + self.path, content=body, headers=headers)
            content = reply.content
            if self.path.endswith("/chunks"):
                document = reply.json()
                document["outputs"]["next"] = [[x + 1e-3] for (x,) in document["outputs"]["next"]]
                content = json.dumps(document).encode()
            self.send_response(reply.status_code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

        do_GET = do_POST = do_DELETE = forward  # noqa: N815

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def command(*options: str) -> list[str]:
    return [sys.executable, *WARNINGS, "-m", "tests.load", *options]


def streams_left(url: str) -> list[str]:
    """Names of the streams of load tests that the service has."""
    page = httpx.get(f"{url}/v1/models/small/streams?prefix=load-").json()
    names: list[str] = page["streams"]
    return names


def load(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*options),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_every_scenario_passes_against_a_correct_service(url: str, tmp_path: Path) -> None:
    target = tmp_path / "made" / "summary.json"
    done = load(
        *("--url", url, "--model", "small", "--users", "8", "--duration-s", "2"),
        *("--summary", str(target), *PATIENT),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.endswith("load: every threshold passed\n")
    summary = json.loads(target.read_text())
    assert summary["passed"] is True
    assert summary["model"]["name"] == "small"
    assert summary["commit"]
    assert "cores" in summary["machine"]
    assert summary["date"].startswith("20")
    assert [each["scenario"] for each in summary["scenarios"]] == list(SCENARIOS)
    rows = {(row["method"], row["name"]): row for row in summary["statistics"]}
    for each in summary["scenarios"]:
        name, chunks = each["scenario"], each["chunks"]
        assert each["errors"] == each["retries"] == 0
        assert each["wrong_answers"] == {}
        assert each["compared"]["events"] >= 20
        assert chunks == rows["POST", name]["num_requests"]
        stages = [rows["stage", f"{name} {stage}"] for stage in STAGES]
        assert {row["num_requests"] for row in stages} == {chunks}
        stages_ms = sum(row["avg_response_time"] for row in stages)
        assert stages_ms == pytest.approx(rows["POST", name]["avg_response_time"], rel=0.1)
    assert rows["chunk", "long long"]["num_requests"] > 0
    assert streams_left(url) == []


def test_terminated_load_deletes_its_streams(url: str, tmp_path: Path) -> None:
    options = ("--url", url, "--model", "small", "--summary", str(tmp_path / "summary.json"))
    process = subprocess.Popen(command(*options), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    until(lambda: streams_left(url), "streams of the load")
    process.terminate()
    assert process.wait(60) == 130
    assert streams_left(url) == []


@pytest.mark.parametrize(
    ("model", "feed", "failed"),
    [
        ("small", "events", "max_wrong_answers"),
        ("small", "events", None),
        ("small", "inputs", None),
        ("probe", "inputs", "max_p95_ms"),
    ],
)
def test_float64_network_and_thresholds_decide(
    url: str, folder: Path, tmp_path: Path, model: str, feed: str, failed: str | None
) -> None:
    def run(url: str) -> subprocess.CompletedProcess[str]:
        return load(
            *("--url", url, "--model", model, "--scenario", "steady", "--users", "3"),
            *("--duration-s", "2", "--summary", str(tmp_path / "summary.json"), *PATIENT),
            *("--artifact", str(folder / "models" / model), "--compare-events", "60"),
            *("--feed", feed),
            *(("--threshold", "steady.max_p95_ms=0.1") if failed == "max_p95_ms" else ()),
        )

    if failed == "max_wrong_answers":
        with wrong_outputs(url) as proxy:
            done = run(proxy)
    else:
        done = run(url)
    assert done.returncode == (failed is not None), done.stdout + done.stderr
    (scenario,) = json.loads((tmp_path / "summary.json").read_text())["scenarios"]
    assert scenario["compared"]["how"] == "oracle"
    assert scenario["passed"] == (failed is None)
    thresholds = [each["name"] for each in scenario["thresholds"] if not each["passed"]]
    assert thresholds == [failed] * (failed is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "http://127.0.0.1:{port}"], "nothing answers at http://127.0.0.1:{port} "),
        (["--scenario", "sturdy"], "--scenario sturdy: expected one of steady, ramp, burst"),
        (["--url", "{url}"], "--model: choose one of probe, small"),
        (["--url", "{url}", "--model", "none"], "--model none: served are probe, small"),
        (
            ["--url", "{url}", "--model", "small", "--threshold", "p95=1"],
            "--threshold p95=1: expected one of max_error_share",
        ),
        (
            ["--url", "{url}", "--model", "small", "--threshold", "max_p95_ms=fast"],
            "--threshold max_p95_ms=fast: expected a number or none",
        ),
        (
            ["--url", "{url}", "--model", "probe", "--artifact", "{small}"],
            "--artifact {small}: expected version",
        ),
    ],
)
def test_load_that_cannot_run_prints_one_line(
    url: str, folder: Path, options: list[str], message: str
) -> None:
    values = {"port": free_port(), "url": url, "small": folder / "models" / "small"}
    done = load(*(option.format(**values) for option in options))
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith(f"load: {message.format(**values)}")
    assert done.stderr.count("\n") == 1


def test_load_needs_only_the_client_of_the_project() -> None:
    imported = (
        "import sys, tests.load.locustfile\n"
        "print([name for name in sys.modules if name.startswith(('models', 'service'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", imported], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
