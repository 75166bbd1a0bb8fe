"""Prometheus metrics: every report updates its series, in one process and with several workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from service.core.errors import (
    CarryError,
    Forbidden,
    LimitExceeded,
    ModelNotFound,
    Overloaded,
    PositionAhead,
    Unauthenticated,
)
from service.core.values import Timing
from service.pipeline.recorder import Recorder
from service.telemetry import metrics
from service.telemetry.access_log import access_log
from service.telemetry.logs import json_line
from service.telemetry.metrics import (
    MAX_ENTRIES,
    MAX_KEYS,
    MULTIPROCESS_DIR,
    REJECTIONS_INTERVAL_S,
    PrometheusRecorder,
)
from service.telemetry.series import SECONDS, observe_all
from tests.support.metrics import read, series
from tests.support.servers import becomes

REPOSITORY = Path(__file__).resolve().parents[3]
FLIGHTS = {"model": "flights"}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> PrometheusRecorder:
    monkeypatch.delenv(MULTIPROCESS_DIR, raising=False)
    recorder = PrometheusRecorder()
    recorder.model("flights", "a1b2", "tensorflow", 64)
    return recorder


async def test_clients_cannot_create_series(recorder: PrometheusRecorder) -> None:
    route = "/v1/models/{model}"
    for ms in (4.0, 40.0, 40.0):
        recorder.record_request("GET", route, 200, ms)
    recorder.record_request("BREW", route, 405, 1.0)
    recorder.record_request("GET", None, 404, 1.0)
    recorder.record_request("HEAD", None, 404, 1.0)
    for name in ("nope", "nope2", "nope3"):
        recorder.record_error(name, ModelNotFound(""))
    found = read(recorder.render())
    name = "carry_request_seconds"
    known = {"method": "GET", "route": route, "status": "200"}
    assert found[series(f"{name}_count", **known)] == 3
    assert found[series(f"{name}_sum", **known)] == pytest.approx(0.084)
    assert found[series(f"{name}_bucket", le="0.005", **known)] == 1
    assert found[series(f"{name}_count", method="-", route=route, status="405")] == 1
    assert found[series(f"{name}_count", method="-", route="-", status="404")] == 2
    errors = {key: value for key, value in found.items() if key[0] == "carry_refusals_total"}
    assert {key for key, value in errors.items() if value} == {
        series("carry_refusals_total", model="-", code="model_not_found")
    }
    total = series(f"{name}_count", **known)

    def is_counted(count: int) -> bool:
        return read(generate_latest(recorder.registry))[total] == count

    # in the next interval, and in the one after it
    for count in (4, 5):
        recorder.record_request("GET", route, 200, 1.0)
        await becomes(partial(is_counted, count), "the interval")


def test_concurrent_scrapes_add_each_value_once(
    recorder: PrometheusRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def observe_slowly(histogram: Histogram, values: list[float]) -> None:
        time.sleep(0.02)
        observe_all(histogram, values)

    monkeypatch.setattr(metrics, "observe_all", observe_slowly)
    recorder.record_runtime_call("flights", rows=3, steps=40, padded_steps=64, seconds=0.006)
    scrapes = [threading.Thread(target=recorder.render) for _ in range(2)]
    for scrape in scrapes:
        scrape.start()
    for scrape in scrapes:
        scrape.join()
    assert read(recorder.render())[series("carry_batch_rows_count", **FLIGHTS)] == 1


def test_each_report_updates_its_series(recorder: PrometheusRecorder) -> None:
    reports: Recorder = recorder
    recorder.model("post", "c3d4", "tensorflow", 64)
    reports.record_chunks(
        "flights", "v1", 12, [0.002], Timing(load_s=0.03, infer_s=0.4, commit_s=5.0)
    )
    reports.record_chunks("flights", "v1", 7, [0.0], Timing())
    reports.record_chunks("post", "v1", 1, [0.0], Timing())
    reports.record_replay("flights")
    reports.record_conflict("post")
    reports.record_conflict("post")
    reports.record_rewarmed("flights", exact=3, inexact=2)
    reports.record_cache_lookups("flights", hits=5, misses=2)
    reports.record_runtime_call("flights", rows=3, steps=40, padded_steps=64, seconds=0.006)
    reports.record_error("flights", PositionAhead(""))
    for samples, outside, ratio in ((4, 1, 0.5), (2, 2, 1.5)):
        reports.record_drift("flights", "v1", samples, {"inputs": outside}, {"inputs": ratio})
    for change in (1, 1, -1):
        reports.record_websockets("flights", change)
        reports.record_watchers("post", change)

    found = read(recorder.render())
    counts = {"chunks": 2, "events": 19, "replays": 1, "conflicts": 0, "cache_hits": 5}
    counts |= {"cache_misses": 2, "batch_steps": 40, "batch_padded_steps": 64}
    for name, count in counts.items():
        assert found[series(f"carry_{name}_total", **FLIGHTS)] == count, name
    assert found[series("carry_chunks_total", model="post")] == 1
    assert found[series("carry_conflicts_total", model="post")] == 2
    assert found[series("carry_rewarmed_total", **FLIGHTS, state="exact")] == 3
    assert found[series("carry_rewarmed_total", **FLIGHTS, state="inexact")] == 2
    assert found[series("carry_batch_rows_bucket", **FLIGHTS, le="2.0")] == 0
    assert found[series("carry_batch_rows_bucket", **FLIGHTS, le="4.0")] == 1
    assert found[series("carry_batch_seconds_sum", **FLIGHTS)] == pytest.approx(0.006)
    assert found[series("carry_refusals_total", **FLIGHTS, code="position_ahead")] == 1
    version = {**FLIGHTS, "version": "v1"}
    assert found[series("carry_drift_samples_total", **version)] == 6
    assert found[series("carry_drift_outside_total", **version, part="inputs")] == 3
    assert found[series("carry_drift_norm_ratio", **version, part="inputs")] == 1.5
    assert found[series("carry_websocket_connections", **FLIGHTS)] == 1
    assert found[series("carry_watchers", model="post")] == 1
    assert found[series("carry_watchers", **FLIGHTS)] == 0
    for stage, seconds in {"queue": 0.002, "load": 0.03, "infer": 0.4, "commit": 5.0}.items():
        name = "carry_chunk_stage_seconds"
        assert found[series(f"{name}_sum", **FLIGHTS, stage=stage)] == pytest.approx(seconds)
        assert found[series(f"{name}_count", **FLIGHTS, stage=stage)] == 2
    assert found[series("carry_model_info", **FLIGHTS, version="a1b2", runtime="tensorflow")] == 1


TIMES_S = st.sampled_from(SECONDS) | st.floats(0, 20)


@given(batches=st.lists(st.lists(TIMES_S, max_size=8), max_size=4))
def test_observe_all_equals_observe_of_each_value(batches: list[list[float]]) -> None:
    registry = CollectorRegistry()
    at_once, one_by_one = (
        Histogram(name, "-", ("model",), registry=registry, buckets=SECONDS).labels("m")
        for name in ("at_once", "one_by_one")
    )
    for values in batches:
        observe_all(at_once, values)
        for value in values:
            one_by_one.observe(value)
    found = read(generate_latest(registry))
    for (name, labels), value in found.items():
        if name.startswith("at_once"):
            expected = found[name.replace("at_once", "one_by_one"), labels]
            assert value == pytest.approx(expected)


def test_series_of_a_new_model_start_at_zero(recorder: PrometheusRecorder) -> None:
    found = read(recorder.render())
    for name in ("chunks", "events", "replays", "conflicts", "cache_hits", "cache_misses"):
        assert found[series(f"carry_{name}_total", **FLIGHTS)] == 0
    assert found[series("carry_websocket_connections", **FLIGHTS)] == 0
    for code in ("store_refused", "state_damaged", "stream_overloaded", "internal_error"):
        assert found[series("carry_refusals_total", **FLIGHTS, code=code)] == 0
    assert series("carry_refusals_total", **FLIGHTS, code="position_ahead") not in found
    (build,) = [key for key in found if key[0] == "carry_build_info"]
    assert {name for name, _ in build[1]} == {"version", "python"}


WORKER = """
import os
from service.core.values import Timing
from service.telemetry.metrics import PrometheusRecorder

