"""The errors of HTTP itself, below those of `service/core/errors.py`."""

from __future__ import annotations

from service.core.errors import BadRequest, NotFound, ServiceFailure


class MalformedRequest(BadRequest):
    code = "malformed_request"
    title = "The head or the framing of the request is malformed or ambiguous"
    remedy = "Send HTTP/1.1 with one Host. The connection is closed; later bytes were not read."


class DuplicateField(BadRequest):
    code = "duplicate_field"
    title = "A header or a query parameter is given more than once"
    remedy = "Send it once; the service does not guess which value was meant."


class HeadTooLarge(BadRequest):
    code = "head_too_large"
    status = 431
    title = "The head of the request is too large"
    remedy = "Send fewer and shorter headers, and a shorter address."


class ExpectationFailed(BadRequest):
    code = "expectation_failed"
    status = 417
    title = "The Expect header is not supported"
    remedy = "Send `Expect: 100-continue`, or none."


class RequestTimeout(BadRequest):
    code = "request_timeout"
    status = 408
    title = "The request did not arrive in time"
    retryable = True
    remedy = "Send it without pauses; the limits are CARRY_HEAD_TIMEOUT_S and CARRY_BODY_TIMEOUT_S."


class UpgradeRequired(BadRequest):
    code = "upgrade_required"
    status = 426
    title = "The address serves WebSockets only"
    remedy = (
        "Connect with a WebSocket client, version 13, over HTTP/1.1; a proxy must pass Upgrade on."
    )


class OriginNotAllowed(BadRequest):
    code = "origin_not_allowed"
    status = 403
    title = "Pages of this origin may not send this request"
    remedy = (
        "Serve the page from the service's own host, or name its origin in CARRY_WEBSOCKET_ORIGINS."
    )


class HostNotAllowed(BadRequest):
    code = "host_not_allowed"
    status = 421
    title = "The Host header does not name this service"
    remedy = (
        "Use localhost or 127.0.0.1 on the service's own machine; behind a proxy, name the host of "
        "its requests in CARRY_ALLOWED_HOSTS."
    )


class RouteNotFound(NotFound):
    code = "not_found"
    title = "No such address"
    remedy = "GET /docs lists the addresses."


class MethodNotAllowed(NotFound):
    code = "method_not_allowed"
    status = 405
    title = "The address does not support this method"
    remedy = "Use one of the methods in the Allow header."


class TooManyConnections(ServiceFailure):
    code = "too_many_connections"
    status = 503
    title = "The worker has reached its limit of connections"
    retryable = True
    remedy = "Send it again later; keep fewer connections open, or raise CARRY_MAX_CONNECTIONS."
