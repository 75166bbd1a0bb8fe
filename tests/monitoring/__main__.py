"""Runs every query of the dashboards while `carry replay` sends events, and draws the dashboards.

    python -m tests.monitoring                         a table; status 1 if a query has no data
    python -m tests.monitoring --pictures docs/how-to/monitor

It starts a service with an embedded store, a Prometheus (`prometheus` on the PATH), and replays
departures for `--seconds`. The pictures have the panels, queries and units of `deploy/grafana`,
drawn by matplotlib from Prometheus' HTTP API: Grafana itself is not needed.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import httpx

from tests.monitoring.pictures import Curve, draw
from tests.support.models import PRETRAINED
from tests.support.monitoring import DASHBOARDS, Panel, filled, panels_of, prometheus, query
from tests.support.service import COMMAND, running

INTERVAL = "10s"
STEP_S = 1.0
SHOWN_S = 60.0
"""The queries cover the end of the replay, which at its start asks where all streams are."""
REPLAY = ["--by", "aircraft", "--chunk", "1..32", "--quiet"]


class Result(NamedTuple):
    """The curves of one query of a panel."""

    dashboard: str
    panel: Panel
    expression: str
    curves: list[Curve]


def main() -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.monitoring")
    parser.add_argument(
        "--seconds", type=float, default=100.0, help="how long events are sent (100)"
    )
    parser.add_argument("--pictures", type=Path, help="folder to draw the dashboards into")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="carry-monitoring-") as name:
        results = observe(Path(name), options.seconds)
    width = max(len(result.panel.title) for result in results)
    for dashboard, panel, expression, curves in results:
        print(f"{dashboard:15}{panel.title:{width + 1}} {len(curves):3} series  {expression}")
    missing = [result for result in results if not result.curves]
    print(f"{len(results) - len(missing)} of {len(results)} queries have data")
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for path in DASHBOARDS:
            of_dashboard = [
                (panel, [c for r in results if r.panel == panel for c in r.curves])
                for panel in dict.fromkeys(r.panel for r in results if r.dashboard == path.stem)
            ]
            picture = options.pictures / f"{path.stem.removeprefix('carry-')}.png"
            draw(of_dashboard, picture)
            print(f"{picture}: {picture.stat().st_size} bytes")
    return 1 if missing else 0


def observe(folder: Path, seconds: float) -> list[Result]:
    """Replay events for some time, and run every query over it."""
    with (
        running(folder, PRETRAINED) as service,
        prometheus(folder, service.url, "1s") as url,
        httpx.Client(base_url=url, timeout=30) as database,
    ):
        start_s = time.time()
        command = [COMMAND, "replay", "--url", service.url, *REPLAY]
        replay = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            replay.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            replay.terminate()
            replay.wait()
        end_s = time.time()
        times = {"start": max(start_s, end_s - SHOWN_S), "end": end_s, "step": STEP_S}
        return [
            Result(path.stem, panel, expression, curves_of(database, expression, legend, times))
            for path in DASHBOARDS
            for panel in panels_of(path)
            for expression, legend in panel.queries
        ]


def curves_of(
    database: httpx.Client, expression: str, legend: str, times: dict[str, float]
) -> list[Curve]:
    """The curves of a query over a time; those without a number are left out."""
    curves = []
    for series in query(database, filled(expression, INTERVAL), **times):
        label = legend
        for name, value in series["metric"].items():
            label = label.replace("{{" + name + "}}", value)
        points = [(float(at) - times["start"], float(value)) for at, value in series["values"]]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            curves.append(Curve(label, points))
    return curves


if __name__ == "__main__":
    sys.exit(main())