recorder = PrometheusRecorder()
recorder.model("flights", "a1b2", "tensorflow", 64)
recorder.record_chunks("flights", "v1", 5, [0.0], Timing(infer_s=0.25))
recorder.record_chunks("flights", "v1", 4, [0.003, 0.0], Timing(infer_s=0.2))
recorder.record_websockets("flights", 3)
print("recorded", flush=True)
if input() == "render":
    os.write(1, recorder.render())
"""


def test_any_worker_renders_the_sum_including_dead_workers(tmp_path: Path) -> None:
    environment = {**os.environ, MULTIPROCESS_DIR: str(tmp_path)}
    command = [sys.executable, "-c", WORKER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    workers = [
        subprocess.Popen(command, env=environment, cwd=REPOSITORY, **pipes) for _ in range(3)
    ]
    first, second, third = workers
    try:
        for worker in workers:
            assert worker.stdout.readline() == b"recorded\n"
        first.kill()
        first.communicate()
        rendered, _ = second.communicate(b"render\n")
    finally:
        for worker in (second, third):
            if worker.poll() is None:
                worker.communicate(b"end\n")
    found = read(rendered)
    assert found[series("carry_chunks_total", **FLIGHTS)] == 9
    assert found[series("carry_events_total", **FLIGHTS)] == 27
    stage = {**FLIGHTS, "stage": "infer"}
    name = "carry_chunk_stage_seconds"
    assert found[series(f"{name}_sum", **stage)] == pytest.approx(3 * 0.65)
    assert found[series(f"{name}_bucket", **stage, le="0.1")] == 0
    assert found[series(f"{name}_bucket", **stage, le="0.25")] == 9
    stage["stage"] = "queue"
    assert found[series(f"{name}_bucket", **stage, le="0.0025")] == 6
    assert found[series(f"{name}_count", **stage)] == 9
    # the one that was killed has none any more
    assert found[series("carry_websocket_connections", **FLIGHTS)] == 6
    assert len([key for key in found if key[0] == "carry_model_info"]) == 1


def test_statistics_are_the_totals_of_a_model(recorder: PrometheusRecorder) -> None:
    reports: Recorder = recorder
    times = Timing(load_s=0.03, infer_s=0.4, commit_s=5.0)
    reports.record_chunks("flights", "v1", 12, [0.002, 0.002], times)
    reports.record_chunks("flights", "v1", 7, [0.0], Timing())
    reports.record_runtime_call("flights", rows=3, steps=40, padded_steps=64, seconds=0.006)
    reports.record_error("flights", PositionAhead(""))
    reports.record_error("flights", Overloaded(""))
    totals = recorder.statistics()["flights"]
    assert totals[:3] == (3, 1, 2)
    assert totals[3:] == pytest.approx((0.004, 0.06, 0.8, 10.0))


REJECTIONS = "carry_key_rejections_total"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The lines of the audit log."""
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(access_log, "render", json_line)
    monkeypatch.setattr(access_log, "write", lambda text: lines.append(json.loads(text)))
    return lines


