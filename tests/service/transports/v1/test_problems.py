"""Problem documents: every code can be had, and what nobody expected stays inside."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.access.caller import Caller
from service.core import errors
from service.core.errors import CarryError, leaf_errors
from service.core.values import Chunk
from service.pipeline.pipeline import OnReply
from service.transports.v1.pages import reference_html
from tests.docs.errors_reference import errors_tables
from tests.service.transports.v1.harness import Harness, harness, problem, rows
from tests.support.servers import RealServer

ROOT = Path(__file__).parents[4]
BODY = {"position": 0, "inputs": rows(1).tolist()}


def test_every_error_has_a_code_of_its_own_and_a_status_of_its_branch() -> None:
    leaves = list(leaf_errors())
    assert len({kind.code for kind in leaves}) == len(leaves)
    for kind in leaves:
        assert kind.title, kind
        assert kind.remedy, kind
        failed = issubclass(kind, errors.ServiceFailure) and not issubclass(kind, errors.Overloaded)
        assert (kind.status >= 500) == failed
        assert 400 <= kind.status < 600


def test_the_reference_is_current() -> None:
    page = (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8")
    assert page.endswith(errors_tables()), "update the page: python -m tests.docs.errors_reference"
    for kind in leaf_errors():
        assert f'id="{kind.code}"' in reference_html()


async def test_every_error_of_the_pipeline_becomes_its_problem(
    api: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in leaf_errors():
        error = kind("expected one thing, got another", stream="s", position=7, status="mine")

        async def fail(*_: object, error: CarryError = error) -> None:
            raise error

        def fail_later(
            caller: Caller,
            chunk: Chunk,
            deadline_s: float,
            on_result: OnReply,
            error: CarryError = error,
        ) -> SimpleNamespace:
            asyncio.get_running_loop().call_soon(on_result, error)
            return SimpleNamespace(payload=chunk)

        monkeypatch.setattr(api.pipeline, "process", fail)
        monkeypatch.setattr(api.pipeline, "enqueue", fail_later)
        document = problem(await api.chunk(BODY), kind.status, kind.code)
        assert document["detail"] == "expected one thing, got another"
        assert document["title"] == kind.title
        assert document["retryable"] is kind.retryable
        assert (document["stream"], document["position"]) == ("s", 7)
        assert api.counts.seen[kind.code] == 1


async def test_failures_are_logged_and_rejections_are_not(
    api: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    problem(await api.chunk({**BODY, "position": 3}), 409, "position_ahead")
    assert "position_ahead" not in capsys.readouterr().out
    api.store.away = errors.StoreRefused("out of memory")
    problem(await api.chunk(BODY), 503, "store_refused")
    logged = capsys.readouterr().out
    assert "store_refused" in logged
    assert "out of memory" in logged


async def test_store_errors_become_problems(api: Harness) -> None:
    for error in (
        errors.StoreUnavailable("no answer", retry_after_s=2.2),
        errors.StoreRefused("out of memory"),
    ):
        api.store.away = error
        response = await api.chunk(BODY)
        problem(response, 503, error.code)
    assert response.headers["retry-after"] == "1"
    api.store.away = errors.StoreUnavailable("no answer", retry_after_s=2.2)
    assert (await api.client.get("/v1/models/probe/streams/s")).headers["retry-after"] == "3"


async def test_outputs_that_are_not_finite_become_a_problem(api: Harness) -> None:
    steep = api.models["probe"].weights["heads.steep.kernel"][:, 0]
    response = await api.chunk({"position": 0, "inputs": [(1e4 * np.sign(steep)).tolist()]})
    assert problem(response, 500, "output_not_finite")["stream"] == "s"
    assert api.position() is None
    assert (await api.chunk(BODY)).status_code == 200


async def test_a_full_queue_and_a_stopping_service_reject_chunks(
    pipeline_server: RealServer, models: Mapping[str, Artifact]
) -> None:
    async with harness(pipeline_server, models, max_queue=0) as full:
        response = await full.chunk(BODY)
        problem(response, 429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
    async with harness(pipeline_server, models) as stopping:
        await stopping.pipeline.stop()
        problem(await stopping.chunk(BODY), 503, "shutting_down")


async def test_a_long_body_is_rejected_undecoded_if_the_queue_is_full(
    pipeline_server: RealServer, models: Mapping[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.transports.v1.call.LONG_BYTES", 1)
    async with harness(pipeline_server, models, max_queue=0, fast_path=False) as full:
        problem(await full.chunk(b"{"), 429, "overloaded")
        many = await full.client.post("/v1/models/probe/chunks", content=b"{")
        problem(many, 429, "overloaded")
        predicted = await full.client.post("/v1/models/probe/predict", content=b"{")
        problem(predicted, 400, "malformed_body")


async def test_unexpected_exceptions_reveal_no_internals(
    api: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    api.store.away = ZeroDivisionError("secret words")
    response = await api.client.get("/v1/models/probe/streams/s")
    document = problem(response, 500, "internal_error")
    assert document["retryable"] is True
    assert "retry_after_s" not in document
    assert "secret" not in response.text
    assert "ZeroDivisionError" not in response.text
    logged = capsys.readouterr().out
    assert "secret words" in logged
    assert document["request_id"] in logged
    assert api.counts.seen["internal_error"] == 1


async def test_unknown_paths_and_methods_become_problems(api: Harness) -> None:
    for address in ("/", "/v1", "/v2/models", "/v1/models/", "/v1/models/probe/streams/a/b/c"):
        document = problem(await api.client.get(address), 404, "not_found")
        assert address in document["detail"]
    for method, address, allowed in (
        ("POST", "/v1/models", ["GET"]),
        ("PATCH", "/v1/models/probe/streams/s", ["DELETE", "GET"]),
        ("POST", "/v1/models/probe/streams/s/state", ["GET", "PUT"]),
        ("GET", "/v1/models/probe/predict", ["POST"]),
    ):
        response = await api.client.request(method, address)
        document = problem(response, 405, "method_not_allowed")
        assert response.headers["allow"] == ", ".join(allowed)
        assert document["expected"] == allowed
