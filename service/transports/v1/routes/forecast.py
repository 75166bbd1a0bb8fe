"""Forecasts from a stream's state, which is not changed."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from service.access.caller import PREDICT
from service.codec.replies import etag, reply
from service.codec.request_body import receive_body
from service.core.values import StreamKey
from service.server.disconnects import cancel_on_disconnect
from service.transports.v1.context import api_of, caller_of
from service.transports.v1.request_fields import (
    body_media,
    deadline,
    if_match,
    query,
    reply_media,
    stream_name,
)
from service.transports.v1.route import ModelPath, StreamPath


async def post_forecast(request: Request, model: ModelPath, stream: StreamPath) -> Response:
    """The model's decoder starts from the stream's stored state and predicts `horizon` steps ahead.

    Nothing is stored and the stream does not change. The reply has the medians, quantiles of each
    step along them and, with `samples`, drawn paths; the same `seed` draws the same paths from
    the same state. With a `position` the stream has to be at that position, with
    `If-Match` in the state that it names.
    """
    caller, api = caller_of(request), api_of(request)
    codec = api.codec(api.pipeline.model(caller, PREDICT, model, stream))
    deadline_s = deadline(request, api.limits)
    query(request)
    key = StreamKey(codec.served.name, stream_name(stream))
    codec.served.require_decoder()
    media = body_media(request)
    answer = reply_media(request, media)
    precondition = if_match(request)
    body = await receive_body(request, media, deadline_s)
    parameters = await body.read(
        codec.reader.forecast_request, codec.long.forecast_request, key.stream
    )
    parameters = parameters._replace(precondition=precondition)
    forecasting = api.pipeline.forecast(caller, key, parameters, deadline_s)
    forecast = await cancel_on_disconnect(request, forecasting)
    return reply(answer, codec.writer.forecast(forecast, parameters), headers=[etag(forecast.head)])
