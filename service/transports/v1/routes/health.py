"""Liveness, readiness, the report of the store and metrics.

Liveness says that the process answers, and checks nothing else: an unavailable store is no reason
to restart it. Readiness names every check and each one that fails. They answer in JSON.
The admin port has these routes too; it requires no key.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from service.access.caller import Verb
from service.codec.media import Media
from service.core.errors import CarryError
from service.transports.v1.context import api_of, caller_of
from service.transports.v1.replies import reply
from service.transports.v1.reply_types import Live, Ready, StoreReport

HIDDEN: Final = "needs a key that allows metrics"
"""The detail of a check for those who may not read it."""


async def get_live(_: Request) -> Response:
    """Whether the process answers.

    Always 200.
    """
    document: Live = {"status": "live"}
    return reply(Media.JSON, document)


async def get_ready(request: Request) -> Response:
    """Whether requests should be sent here.

    200 if every check passes, otherwise 503; `failing` names the others.
    """
    checks = await api_of(request).pipeline.readiness()
    failing = [check.name for check in checks if not check.ok]
    # a probe has no key, and details have addresses of the store
    hides = not _allows_metrics(request)
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


async def get_store(request: Request) -> Response:
    """Each server of the store.

    Always 200: it is a report, not a reason to send requests elsewhere.
    """
    caller_of(request).check((Verb.METRICS,))
    checks = await api_of(request).pipeline.readiness()
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


async def get_metrics(request: Request) -> Response:
    """Metrics for Prometheus.

    Prometheus' text format, of all workers together.
    """
    caller_of(request).check((Verb.METRICS,))
    # in a thread: it reads files if several workers share their counters
    body, content_type = await asyncio.to_thread(request.app.state.render_metrics)
    return Response(body, headers={"Content-Type": content_type})


def _allows_metrics(request: Request) -> bool:
    try:
        caller_of(request).check((Verb.METRICS,))
    except CarryError:
        return False
    return True
