"""The lines of requests: the same on both paths, at the level of their outcome."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import orjson
import pytest

from service.telemetry.access_log import GRPC, AccessLog, RequestFacts, access_log
from service.telemetry.logs import json_line
from tests.service.transports.v1.harness import Harness, harness, rows
from tests.service.transports.v1.raw_http import chunk, converse, port_of, request, serving
from tests.service.transports.v2.conftest import add_v2
from tests.service.transports.v2.v2 import V2
from tests.support.pipelines import make_artifact
from tests.support.servers import RealServer, becomes

ROUTE = "/v1/models/{model}/streams/{stream}/chunks"
KEY = b"secret of the store"


class Lines(list[dict[str, Any]]):
    """The lines that were written, parsed."""

    def attach(self, log: AccessLog, patch: pytest.MonkeyPatch) -> None:
        """Take what a log writes."""
        patch.setattr(log, "level", logging.DEBUG)
        patch.setattr(log, "render", lambda line: orjson.loads(json_line(line)))
        patch.setattr(log, "write", self.append)

    async def settled(self, count: int) -> list[dict[str, Any]]:
        """The lines, once there are so many, without what differs from run to run."""
        await becomes(lambda: len(self) == count, f"{count} lines")
        omitted = ("timestamp", "ms", "logger", "message", "request_id")
        return [{k: v for k, v in line.items() if k not in omitted} for line in self]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    taken = Lines()
    taken.attach(access_log, monkeypatch)
    monkeypatch.setattr(access_log, "name_stream", None)
    return taken


@pytest.mark.parametrize("fast_path", [True, False])
async def test_a_line_has_outcome_model_and_bytes(
    api: Harness, lines: Lines, fast_path: bool
) -> None:
    good, ahead = chunk(), chunk(99)
    async with serving(api, fast_path=fast_path) as server:
        bodies = [
            len((await converse(port_of(server), request(body)))[0].partition(b"\r\n\r\n")[2])
            for body in (good, ahead)
        ]
        found = await lines.settled(2)
    common = {"method": "POST", "route": ROUTE, "model": "probe"}
    assert found == [
        {
            **common,
            "level": "info",
            "status": 200,
            "received_bytes": len(good),
            "sent_bytes": bodies[0],
        },
        {
            **common,
            "level": "warning",
            "status": 409,
            "code": "position_ahead",
            "received_bytes": len(ahead),
            "sent_bytes": bodies[1],
        },
    ]


@pytest.mark.parametrize("fast_path", [True, False])
async def test_a_failure_of_the_service_is_an_error(
    api: Harness, lines: Lines, fast_path: bool
) -> None:
    api.store.away = RuntimeError("broken")
    async with serving(api, fast_path=fast_path) as server:
        await converse(port_of(server), request(chunk()))
        [line] = await lines.settled(1)
    assert (line["level"], line["status"], line["code"]) == ("error", 500, "internal_error")


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("how", ["none", "hashed", "clear"])
async def test_streams_are_named_by_the_setting(
    api: Harness, lines: Lines, how: Any, fast_path: bool
) -> None:
    access_log.name_streams(how, KEY)
    async with serving(api, fast_path=fast_path) as server:
        for stream in ("ann", "ann", "bob"):
            await converse(port_of(server), request(chunk(None), stream=stream))
        found = await lines.settled(3)
    names = [line.get("stream") for line in found]
    if how == "none":
        assert names == [None] * 3
    elif how == "clear":
        assert names == ["ann", "ann", "bob"]
    else:
        assert names[0] == names[1] != names[2]
        assert all(len(name) == 16 and set(name) <= set("0123456789abcdef") for name in names)
        other = AccessLog()
        other.name_streams("hashed", b"another store")
        assert other.stream_name("ann") != names[0]


async def test_log_lines_contain_no_text_of_clients(api: Harness, lines: Lines) -> None:
    await api.client.get("/v1/models/ann@home/streams/s")
    await api.client.get("/v1/ann@home")
    for line in await lines.settled(2):
        assert "ann@home" not in str(line)
        assert (line["level"], line["status"]) == ("warning", 404)
        assert line["code"] in ("model_not_found", "not_found")


async def test_probes_are_logged_at_debug_unless_they_fail(api: Harness, lines: Lines) -> None:
    await api.client.get("/health/ready")
    api.pipeline.announce_stop()
    await api.client.get("/health/ready")
    ready, stopping = await lines.settled(2)
    assert (ready["level"], ready["status"]) == ("debug", 200)
    assert (stopping["level"], stopping["status"]) == ("error", 503)


@pytest.mark.parametrize("binary", [True, False], ids=["fast path", "slow path"])
async def test_a_line_of_v2_names_model_and_stream(
    pipeline_server: RealServer, tmp_path: Any, lines: Lines, binary: bool
) -> None:
    access_log.name_streams("clear", KEY)
    models = {"probe": make_artifact(tmp_path)}
    async with harness(pipeline_server, models, extend=add_v2) as api:
        await V2(api).infer(rows(3), binary=binary, sequence_id="seven")
        [line] = await lines.settled(1)
    assert (line["model"], line["stream"]) == ("probe", "seven")
    assert line["received_bytes"] > 0
    assert line["sent_bytes"] > 0


@pytest.mark.parametrize(
    ("method", "levels"),
    [
        (
            "GET",
            {0: "info", 101: "info", 200: "info", 404: "warning", 429: "warning", 503: "error"},
        ),
        # OK, CANCELLED, INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, ABORTED, INTERNAL, ...
        (GRPC, {0: "info", 1: "info", 3: "warning", 5: "warning", 8: "warning", 10: "warning"}),
        (GRPC, {2: "error", 4: "error", 13: "error", 14: "error", 15: "error"}),
    ],
)
def test_the_level_follows_the_outcome(
    method: str, levels: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, written = AccessLog(), Lines()
    written.attach(log, monkeypatch)
    for status in levels:
        log.log("id", method, None, status, 1.0, RequestFacts())
    assert {line["status"]: line["level"] for line in written} == levels


def test_successes_are_sampled_and_failures_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    log, written = AccessLog(), Lines()
    written.attach(log, monkeypatch)
    observed = Counter[int]()
    log.observe = lambda method, route, status, ms: observed.update([status])
    log.success_ratio = 0.25
    for _ in range(4000):
        log.log("id", "GET", "/", 200, 1.0, RequestFacts(key="a"))
    for status in (404, 503):
        for _ in range(10):
            log.log("id", "GET", "/", status, 1.0, RequestFacts(key="a", code="x"))
    counts = Counter(line["status"] for line in written)
    # five standard deviations
    assert 863 <= counts[200] <= 1137
    assert (counts[404], counts[503]) == (10, 10)
    assert observed == {200: 4000, 404: 10, 503: 10}
    assert {line.get("sample_ratio") for line in written if line["status"] == 200} == {0.25}
    assert {line.get("sample_ratio") for line in written if line["status"] != 200} == {None}
    assert {(line["status"], line.get("key")) for line in written} == {
        (200, None), (404, "a"), (503, "a"),
    }  # fmt: skip
