"""Rows, ratios, targets, the split of the CPU, and the written page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.bench.cpu_split import STAGES, read_stacks, stage_of, stage_shares
from tests.bench.generator import Load
from tests.bench.report import format_table, verdicts, write_report
from tests.bench.results import Results, Sample, read_results

ABOUT = {"commit": "abc123", "machine": "a machine", "date": "2026-01-02T03:04:05+00:00"}
BASE = Sample(1000.0, 16000.0, 50.0, 1.5, 4.0, 9.0, 120.0, 0.5, 0.25)
CARRY = "carry-onnxruntime"


def make_results() -> Results:
    results = Results(ABOUT)
    for rate, other in ((800.0, 1000.0), (900.0, 1000.0), (1000.0, 800.0)):
        results.add(f"peak/32/{CARRY}", BASE._replace(chunks_per_s=rate))
        results.add("peak/32/fastapi", BASE._replace(chunks_per_s=other))
    results.ratio(f"peak/{CARRY} over fastapi", f"peak/32/{CARRY}", "peak/32/fastapi")
    for rate in (500.0, 400.0):
        for name, times in (("lstm", 1), ("gru", 1.5)):
            row = f"{name}/{CARRY}"
            sample = BASE._replace(chunks_per_s=rate * times, cpu_us_per_chunk=50 * times)
            results.add(f"kinds/32/{row}", sample)
            results.add(f"kinds/1/{row}", BASE._replace(p50_ms=0.75 * times))
    rows = (results.rows[f"kinds/32/{name}/{CARRY}"] for name in ("gru", "lstm"))
    results.compare(f"kinds/{CARRY} gru over lstm", *rows)
    for stage in STAGES:
        results.figure(f"split/{CARRY} {stage}, us a chunk", [4.0])
    results.figure(f"cold/{CARRY} s", [1.5, 2.5, 3.5])
    results.notes.append("something was left out")
    return results


def test_sample_has_cpu_per_chunk_and_rates_per_second() -> None:
    load = Load(2.0, np.full(50, 0.004), chunks=100, events=1600, cpu_s=0.5)
    sample = Sample.of(load, cpu_s=1.0, store_cpu_s=0.25, rss_bytes=3 * 2**20)
    assert sample == Sample(50, 800, 10_000, 4, 4, 4, 3, 0.25, 0.125)


def test_ratio_is_taken_round_by_round() -> None:
    figures = make_results().figures
    assert figures[f"peak/{CARRY} over fastapi"] == (0.9, 0.8, 1.25)
    assert figures[f"kinds/{CARRY} gru over lstm"].value == 1.5
    assert figures[f"kinds/{CARRY} gru over lstm, by CPU"].value == pytest.approx(1 / 1.5)


def test_lines_of_one_commit_are_joined(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    earlier = {**ABOUT, "date": "2026-01-01T00:00:00+00:00"}
    for name, about in (("s", earlier), ("MiB", {**ABOUT, "commit": "0"})):
        other = Results(about)
        other.figure(f"cold/carry-tensorflow {name}", [9.0])
        other.write(file)
    results = make_results()
    results.write(file)
    read = read_results(file)
    assert read.figures.pop("cold/carry-tensorflow s").value == 9.0
    assert read == results


def test_targets_are_reached_missed_or_not_measured() -> None:
    words = [verdict for *_, verdict in verdicts(make_results())]
    assert words[:3] == ["reached", "not reached", "not measured"]
    assert words[12:15] == ["not reached", "not measured", "not measured"]


def test_table_has_rows_figures_targets_and_notes() -> None:
    table = format_table(make_results())
    assert f"peak/32/{CARRY}" in table
    assert "0.9 (0.8 to 1.25)" in table
    assert "not reached" in table
    assert table.endswith("note: something was left out")


def test_page_has_every_figure(tmp_path: Path) -> None:
    write_report(make_results(), tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "$" not in page
    assert "`abc123`" in page
    assert f"| `32/{CARRY}` | 900 |" in page
    assert "0.9 (0.8 to 1.25) | reached |" in page
    assert "- something was left out" in page
    assert f"| {CARRY} | 4.0 |" in page
    assert f"| `lstm/{CARRY}` | 450 | 16,000 | 50 |  |  | 0.75 |" in page
    assert (
        f"| `gru/{CARRY}` | 675 | 16,000 | 75 | 1.5 (1.5 to 1.5) | 0.667 (0.667 to 0.667) | 1.12 |"
        in page
    )
    assert page.count("Not measured in this run.") == 6


@pytest.mark.parametrize(
    ("stage", "inner"),
    [
        ("codec", "validate (service/transports/http/bodies/body_types.py:10);loads (orjson.py:1)"),
        ("load", "load (service/store/redis/redis_store.py:90);read (redis/connection.py:5)"),
        ("commit", "commit (service/store/redis/redis_store.py:1);pack (service/store/codec.py:9)"),
        ("infer", "step (service/engine/runtimes/onnx.py:50);run (onnxruntime/capi/session.py:9)"),
        ("queue", "_form (service/engine/batcher.py:120)"),
        ("HTTP", "post_chunk (service/transports/http/routes/chunks.py:40)"),
        ("HTTP", "run (uvicorn/server.py:60)"),
    ],
)
def test_stack_counts_for_its_innermost_known_frame(stage: str, inner: str) -> None:
    assert stage_of(f"<module> (service/cli.py:1);run (uvicorn/server.py:60);{inner}") == stage
    assert stage_of("<module> (service/cli.py:1);wait (threading.py:5)") == "other"


def test_shares_exclude_waiting_samples() -> None:
    outer = "Thread.run (threading.py:1018);_worker (concurrent/futures/thread.py:90)"
    waiting = f"{outer} 7\nEvent.wait (threading.py:655);Condition.wait (threading.py:363) 5\n"
    stacks = read_stacks(
        f"{waiting}run (uvicorn/server.py:60) 3\n_form (service/engine/batcher.py:1) 1\n"
    )
    assert sorted(stacks.values()) == [1, 3]
    shares = stage_shares(stacks)
    assert tuple(shares) == STAGES
    assert (shares["HTTP"], shares["queue"], shares["load"]) == (0.75, 0.25, 0)
