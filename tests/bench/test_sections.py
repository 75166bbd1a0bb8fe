"""Each section of the benchmark runs, for a moment, with everything it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

from tests.bench import compute, micro, run, sections
from tests.bench.__main__ import main
from tests.bench.results import Results
from tests.bench.run import Bench, Options, find_missing
from tests.bench.sections import BESIDE, SECTIONS
from tests.support.machine import REPOSITORY, Cores

ABOUT = {"commit": "none", "machine": "none", "date": "now"}
FIGURES = {
    "peak": "peak/carry-onnxruntime over fastapi",
    "many": "many/carry-onnxruntime over compute",
    "latency": "latency/carry-onnxruntime p99 beside long chunks over without",
    "streams": "streams/2000 over 1000",
    "cold": "cold/carry-onnxruntime s",
    "workers": "workers/carry-onnxruntime lost",
    "events": "events/carry-onnxruntime events over inputs",
    "widths": None,
    "kinds": "kinds/carry-onnxruntime forecast over lstm, by CPU",
    "split": None,
    BESIDE: "beside/2: chunks/s, this over the other",
}
"""A figure of each section."""

BRIEF = {
    run: {"WARM_S": 0.05, "REST_S": 0.02, "RESTS_WITHIN_S": 0.0},
    compute: {"COMPUTE_S": 0.01},
    sections: {"RACES": 2, "BESIDE_CONNECTIONS": (2,), "WIDTHS": (8,), "LENGTHS": (1, 16)},
}
OPTIONS = Options(
    rounds=1,
    seconds=0.1,
    streams=64,
    many_streams=2000,
    runtimes=("onnxruntime",),
    baselines=("asgi", "fastapi", "competent"),
    beside=REPOSITORY,
)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A tiny run; no process that it started is left afterwards."""
    for module, values in BRIEF.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    resource_tracker.ensure_running()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    bench = Bench(OPTIONS, Cores((), ()), tmp_path, Results(ABOUT))
    if (reason := find_missing("carry-onnxruntime", bench.artifact)) is not None:
        pytest.skip(reason)
    yield bench
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before


@pytest.mark.parametrize("section", SECTIONS)
def test_section_runs(section: str, bench: Bench) -> None:
    if section == BESIDE:
        bench.options = replace(OPTIONS, rounds=2)
    if section == "workers":
        bench.options = replace(OPTIONS, baselines=())
    SECTIONS[section](bench)
    assert bench.results.rows or section == "cold"
    assert FIGURES[section] is None or FIGURES[section] in bench.results.figures
    if section == "workers":
        assert bench.results.figures["workers/carry-onnxruntime lost"].high == 0


def test_geometric_mean_of_ratios_has_its_error() -> None:
    middle, error = sections.geometric_mean([2.0, 0.5, 2.0, 0.5])
    assert middle == pytest.approx(1.0)
    assert error == pytest.approx(0.4002, abs=1e-4)
    assert sections.geometric_mean([1.5]) == (pytest.approx(1.5), 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--beside", "."], "expected a checkout of Carry"), (["--only", "peak,speed"], "got speed")],
)
def test_wrong_options_are_rejected(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_parts_are_measured() -> None:
    """In a process of its own: it sets up logging, and loggers that were used keep that."""
    groups = ["codec", "queue", "events", "wire", "http", "store"]
    command = [sys.executable, "-m", "tests.bench.micro", "--seconds", "0.001"]
    command += ["--only", ",".join(groups)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert all(f"\n{group}, " in f"\n{shown}" for group in groups)


def test_cores_are_the_first_and_the_last() -> None:
    cores = Cores.first_and_last()
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        assert cores.everything == ()
    else:
        assert (cores.servers, cores.others) == ((available[0],), (available[-1],))


def test_micro_names_the_groups_that_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        micro.main(["--only", "codec,none"])
    assert "--only: expected some of codec,queue" in capsys.readouterr().err
