"""The console in Chromium: figures of `/metrics`, failing checks, pages of streams, topics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute

from service.console.page import add_console
from tests.service.transports.v1.harness import harness, listening
from tests.support.browser import Page, new_page
from tests.support.needs import needs_tools
from tests.support.pipelines import make_artifact
from tests.support.proxy import Proxy
from tests.support.servers import RealServer

pytestmark = needs_tools("chromium")

PER_SECOND = """
carry_events_total{model="probe"} 50
carry_refusals_total{code="invalid_input",model="-"} 0.5
carry_chunk_stage_seconds_sum{model="probe",stage="commit"} 0.02
carry_chunk_stage_seconds_count{model="probe",stage="commit"} 10
carry_request_seconds_bucket{le="0.005",method="POST",route="/v1/a/chunks",status="200"} 0
carry_request_seconds_bucket{le="0.01",method="POST",route="/v1/a/chunks",status="200"} 5
carry_request_seconds_bucket{le="0.025",method="POST",route="/v1/a/chunks",status="200"} 8
carry_request_seconds_bucket{le="0.225",method="POST",route="/v1/a/chunks",status="200"} 8
carry_request_seconds_bucket{le="+Inf",method="POST",route="/v1/a/chunks",status="200"} 8
carry_request_seconds_count{method="POST",route="/v1/a/chunks",status="200"} 8
carry_request_seconds_bucket{le="0.005",method="GRPC",route="/infer",status="13"} 0
carry_request_seconds_bucket{le="0.01",method="GRPC",route="/infer",status="13"} 1
carry_request_seconds_bucket{le="0.025",method="GRPC",route="/infer",status="13"} 1.8
carry_request_seconds_bucket{le="0.225",method="GRPC",route="/infer",status="13"} 2
carry_request_seconds_bucket{le="+Inf",method="GRPC",route="/infer",status="13"} 2
carry_request_seconds_count{method="GRPC",route="/infer",status="13"} 2
carry_request_seconds_bucket{le="+Inf",method="GET",route="/v1/a/outputs",status="200"} 700
carry_request_seconds_count{method="GET",route="/v1/a/outputs",status="200"} 700
""".strip().splitlines()
"""Increase of each sample in a second. A watch lasts as long as its client wants: not a latency."""

SHOWN = """Object.fromEntries([...document.querySelectorAll('.tiles > div')]
  .map((tile) => [...tile.children].map((each) => each.innerText)))"""
HEALTH = "document.querySelector('header [role=status]')?.innerText"
STAGES = """[...document.querySelectorAll('figure')]
  .find((each) => each.innerText.startsWith('Stages')).querySelector('[role=img]').ariaLabel"""


@asynccontextmanager
async def opened_console(
    server: RealServer, browser: str, folder: Path, **routes: Callable[..., Response]
) -> AsyncIterator[Page]:
    """The page of an application, in which these routes answer something else."""
    async with (
        asyncio.timeout(60),
        harness(server, {"probe": make_artifact(folder)}) as running,
        listening(running.app) as path,
        Proxy(lambda: path).listening() as proxy,
        new_page(browser) as page,
    ):
        add_console(running.app)
        for route, endpoint in routes.items():
            address = "/" + route.replace("_", "/")
            running.app.router.routes.insert(0, APIRoute(address, endpoint))
        await page.open(f"http://127.0.0.1:{proxy.port}/console/")
        # until it follows changes of its address, which it does after its first picture
        await page.until(f"({HEALTH} ?? 'Connecting') !== 'Connecting'")
        yield page
        assert page.errors == []


async def test_the_overview_shows_rates_and_quantiles_of_the_last_seconds(
    pipeline_server: RealServer, browser: str, tmp_path: Path
) -> None:
    began_s = time.monotonic() - 1000

    def metrics() -> Response:
        elapsed_s = time.monotonic() - began_s
        samples = [line.rpartition(" ") for line in PER_SECOND]
        lines = [f"{name} {float(value) * elapsed_s!r}" for name, _, value in samples]
        return PlainTextResponse("\n".join(lines))

    async with opened_console(pipeline_server, browser, tmp_path, metrics=metrics) as page:
        # a figure is of two replies, of which a busy machine may delay one
        rates = {"Events/s": 50, "Requests/s": 10, "Errors/s": 0.5}
        near = [f"Math.abs(shown['{name}'] / {rate} - 1) < 0.3" for name, rate in rates.items()]
        shown = await page.until(f"((shown) => {' && '.join(near)} && shown)({SHOWN})")
        # rank 5 of 6 in (5 ms, 10 ms], rank 9.9 of 9.8 to 10 in (25 ms, 225 ms]
        assert shown["Latency, p50"] == f"{5 + 5 * 5 / 6:.2f} ms"
        assert shown["Latency, p99"] == f"{25 + 200 * 0.1 / 0.2:.0f} ms"
        assert (await page.evaluate(STAGES)).endswith("commit 2 ms")


async def test_the_page_names_the_checks_that_fail_or_are_degraded(
    pipeline_server: RealServer, browser: str, tmp_path: Path
) -> None:
    store = {"name": "store", "ok": False, "detail": "2 of 3 servers accept commits"}
    runtime = {"name": "runtime", "ok": True, "detail": "warm"}
    report = {"status": "not_ready", "failing": ["store"], "degraded": []}
    alert = "document.querySelector('main [role=alert]')?.innerText"

    def health_ready() -> Response:
        code = 200 if report["status"] == "ready" else 503
        return JSONResponse({**report, "checks": [store, runtime]}, code)

    async with opened_console(
        pipeline_server, browser, tmp_path, health_ready=health_ready
    ) as page:
        await page.until(f"{HEALTH} === 'Not ready' && {alert} === '{store['detail']}'")
        report |= {"status": "ready", "failing": [], "degraded": ["store"]}
        await page.until(f"{HEALTH} === 'Degraded' && {alert} === '{store['detail']}'")
        report |= {"degraded": []}
        await page.until(f"{HEALTH} === 'Ready' && {alert} === undefined")


async def test_streams_are_listed_page_by_page(
    pipeline_server: RealServer, browser: str, tmp_path: Path
) -> None:
    # before the last, a page may be empty
    pages = {"": ([], "a"), "a": (["first"], "b"), "b": (["second"], None)}
    shown = "[...document.querySelectorAll('tbody a')].map((each) => each.innerText).join()"
    button = "[...document.querySelectorAll('main button')].find((each) => each.innerText === {!r})"

    def v1_models_probe_streams(cursor: str = "") -> Response:
        streams, following = pages[cursor]
        return JSONResponse({"model": "probe", "streams": streams, "cursor": following})

    async with opened_console(
        pipeline_server, browser, tmp_path, v1_models_probe_streams=v1_models_probe_streams
    ) as page:
        await page.evaluate("location.hash = '#/models/probe'")
        await page.until(f"{shown} === 'first'")
        assert await page.evaluate(f"{button.format('Previous')}.disabled")
        await page.evaluate(f"{button.format('Next')}.click()")
        await page.until(f"{shown} === 'second'")
        assert await page.evaluate(f"{button.format('Next')}.disabled")
        await page.evaluate(f"{button.format('Previous')}.click()")
        await page.until(f"{shown} === 'first'")


async def test_topics_have_rates_fold_their_partitions_and_show_their_newest_outputs(
    pipeline_server: RealServer, browser: str, tmp_path: Path
) -> None:
    began_s = time.monotonic()
    figures = {"entries": 9000, "pending": 64, "lag": 1200, "oldest_s": 2.5}
    part = {**figures, "topic": "carry{p0003}:in:events", "owner": "host:7:5f"}

    def v1_topics(partitions: bool = False) -> Response:
        acknowledged = round(50 * (time.monotonic() - began_s))
        topic = {
            "topic": "events", "group": "carry", "model": "probe", "outputs": "scores",
            "dead_letters": "events", "owners": ["host:7:5f", "host:8:60"],
            **figures, "acknowledged": acknowledged, "partitions": [part] if partitions else [],
        }  # fmt: skip
        return JSONResponse({"topics": [topic]})

    def v1_topics_outputs(topic: str, group: str) -> Response:
        assert (topic, group) == ("events", "carry")
        output = {"stream": "a/b", "position": 7, "time_ms": 0, "outputs": {"late": [0.25, 0.5]}}
        return JSONResponse({"topic": topic, "group": group, "outputs": [output]})

    cells = (
        "[...document.querySelectorAll('tbody tr')]"
        ".map((row) => [...row.cells].map((each) => each.innerText))"
    )
    routes = {"v1_topics": v1_topics, "v1_topics_outputs": v1_topics_outputs}
    async with opened_console(pipeline_server, browser, tmp_path, **routes) as page:
        await page.evaluate("location.hash = '#/topics'")
        await page.until(f"Math.abs({cells}[0]?.[3] - 50) < 15")
        ((*names, _, lag, pending, oldest, consumers),) = await page.evaluate(cells)
        assert names == ["events", "carry", "probe"]
        assert (lag, pending, oldest, consumers) == ("1,200", "64", "2.5 s", "2")
        await page.evaluate("document.querySelector('tbody button').click()")
        await page.until(f"{cells}[1]?.[0] === '{part['topic']}'")
        assert (await page.evaluate(cells))[1][-1] == part["owner"]
        await page.assert_accessible()
        await page.evaluate("document.querySelector('tbody button').click()")
        await page.until(f"{cells}.length === 1")

        await page.evaluate("document.querySelector('tbody a').click()")
        await page.until(f"{cells}[0]?.[0] === 'a/b'")
        shown = (await page.evaluate(cells))[0]
        assert (shown[1], shown[3]) == ("7", "0.25, 0.5")
        await page.assert_accessible()
        link = await page.evaluate("document.querySelector('tbody a').hash")
        assert link == "#/models/probe/streams/a%2Fb"
        assert float((await page.evaluate(SHOWN))["Lag"].replace(",", "")) == 1200


async def test_a_stream_shows_its_newest_events_and_where_it_can_be_rewound_to(
    pipeline_server: RealServer, browser: str, tmp_path: Path
) -> None:
    facts = """Object.fromEntries([...document.querySelectorAll('.facts > div')]
      .map((each) => [...each.children].map((part) => part.innerText)))"""
    cells = (
        "[...document.querySelectorAll('tbody tr')]"
        ".map((row) => [...row.cells].map((each) => each.innerText))"
    )
    head = {
        "model": "probe", "version": "1", "fingerprint": "1", "stream": "s", "feed": "inputs",
        "epoch": "e", "position": 30, "tag": "t", "updated_ms": 0,
    }  # fmt: skip
    asked: list[tuple[int, int]] = []

    def v1_models_probe_streams_s_history(request: Request) -> Response:
        asked.append((int(request.query_params["from"]), int(request.query_params["limit"])))
        chunks = [{"position": 28, "inputs": [[0.5, 1, 2], [3, 4, 5]]}]
        kept = {"available": [[0, 0], [12, 30]], "snapshots": [0, 12], "start": 10, "next": None}
        return JSONResponse({**head, **kept, "chunks": chunks})

    def v1_models_probe_streams_s_state() -> Response:
        return JSONResponse({**head, "state": {"hidden": [0.5]}})

    def v1_models_probe_streams_s_outputs() -> Response:
        document = json.dumps({**head, "position": 30})
        text = f"event: stream\nid: 30\ndata: {document}\n\n"
        return PlainTextResponse(text, media_type="text/event-stream")

    routes = {
        "v1_models_probe_streams_s_history": v1_models_probe_streams_s_history,
        "v1_models_probe_streams_s_state": v1_models_probe_streams_s_state,
        "v1_models_probe_streams_s_outputs": v1_models_probe_streams_s_outputs,
    }
    async with opened_console(pipeline_server, browser, tmp_path, **routes) as page:
        await page.evaluate("location.hash = '#/models/probe/streams/s'")
        await page.until(f"({facts})['can be rewound to'] !== undefined")
        shown = await page.evaluate(facts)
        assert shown["can be rewound to"] == "0, 12 to 30"
        assert (shown["snapshots"], shown["events from position"]) == ("0, 12", "10")
        assert await page.evaluate(cells) == [["29", "[3,4,5]"], ["28", "[0.5,1,2]"]]
        assert asked == [(10, 20)]
        await page.assert_accessible()
