"""Liveness, readiness, the report of the store and metrics.

Liveness says that the process answers, and checks nothing else: an unavailable store is no reason
to restart it. Readiness names every check and each one that fails. They answer in JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from service.access.principal import Verb
from service.codec.media import Media
from service.codec.replies import reply
from service.codec.reply_types import Live, Ready, StoreReport
from service.core.errors import CarryError
from service.pipeline.scoped_pipeline import PipelineInterface
from service.transports.v1.context import api_of
from service.transports.v1.openapi import operations

RenderMetrics = Callable[[], tuple[bytes, str]]
"""Returns the body of /metrics and its content type; called in a thread."""

HIDDEN: Final = "needs a key that allows metrics"
"""The detail of a check for those who may not read it."""

router = APIRouter(tags=["health"])


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", summary="Whether the process answers", **operations.LIVE)
async def get_live(_: Request) -> Response:
    """Always 200."""
    document: Live = {"status": "live"}
    return reply(Media.JSON, document)


@cache
def checks_router(pipeline_of: Callable[[Request], PipelineInterface] | None = None) -> APIRouter:
    """The routes /health/ready and /health/store.

    Args:
        pipeline_of: gives the pipeline, whose scope must allow metrics; None for no check.
    """
    checked = APIRouter(tags=["health"])

    @checked.head("/health/ready", include_in_schema=False)
    @checked.get(
        "/health/ready", summary="Whether requests should be sent here", **operations.READY
    )
    async def get_ready(request: Request) -> Response:
        """200 if every check passes, otherwise 503; `failing` names the others."""
        checks = await api_of(request).readiness()
        failing = [check.name for check in checks if not check.ok]
        # a probe has no key, and details have addresses of the store
        hides = pipeline_of is not None and not _allows_metrics(request, pipeline_of)
        document: Ready = {
            "status": "not_ready" if failing else "ready",
            "failing": failing,
            "degraded": [check.name for check in checks if check.degraded],
            "checks": [
                {"name": check.name, "ok": check.ok, "detail": HIDDEN if hides else check.detail}
                for check in checks
            ],
        }
        return reply(Media.JSON, document, 503 if failing else 200)

    @checked.get("/health/store", summary="Each server of the store", **operations.STORE)
    async def get_store(request: Request) -> Response:
        """Always 200: it is a report, not a reason to send requests elsewhere."""
        if pipeline_of is not None:
            pipeline_of(request).require(Verb.METRICS)
        checks = await api_of(request).readiness()
        check = next(each for each in checks if each.name == "store")
        document: StoreReport = {
            "status": "degraded" if check.degraded else "up" if check.ok else "down",
            "detail": check.detail,
            "servers": [
                {"address": each.address, "status": each.status, "detail": each.detail}
                for each in check.servers
            ],
        }
        return reply(Media.JSON, document)

    return checked


def metrics_router(
    render: RenderMetrics, pipeline_of: Callable[[Request], PipelineInterface] | None = None
) -> APIRouter:
    """The route /metrics over a renderer.

    Args:
        pipeline_of: gives the pipeline, whose scope must allow metrics; None for no check.
    """
    metrics = APIRouter(tags=["health"])

    # Not a coroutine: it reads files if several workers share their counters.
    @metrics.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=PlainTextResponse,
        response_description="The metrics.",
    )
    def get_metrics(request: Request) -> Response:
        """Prometheus' text format, of all workers together."""
        if pipeline_of is not None:
            pipeline_of(request).require(Verb.METRICS)
        body, content_type = render()
        return Response(body, headers={"Content-Type": content_type})

    return metrics


def _allows_metrics(request: Request, pipeline_of: Callable[[Request], PipelineInterface]) -> bool:
    try:
        pipeline_of(request).require(Verb.METRICS)
    except CarryError:
        return False
    return True
