"""The shipped dashboards and rules: each query names existing series, and returns data."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from models.artifact.ranges import NormLayout
from models.artifact.writing import add_measurements
from service.core.errors import CarryError
from service.core.values import StreamKey
from service.store.keys import KeySpace
from tests.support.consumers import consumer_processes
from tests.support.monitoring import (
    DASHBOARDS,
    RULES,
    filled,
    panels_of,
    prometheus,
    query,
)
from tests.support.needs import needs_tools
from tests.support.pages import ROOT
from tests.support.pipelines import SPEC, make_artifact
from tests.support.servers import RealServer, free_port, until
from tests.support.service import POLL_S, Service, running

METRICS = ROOT / "docs" / "reference" / "metrics.md"
ROWS = [[0.5] * 3] * 4
_METRIC = re.compile(r"\bcarry_[a-z_]+")
_SUFFIX = re.compile(r"_(bucket|sum|count)$")
_CODES = re.compile(r'code=~"([^"]+)"')
_ABSENT = re.compile(r"absent\((.+)\)")
_THRESHOLD = re.compile(r" (>|==) [0-9.]+( unless .+)?$")


def queries() -> list[str]:
    """The expressions of the dashboards and of the rules, of alerts without their conditions."""
    shown = [
        expression
        for path in DASHBOARDS
        for panel in panels_of(path)
        for expression, _ in panel.queries
    ]
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    conditions = [_THRESHOLD.sub("", rule["expr"]) for group in groups for rule in group["rules"]]
    rules = [_ABSENT.sub(r"\1", each) for each in conditions]
    return [*shown, *rules]


def codes(kind: type[CarryError] = CarryError) -> set[str]:
    """The codes of all errors."""
    return {kind.code}.union(*map(codes, kind.__subclasses__()))


def test_queries_name_documented_metrics_and_codes_and_use_all() -> None:
    documented = set(re.findall(r"^\| `(carry_\w+)`", METRICS.read_text(), re.MULTILINE))
    used = set()
    for expression in queries():
        named = {_SUFFIX.sub("", name) for name in _METRIC.findall(expression)}
        assert named or 'up{job="carry"}' in expression, expression
        used |= named
        for listed in _CODES.findall(expression):
            assert set(listed.split("|")) <= codes(), expression
    assert used == documented


@pytest.fixture
def observed(tmp_path: Path, store: RealServer) -> Iterator[Service]:
    models = make_artifact(tmp_path / "models").path
    parts = NormLayout(SPEC).names
    ends = dict.fromkeys(("low", "high", "largest"), 1.0)
    add_measurements(models, {"ranges": dict.fromkeys(parts, ends)})
    # a request of several items is more than the queue holds
    with running(tmp_path, models, redis_url=store.url, CARRY_MAX_QUEUE="1") as service:
        yield service


@pytest.fixture
def database(tmp_path: Path, observed: Service) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes the service."""
    with prometheus(tmp_path, observed.url) as url, httpx.Client(base_url=url) as client:
        yield client


@needs_tools("prometheus", "promtool")
def test_every_query_returns_data_of_a_running_service(
    observed: Service, database: httpx.Client, store: RealServer
) -> None:
    subprocess.run(["promtool", "check", "rules", str(RULES)], check=True, capture_output=True)
    missing = [filled(each, "20s") for each in queries() if not is_optional(each)]

    with httpx.Client(base_url=observed.url) as client:

        def chunk(stream: str, position: int) -> int:
            body = {"inputs": ROWS, "position": position}
            return client.post(f"/v1/models/probe/streams/{stream}/chunks", json=body).status_code

        def is_answered() -> bool:
            """Send some of everything, and drop the queries that have data."""
            number = time.monotonic_ns()
            assert [chunk(f"s{number}", position) for position in (0, 4, 4)] == [200] * 3
            items = [{"stream": f"i{number}-{n}", "inputs": ROWS} for n in range(8)]
            client.post("/v1/models/probe/chunks", json={"chunks": items}).raise_for_status()
            with store.client() as server:
                server.set(
                    KeySpace("carry", 1024).state(StreamKey("probe", f"d{number}")), "damaged"
                )
                assert chunk(f"d{number}", 0) == 500
                server.config_set("maxmemory", 1)
                assert chunk(f"t{number}", 0) == 503
                server.config_set("maxmemory", 0)
            missing[:] = [each for each in missing if not _has_data(database, each)]
            return not missing

        try:
            until(is_answered, "data for every query", poll_s=POLL_S)
        except AssertionError as error:
            raise AssertionError(missing) from error


@needs_tools("prometheus")
def test_every_query_returns_data_of_a_running_consumer(tmp_path: Path, store: RealServer) -> None:
    artifact = make_artifact(tmp_path / "models")
    (tmp_path / "consumer.yaml").write_text(
        "model: probe\nfrom: events\nto: scores\ncreate: true\n"
        f"webhook: {{url: 'http://127.0.0.1:{free_port()}', secret: {'A' * 44}}}\n"
    )
    with consumer_processes(store, artifact, tmp_path) as start:
        url = f"http://127.0.0.1:{start('--port', '0').wait_for('port_bound')['port']}"
        with prometheus(tmp_path, url) as address, httpx.Client(base_url=address) as database:
            missing = [filled(each, "20s") for each in queries() if is_of_consumer(each)]
            # there is no Kafka
            missing = [each for each in missing if "carry_kafka_" not in each]

            def is_answered() -> bool:
                missing[:] = [each for each in missing if not _has_data(database, each)]
                return not missing

            until(is_answered, "data for every query", poll_s=POLL_S)


def is_optional(expression: str) -> bool:
    """Whether it is of a consumer or of a challenger."""
    return is_of_consumer(expression) or "carry_shadow_" in expression


def is_of_consumer(expression: str) -> bool:
    return bool(re.search("carry_(consumer|relay|kafka)_", expression))


def _has_data(database: httpx.Client, expression: str) -> bool:
    return any(each["value"][1] != "NaN" for each in query(database, expression))
