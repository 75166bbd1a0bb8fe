"""Logs: JSON lines of structlog and the standard library with the request id; their writer."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI

from service.telemetry import logs
from service.telemetry.access_log import RequestFacts, access_log
from service.telemetry.logs import (
    MAX_BUFFERED_LINES,
    StderrWriter,
    configure_logs,
    current_request_id,
    flush_logs,
)
from service.transports.v1.request_log import RequestLogMiddleware

REPOSITORY = Path(__file__).resolve().parents[3]
PROCESSORS = structlog.get_config()["processors"]
"""Of the tests, as long as no command configures the logs."""

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Restore the loggers of the process after a test that configures them."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    access_log_level = access_log.level
    flush_logs()
    yield
    flush_logs()
    access_log.level = access_log_level
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()
    structlog.configure(PROCESSORS)


def lines(capsys: Capture) -> list[dict[str, Any]]:
    flush_logs()
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_lines_of_all_loggers_are_rendered_alike(capsys: Capture) -> None:
    configure_logs()
    structlog.get_logger("service.app").info("ready", models=["flights"], warm_s=1.5)
    coloured = {"color_message": "Started server process [\x1b[36m%d\x1b[0m]"}
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 42, extra=coloured)
    logging.getLogger("lib").warning("odd", extra={"size_bytes": 7})
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(False)
        configure_logs()
        warnings.warn("old", UserWarning, stacklevel=1)
    ready, started, odd, warning = lines(capsys)
    assert list(ready)[:4] == ["timestamp", "level", "logger", "message"]
    assert ready.pop("timestamp").endswith("Z")
    names = {"level": "info", "logger": "service.app", "message": "ready"}
    assert ready == {**names, "models": ["flights"], "warm_s": 1.5}
    assert started["message"] == "Started server process [42]"
    assert (started["level"], started["logger"]) == ("info", "uvicorn.error")
    assert set(started) == {"timestamp", "level", "logger", "message"}
    assert (odd["level"], odd["size_bytes"]) == ("warning", 7)
    assert (warning["level"], warning["logger"]) == ("warning", "py.warnings")
    assert "UserWarning: old" in warning["message"]


def test_logs_can_be_configured_again(capsys: Capture) -> None:
    configure_logs("info")
    configure_logs("warning")
    for logger in (structlog.get_logger("a"), logging.getLogger("a")):
        logger.info("quiet")
        logger.warning("loud")
    assert [line["message"] for line in lines(capsys)] == ["loud", "loud"]


@pytest.mark.parametrize("source", [structlog.get_logger, logging.getLogger])
def test_a_traceback_is_part_of_its_line(capsys: Capture, source: Any) -> None:
    configure_logs()
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        source("a").exception("failed")
    (line,) = lines(capsys)
    assert line["level"] == "error"
    assert "ValueError: broken\nin two" in line["exception"]


def test_logging_never_raises(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    configure_logs()
    log = structlog.get_logger("a")
    log.info("odd", path="\udcff", number=2**70, thing=object(), raw=b"\x00")
    (line,) = lines(capsys)
    assert line["path"] == "\udcff"
    assert line["number"] == 2**70
    assert line["thing"].startswith("<object")
    monkeypatch.setattr(access_log, "name_stream", str)
    access_log.log("id", "GET", "/", 200, 1.0, RequestFacts(stream="\udcff"))
    (line,) = lines(capsys)
    assert (line["stream"], "code" in line) == ("\udcff", False)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    log.info("lost")


async def _unexpected(error: Exception, *_: Any) -> None:
    raise error


@pytest.fixture
def api() -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestLogMiddleware, answer_failure=_unexpected)

    @app.get("/v1/models/{model}/streams/{stream}")
    async def read(model: str, stream: str) -> dict[str, str | None]:
        structlog.get_logger("inner").info("reading")
        return {"id": current_request_id()}

    return app


def client(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://carry.test")


PATH = "/v1/models/flights/streams/ann@home"


def test_requests_of_httpx_are_not_logged_since_a_path_may_be_secret(capsys: Capture) -> None:
    configure_logs("info")
    logging.getLogger("httpx").info("HTTP Request: POST https://hooks.test/secret")
    logging.getLogger("httpx").warning("failed")
    assert [line["message"] for line in lines(capsys)] == ["failed"]


async def test_requests_keep_valid_ids_of_clients(capsys: Capture, api: FastAPI) -> None:
    configure_logs()
    ids = [f"r{index}" for index in range(20)]
    async with client(api) as http:
        asked = [http.get(PATH, headers={"X-Request-Id": request_id}) for request_id in ids]
        replies = await asyncio.gather(*asked)
        for odd in ("two words", "x" * 129, '"quoted"', ""):
            made = await http.get(PATH, headers={"X-Request-Id": odd})
            assert len(made.headers["x-request-id"]) == 16
    assert [reply.json()["id"] for reply in replies] == ids
    assert [reply.headers.get_list("x-request-id") for reply in replies] == [[i] for i in ids]
    written = [line for line in lines(capsys) if line["logger"] == "service.requests"]
    assert {line["request_id"] for line in written[:20]} == set(ids)


async def test_format_and_level_are_those_of_the_settings(capsys: Capture, api: FastAPI) -> None:
    configure_logs("info", "console")
    logging.getLogger("uvicorn.error").info("Started")
    async with client(api) as http:
        await http.get(PATH, headers={"X-Request-Id": "mine"})
    flush_logs()
    written = capsys.readouterr().err.splitlines()
    assert "Started" in written[0]
    assert not written[0].startswith("{")
    line = next(line for line in written if "status=200" in line)
    for part in ("[info", "request", "request_id=mine", "route=/v1/models/{model}/streams"):
        assert part in line
    assert re.match(r"[0-9-]{10}T[0-9:.]{8,15}Z ", line)
    configure_logs("warning")
    async with client(api) as http:
        await http.get(PATH)
    assert lines(capsys) == []


def written(capsys: Capture) -> list[str]:
    return capsys.readouterr().err.splitlines()


async def test_lines_are_buffered_in_their_order(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FLUSH_INTERVAL_S", 0)
    stderr = StderrWriter()
    stderr.buffer("one")
    stderr.buffer("two")
    assert written(capsys) == []
    stderr.write("three")
    assert written(capsys) == ["one", "two", "three"]
    for text in ("first", "second"):
        stderr.buffer(text)
        assert written(capsys) == []
        done = asyncio.Event()
        asyncio.get_running_loop().call_later(0, done.set)
        await done.wait()
        assert written(capsys) == [text]
    expected = [str(number) for number in range(MAX_BUFFERED_LINES)]
    for text in expected[:-1]:
        stderr.buffer(text)
    assert written(capsys) == []
    stderr.buffer(expected[-1])
    assert written(capsys) == expected


def test_lines_are_written_immediately_without_an_event_loop(capsys: Capture) -> None:
    StderrWriter().buffer("now")
    assert written(capsys) == ["now"]


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_buffered_lines_are_flushed_at_exit(end: str) -> None:
    program = f"""
