"""Each section of the benchmark runs, for a moment, with everything it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import psutil
import pytest

from tests.bench import context, micro
from tests.bench.__main__ import BESIDE, SECTIONS, main
from tests.bench.context import Bench, Options
from tests.bench.results import Results
from tests.bench.sections import beside, many, widths, workers
from tests.bench.servers import missing
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
}
"""What each section has to find."""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A tiny run; nothing that it started is left afterwards."""
    monkeypatch.setattr(context, "WARM_S", 0.05)
    monkeypatch.setattr(context, "SETTLED_S", 0.02)
    monkeypatch.setattr(context, "SETTLES_WITHIN_S", 0.0)
    monkeypatch.setattr(many, "COMPUTE_S", 0.01)
    monkeypatch.setattr(workers, "RACES", 2)
    monkeypatch.setattr(widths, "WIDTHS", (8,))
    monkeypatch.setattr(widths, "STEPS", (1, 16))
    options = Options(
        rounds=1,
        seconds=0.1,
        streams=64,
        many_streams=2000,
        runtimes=("onnxruntime",),
        baselines=("asgi", "fastapi", "competent"),
    )
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield Bench(options, Cores((), ()), tmp_path, Results(ABOUT))
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_runs(section: str, bench: Bench) -> None:
    if (reason := missing("carry-onnxruntime", bench.artifact)) is not None:
        pytest.skip(reason)
    import_module(f"tests.bench.sections.{section}").run(bench)
    assert bench.results.rows or section == "cold"
    assert FIGURES[section] is None or FIGURES[section] in bench.results.figures
    if section == "workers":
        assert bench.results.figures["workers/carry-onnxruntime lost"].high == 0


def test_every_section_is_tried() -> None:
    assert set(FIGURES) == set(SECTIONS)
    folder = Path(__file__).parent / "sections"
    assert {path.stem for path in folder.glob("*.py")} == {*SECTIONS, BESIDE}


def test_a_checkout_is_held_against_another(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := missing("carry-onnxruntime", bench.artifact)) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(beside, "CONNECTIONS", (2,))
    bench.options = replace(bench.options, beside=REPOSITORY, rounds=2)
    beside.run(bench)
    assert [len(row.samples) for row in bench.results.rows.values()] == [2, 2]
    assert bench.results.figures["beside/2: chunks/s, this over the other"].value > 0


def test_the_mean_of_ratios_has_its_error() -> None:
    middle, error = beside.geometric_mean([2.0, 0.5, 2.0, 0.5])
    assert middle == pytest.approx(1.0)
    assert error == pytest.approx(0.4002, abs=1e-4)
    assert beside.geometric_mean([1.5]) == (pytest.approx(1.5), 0.0)


def test_what_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--beside", str(tmp_path)])
    assert "expected a checkout of Carry" in capsys.readouterr().err


def test_the_parts_are_measured() -> None:
    """In a process of its own: it sets up logging, and loggers that were used keep that."""
    command = [sys.executable, "-m", "tests.bench.micro", "--seconds", "0.001"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert all(f"\n{group}, " in f"\n{shown}" for group in micro.GROUPS)


def test_a_section_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "peak,speed"])
    assert "got speed" in capsys.readouterr().err


def test_cores_are_the_first_and_the_last() -> None:
    cores = Cores.first_and_last()
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        assert cores.everything == ()
    else:
        assert (cores.servers, cores.others) == ((available[0],), (available[-1],))
