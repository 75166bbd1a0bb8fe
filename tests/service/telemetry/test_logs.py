"""Logs: one JSON line per event with the request id, from structlog and the standard library."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI

from service.telemetry import logs
from service.telemetry.access_log import access_log
from service.telemetry.logs import configure_logs, current_request_id, flush_logs
from service.transports.v1.request_log import RequestLogMiddleware

PROCESSORS = structlog.get_config()["processors"]
"""Of the tests, as long as no command configures the logs."""


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Restore the loggers of the process after a test that configures them."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    access_log_level = access_log.level
    logs.flush_logs()
    yield
    logs.flush_logs()
    access_log.level = access_log_level
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()
    structlog.configure(PROCESSORS)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    flush_logs()
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_a_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    structlog.get_logger("service.app").info("ready", models=["flights"], warm_s=1.5)
    (line,) = lines(capsys)
    assert list(line)[:4] == ["timestamp", "level", "logger", "message"]
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "service.app",
        "message": "ready",
        "models": ["flights"],
        "warm_s": 1.5,
    }


def test_standard_library_records_are_rendered_alike(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    coloured = {"color_message": "Started server process [\x1b[36m%d\x1b[0m]"}
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 42, extra=coloured)
    logging.getLogger("lib").warning("odd", extra={"size_bytes": 7})
    started, odd = lines(capsys)
    assert started["message"] == "Started server process [42]"
    assert (started["level"], started["logger"]) == ("info", "uvicorn.error")
    assert set(started) == {"timestamp", "level", "logger", "message"}
    assert (odd["level"], odd["size_bytes"]) == ("warning", 7)


def test_configure_logs_is_idempotent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("info")
    configure_logs("warning")
    structlog.get_logger("a").info("quiet")
    logging.getLogger("a").info("quiet")
    structlog.get_logger("a").warning("loud")
    logging.getLogger("a").warning("loud")
    assert [line["message"] for line in lines(capsys)] == ["loud", "loud"]


@pytest.mark.parametrize("source", [structlog.get_logger, logging.getLogger])
def test_a_traceback_is_part_of_its_line(capsys: pytest.CaptureFixture[str], source: Any) -> None:
    configure_logs()
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        source("a").exception("failed")
    (line,) = lines(capsys)
    assert line["level"] == "error"
    assert "ValueError: broken\nin two" in line["exception"]


def test_logging_never_raises(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    log = structlog.get_logger("a")
    log.info("odd", path="\udcff", number=2**70, thing=object(), raw=b"\x00")
    (line,) = lines(capsys)
    assert line["path"] == "\udcff"
    assert line["number"] == 2**70
    assert line["thing"].startswith("<object")


def test_python_warnings_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(True)
        warnings.warn("old", UserWarning, stacklevel=1)
    (line,) = lines(capsys)
    assert (line["level"], line["logger"]) == ("warning", "py.warnings")
    assert "UserWarning: old" in line["message"]


def test_console_format_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "console")
    structlog.get_logger("service.app").info("ready", workers=2)
    logging.getLogger("uvicorn.error").info("Started")
    flush_logs()
    first, second = capsys.readouterr().err.splitlines()
    assert "ready" in first
    assert "workers=2" in first
    assert "Started" in second
    assert not first.startswith("{")


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

    @app.get("/health/ready")
    async def ready() -> None:
        return None

    return app


def client(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://carry.test")


def requests(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [line for line in lines(capsys) if line["logger"] == "service.requests"]


async def test_access_log_names_the_route_and_not_the_stream(
    capsys: pytest.CaptureFixture[str], api: FastAPI
) -> None:
    configure_logs("info")
    async with client(api) as http:
        reply = await http.get("/v1/models/flights/streams/ann@home")
    captured = [line for line in lines(capsys) if not line["logger"].startswith("httpx")]
    inner, line = captured
    assert inner["message"] == "reading"
    assert inner["request_id"] == reply.headers["x-request-id"] == reply.json()["id"]
    assert "ann@home" not in json.dumps(captured)
    assert line.pop("ms") >= 0
    assert line.pop("timestamp")
    assert line == {
        "level": "info",
        "logger": "service.requests",
        "message": "request",
        "received_bytes": 0,
        "sent_bytes": len(reply.content),
        "method": "GET",
        "request_id": reply.headers["x-request-id"],
        "route": "/v1/models/{model}/streams/{stream}",
        "status": 200,
    }
    assert current_request_id() is None


async def test_a_client_request_id_is_kept_if_it_is_a_valid_token(api: FastAPI) -> None:
    async with client(api) as http:
        kept = await http.get("/health/ready", headers={"X-Request-Id": "client-7"})
        for odd in ("two words", "x" * 129, '"quoted"', ""):
            made = await http.get("/health/ready", headers={"X-Request-Id": odd})
            assert len(made.headers["x-request-id"]) == 16
    assert kept.headers.get_list("x-request-id") == ["client-7"]


async def test_concurrent_requests_keep_their_ids(
    capsys: pytest.CaptureFixture[str], api: FastAPI
) -> None:
    configure_logs()
    async with client(api) as http:
        asked = [
            http.get("/v1/models/m/streams/s", headers={"X-Request-Id": f"r{index}"})
            for index in range(20)
        ]
        replies = await asyncio.gather(*asked)
    assert [reply.json()["id"] for reply in replies] == [f"r{index}" for index in range(20)]
    assert {line["request_id"] for line in requests(capsys)} == {f"r{i}" for i in range(20)}


async def test_access_log_uses_the_configured_format_and_level(
    capsys: pytest.CaptureFixture[str], api: FastAPI
) -> None:
    configure_logs("info", "console")
    async with client(api) as http:
        await http.get("/v1/models/m/streams/ann", headers={"X-Request-Id": "mine"})
    flush_logs()
    line = next(line for line in capsys.readouterr().err.splitlines() if "status=200" in line)
    for part in ("[info", "request", "request_id=mine", "route=/v1/models/{model}/streams"):
        assert part in line
    assert re.match(r"[0-9-]{10}T[0-9:.]{8,15}Z ", line)
    configure_logs("warning")
    async with client(api) as http:
        await http.get("/v1/models/m/streams/ann")
    flush_logs()
    assert requests(capsys) == []
