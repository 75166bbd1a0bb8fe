"""Counters and audit lines of rejected keys: bounded, and only for keys that were proved."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from prometheus_client import generate_latest

from service.core.errors import CarryError, Forbidden, LimitExceeded, Unauthenticated
from service.telemetry import rejections
from service.telemetry.access_log import access_log
from service.telemetry.logs import json_line
from service.telemetry.metrics import PrometheusRecorder
from service.telemetry.rejections import INTERVAL_S, MAX_ENTRIES, MAX_KEYS
from tests.support.metrics import read, series
from tests.support.servers import until_async

NAME = "carry_key_rejections_total"


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
    monkeypatch.setattr(rejections, "INTERVAL_S", 0.01)
    recorder = PrometheusRecorder()
    for error in (Forbidden("").with_key("model", "a"), LimitExceeded("").with_key("streams", "a")):
        for _ in range(3):
            recorder.record_error("flights", error)
    for index in range(3):
        recorder.record_error("flights", unproven(index))
    recorder.record_error("flights", CarryError("no matter of a key"))
    assert [line["count"] for line in written] == [1, 1, 1]
    await until_async(lambda: asyncio.sleep(0, len(written) == 6), "the lines of the minute")
    kept = ("message", "logger", "key", "code", "reason", "count")
    assert [tuple(line[name] for name in kept) for line in written[3:]] == [
        ("access_rejected", "service.audit", "a", "forbidden", "model", 2),
        ("access_rejected", "service.audit", "a", "limit_exceeded", "streams", 2),
        ("access_rejected", "service.audit", "unknown", "unauthenticated", "unknown_key", 2),
    ]
    found = {k: v for k, v in read(generate_latest(recorder.registry)).items() if k[0] == NAME}
    assert found == {
        series(NAME, key="a", code="forbidden"): 3,
        series(NAME, key="a", code="limit_exceeded"): 3,
        series(NAME, key="unknown", code="unauthenticated"): 3,
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
    assert INTERVAL_S >= 60
    assert sum(line["count"] for line in written) == 20 * keys
    found = {k: v for k, v in read(generate_latest(recorder.registry)).items() if k[0] == NAME}
    assert len(found) == MAX_KEYS + 2
    of_label = Counter(dict(found))
    assert of_label[series(NAME, key="unknown", code="unauthenticated")] == 10 * keys
    assert of_label[series(NAME, key="other", code="forbidden")] == 10 * (keys - MAX_KEYS)