import uvloop
from service.telemetry.logs import StderrWriter

async def main():
    StderrWriter().buffer("last words")
    {end}

uvloop.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=60
    )
    assert b"last words\n" in ended.stderr


async def test_lines_of_several_threads_keep_their_order(capsys: Capture) -> None:
    stderr = StderrWriter()

    def write(name: str) -> None:
        for at in range(200):
            stderr.write(f"{name}{at}")

    others = [threading.Thread(target=write, args=name) for name in "ab"]
    for thread in others:
        thread.start()
    for at in range(200):
        stderr.buffer(f"c{at}")
    for thread in others:
        thread.join()
    stderr.flush()
    found = written(capsys)
    for name in "abc":
        assert [text for text in found if text[0] == name] == [f"{name}{at}" for at in range(200)]
    assert len(found) == 600


async def test_failure_after_the_response_started_is_left_to_the_server() -> None:
    answered: list[Exception] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        raise ZeroDivisionError

    async def answer(error: Exception, *_: Any) -> None:
        answered.append(error)

    async def ignore(_: Any) -> None:
        pass

    middleware = RequestLogMiddleware(app, answer)
    with pytest.raises(ZeroDivisionError):
        await middleware({"type": "http", "method": "GET", "headers": []}, ignore, ignore)
    assert not answered
