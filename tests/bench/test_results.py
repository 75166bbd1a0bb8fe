"""Rows, ratios, targets, the split of the CPU, the judge of answers, and the written page."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest

from models.artifact.artifact import write_artifact
from models.spec.model import parse_spec
from tests.bench.cpu_split import STAGES, read_stacks, shares, stage_of
from tests.bench.generator import Load
from tests.bench.networks import Bodies, WrongOutputsError, check_answers
from tests.bench.report import write_report
from tests.bench.results import Results, Sample, read_results, table
from tests.bench.targets import TARGETS, verdicts
from tests.bench.traffic import Kept
from tests.support.oracle import contracting_weights, oracle_step

ABOUT = {"commit": "abc123", "machine": "a machine", "date": "2026-01-02T03:04:05+00:00"}
BASE = Sample(1000.0, 16000.0, 50.0, 1.5, 4.0, 9.0, 120.0, 0.5, 0.25)


def some_results() -> Results:
    results = Results(ABOUT)
    for rate, other in ((800.0, 1000.0), (900.0, 1000.0), (1000.0, 800.0)):
        results.add("peak/32/carry-onnxruntime", replace(BASE, chunks_per_s=rate))
        results.add("peak/32/fastapi", replace(BASE, chunks_per_s=other))
    results.ratio(
        "peak/carry-onnxruntime over fastapi", "peak/32/carry-onnxruntime", "peak/32/fastapi"
    )
    for load in ("unloaded", "open-50", "open-80", "open-50-long"):
        results.add(f"latency/{load}/carry-onnxruntime", BASE)
    for stage in STAGES:
        results.figure(f"split/carry-onnxruntime {stage}, us a chunk", [4.0])
    results.figure("cold/carry-onnxruntime s", [1.5, 2.5, 3.5])
    results.notes.append("something was left out")
    return results


def test_a_sample_counts_cpu_per_chunk_and_rates_per_second() -> None:
    load = Load(2.0, np.full(50, 0.004), chunks=100, events=1600, cpu_s=0.5)
    sample = Sample.of(load, cpu_s=1.0, store_cpu_s=0.25, rss_bytes=3 * 2**20)
    assert sample == Sample(50, 800, 10_000, 4, 4, 4, 3, 0.25, 0.125)


def test_a_ratio_is_taken_round_by_round() -> None:
    figure = some_results().figures["peak/carry-onnxruntime over fastapi"]
    assert (figure.value, figure.low, figure.high) == (0.9, 0.8, 1.25)


def test_runs_of_one_commit_are_joined_and_others_left(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    earlier = {**ABOUT, "date": "2026-01-01T00:00:00+00:00"}
    for name, about in (("s", earlier), ("MiB", {**ABOUT, "commit": "0"})):
        other = some_results()
        other.about = about
        other.figure(f"cold/carry-tensorflow {name}", [9.0])
        other.write(file)
    results = some_results()
    results.write(file)
    read = read_results(file)
    assert read.about == ABOUT
    assert read.figures["cold/carry-tensorflow s"].value == 9.0
    assert "cold/carry-tensorflow MiB" not in read.figures
    assert read.notes == results.notes


def test_lines_read_back_as_the_last_run(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    results = some_results()
    results.write(file)
    read = read_results(file)
    assert read == results
    line = orjson.loads(file.read_bytes().splitlines()[-1])
    assert {name: line[name] for name in ABOUT} == ABOUT
    row = results.rows["peak/32/carry-onnxruntime"].line()
    wanted = {"name", "chunks_per_s", "events_per_s", "cpu_us_per_chunk"}
    assert wanted | {"p50_ms", "p99_ms", "p999_ms", "rss_mib"} <= set(row)
    assert row["chunks_per_s"] == 900


def test_targets_are_reached_missed_or_not_measured() -> None:
    found = {
        (target.figure, target.bound): verdict for target, _, verdict in verdicts(some_results())
    }
    assert found["peak/carry-onnxruntime over fastapi", 0.8] == "reached"
    assert found["peak/carry-onnxruntime over fastapi", 1.0] == "not reached"
    assert found["cold/carry-onnxruntime s", 2] == "not reached"
    assert found["cold/carry-tensorflow s", 12] == "not measured"


def test_each_target_has_a_bound_of_its_own() -> None:
    assert len({(target.figure, target.bound) for target in TARGETS}) == len(TARGETS)


def test_the_table_shows_rows_figures_and_notes() -> None:
    shown = table(some_results())
    assert "peak/32/carry-onnxruntime" in shown
    assert "0.9   (0.8 to 1.25)" in shown
    assert shown.endswith("note: something was left out")


def test_the_page_holds_each_kind_against_the_plain_stack(tmp_path: Path) -> None:
    results = some_results()
    for rate in (500.0, 400.0):
        for name, times in (("lstm", 1), ("gru", 1.5)):
            row = f"{name}/carry-onnxruntime"
            results.add(f"kinds/32/{row}", replace(BASE, chunks_per_s=rate * times))
            results.add(f"kinds/1/{row}", replace(BASE, p50_ms=0.75 * times))
    results.ratio(
        "kinds/carry-onnxruntime gru over lstm",
        "kinds/32/gru/carry-onnxruntime",
        "kinds/32/lstm/carry-onnxruntime",
    )
    write_report(results, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "| `lstm/carry-onnxruntime` | 450 | 16,000 | 50 |  |  | 0.75 |" in page
    expected = "| `gru/carry-onnxruntime` | 675 | 16,000 | 50 | 1.5 (1.5 to 1.5) |  | 1.12 |"
    assert expected in page
    assert page.count("Not measured in this run.") == 5


def test_the_page_has_every_figure_and_its_plots(tmp_path: Path) -> None:
    write_report(some_results(), tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "$" not in page
    assert "`abc123`" in page
    assert "| `32/carry-onnxruntime` | 900 |" in page
    assert "0.9 (0.8 to 1.25) | reached |" in page
    assert "- something was left out" in page
    assert "| carry-onnxruntime | 4.0 |" in page
    assert page.count("Not measured in this run.") == 6
    for name in ("peak", "latency", "split"):
        assert f"(performance/{name}.svg)" in page
        first = (tmp_path / "performance" / f"{name}.svg").read_bytes()
        assert b"<svg" in first
    write_report(some_results(), tmp_path)
    assert (tmp_path / "performance" / "split.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("inner", "stage"),
    [
        ("validate (service/transports/http/bodies/body_types.py:10);loads (orjson.py:1)", "codec"),
        (
            "load (service/store/redis/redis_store.py:90);read_response (redis/connection.py:5)",
            "load",
        ),
        ("commit (service/store/redis/redis_store.py:130);encode_state (service/store/codec.py:9)",
         "commit"),
        ("_call (service/engine/compute.py:70);step (service/engine/runtimes/onnx.py:50);"
         "run (onnxruntime/capi/session.py:9)", "infer"),
        ("_form (service/engine/batcher.py:120)", "queue"),
        ("post_chunk (service/transports/http/routes/chunks.py:40)", "HTTP"),
        ("run (uvicorn/server.py:60)", "HTTP"),
        ("wait (threading.py:5)", "other"),
    ],
)  # fmt: skip
def test_a_stack_counts_for_its_innermost_known_frame(inner: str, stage: str) -> None:
    outer = "" if stage == "other" else "run (uvicorn/server.py:60);"
    assert stage_of(f"<module> (service/cli.py:1);{outer}{inner}") == stage


def test_shares_are_of_all_samples() -> None:
    stacks = read_stacks("run (uvicorn/server.py:60) 3\n_form (service/engine/batcher.py:1) 1\n")
    assert stacks == Counter(
        {"run (uvicorn/server.py:60)": 3, "_form (service/engine/batcher.py:1)": 1}
    )
    found = shares(stacks)
    assert tuple(found) == STAGES
    assert (found["HTTP"], found["queue"], found["load"]) == (0.75, 0.25, 0)


def test_threads_that_wait_for_work_are_left_out() -> None:
    outer = "Thread.run (threading.py:1018);_worker (concurrent/futures/thread.py:90)"
    works = f"{outer};_WorkItem.run (concurrent/futures/thread.py:59)"
    text = (
        f"{outer} 7\n{works} 2\nEvent.wait (threading.py:655);Condition.wait (threading.py:363) 5\n"
    )
    assert read_stacks(text) == Counter({works: 2})


def test_answers_are_held_against_one_whole_run(tmp_path: Path) -> None:
    spec = parse_spec(
        {
            "name": "bench",
            "features": 2,
            "layers": [{"kind": "lstm", "units": 3}],
            "heads": [{"kind": "dense", "name": "out", "units": 2}],
        }
    )
    artifact = write_artifact(tmp_path / "bench", spec, contracting_weights(spec, 1))
    bodies = Bodies.random(4, features=2, count=3)
    traffic = bodies.traffic("a", 2, sampled=2)
    kept = []
    for stream in range(2):
        state = artifact.state.zero().floats
        for chunk in range(3):
            rows = bodies.rows[traffic.body(stream, chunk)]
            outputs, state = oracle_step(spec, artifact.weights, rows, state)
            reply = orjson.dumps({"outputs": {"out": outputs.tolist()}})
            kept.append(Kept(stream, chunk, reply))
    assert check_answers(artifact, traffic, bodies.rows, kept) == 24
    swapped = [replace(kept[0], reply=kept[3].reply), *kept[1:]]
    with pytest.raises(WrongOutputsError, match="differ from one whole run"):
        check_answers(artifact, traffic, bodies.rows, swapped)
    with pytest.raises(WrongOutputsError, match="missing"):
        check_answers(artifact, traffic, bodies.rows, kept[1:])
