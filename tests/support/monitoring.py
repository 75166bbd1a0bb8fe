"""The shipped dashboards, and a Prometheus that scrapes a service."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from tests.support.pages import ROOT
from tests.support.servers import free_port

RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))

Series = Mapping[str, str]
"""Values of each series, one a minute, in promtool's notation: `0+5x30` starts at 0 and adds 5
thirty times."""


class Panel(NamedTuple):
    """A panel of a dashboard.

    Attributes:
        place: column, row, width and height in Grafana's grid of 24 columns.
        queries: each with the text of its legend, which has labels in braces.
    """

    title: str
    kind: str
    unit: str
    is_stacked: bool
    place: tuple[int, int, int, int]
    queries: tuple[tuple[str, str], ...]


def panels_of(path: Path) -> list[Panel]:
    """The panels of a dashboard's file."""
    panels = []
    for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
        at, defaults = panel["gridPos"], panel["fieldConfig"]["defaults"]
        panels.append(
            Panel(
                panel["title"],
                panel["type"],
                defaults["unit"],
                "stacking" in defaults.get("custom", {}),
                (at["x"], at["y"], at["w"], at["h"]),
                tuple([(each["expr"], each["legendFormat"]) for each in panel["targets"]]),
            )
        )
    return panels


def rule_test(name: str, series: Series, **expectations: Any) -> dict[str, Any]:
    """A test for promtool: what the rules and queries give for some series."""
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    return {"name": name, "interval": "1m", "input_series": inputs, **expectations}


def check_rules(folder: Path, tests: Sequence[dict[str, Any]]) -> None:
    """Run tests of the rules with promtool."""
    file = folder / "test.yml"
    content = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": list(tests)}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    done = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def filled(query: str, interval: str) -> str:
    """A query with the variables of a dashboard filled in: every model, and an interval."""
    return query.replace("$__rate_interval", interval).replace("$model", ".*")


@contextmanager
def prometheus(folder: Path, url: str, interval: str = "200ms") -> Iterator[str]:
    """The address of a Prometheus that scrapes a service, as job `carry`."""
    config = folder / "prometheus.yml"
    config.write_text(
        f"global: {{scrape_interval: {interval}, evaluation_interval: {interval}}}\n"
        f"rule_files: [{RULES}]\n"
        "scrape_configs: [{job_name: carry, static_configs: [{targets: "
        f"['{url.removeprefix('http://')}']}}]}}]\n"
    )
    address = f"127.0.0.1:{free_port()}"
    options = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", *options, f"--web.listen-address={address}"], stderr=log
        )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def query(database: httpx.Client, expression: str, **options: Any) -> list[dict[str, Any]]:
    """The series of a query, at one time, or with `start`, `end` and `step` over a range; none
    while the database starts."""
    kind = "query_range" if "start" in options else "query"
    try:
        reply = database.get(f"/api/v1/{kind}", params={"query": expression, **options})
    except httpx.TransportError:
        return []
    if reply.status_code == 503:
        return []
    reply.raise_for_status()
    series: list[dict[str, Any]] = reply.json()["data"]["result"]
    return series