def unproven(index: int) -> CarryError:
    return Unauthenticated("").with_key("unknown_key", f"{index:012x}", is_proven=False)


async def test_repeated_rejections_share_a_line_and_unproven_ids_a_series(
    written: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "REJECTIONS_INTERVAL_S", 0.01)
    recorder = PrometheusRecorder()
    for error in (Forbidden("").with_key("model", "a"), LimitExceeded("").with_key("streams", "a")):
        for _ in range(3):
            recorder.record_error("flights", error)
    for index in range(3):
        recorder.record_error("flights", unproven(index))
    recorder.record_error("flights", CarryError("no matter of a key"))
    assert [line["count"] for line in written] == [1, 1, 1]
    await becomes(lambda: len(written) == 6, "the lines of the minute")
    kept = ("message", "logger", "key", "code", "reason", "count")
    assert [tuple(line[name] for name in kept) for line in written[3:]] == [
        ("access_rejected", "service.audit", "a", "forbidden", "model", 2),
        ("access_rejected", "service.audit", "a", "limit_exceeded", "streams", 2),
        ("access_rejected", "service.audit", "unknown", "unauthenticated", "unknown_key", 2),
    ]
    found = {
        k: v for k, v in read(generate_latest(recorder.registry)).items() if k[0] == REJECTIONS
    }
    assert found == {
        series(REJECTIONS, key="a", code="forbidden"): 3,
        series(REJECTIONS, key="a", code="limit_exceeded"): 3,
        series(REJECTIONS, key="unknown", code="unauthenticated"): 3,
    }


async def test_a_flood_writes_a_bounded_number_of_lines_and_series(
    written: list[dict[str, Any]],
) -> None:
    recorder, keys = PrometheusRecorder(), 2 * MAX_KEYS
    for index in range(10 * keys):
        recorder.record_error("flights", unproven(index))
        recorder.record_error("flights", Forbidden("").with_key("stream", f"key{index % keys}"))
    recorder.rejections.flush()
    assert len(written) == 2 * (MAX_ENTRIES + 1)
    assert REJECTIONS_INTERVAL_S >= 60
    assert sum(line["count"] for line in written) == 20 * keys
    found = {
        k: v for k, v in read(generate_latest(recorder.registry)).items() if k[0] == REJECTIONS
    }
    assert len(found) == MAX_KEYS + 2
    of_label = Counter(dict(found))
    assert of_label[series(REJECTIONS, key="unknown", code="unauthenticated")] == 10 * keys
    assert of_label[series(REJECTIONS, key="other", code="forbidden")] == 10 * (keys - MAX_KEYS)
