"""The standard services beside V2's: health, for the whole server and for V2's, and reflection.

They need no key. Their handlers receive the messages, so that `CallAdmission` can admit them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from service.core.errors import CarryError, MalformedBody
from service.transports.v2.grpc.call_admission import CallAdmission
from service.transports.v2.grpc.servicer import (
    SERVICE,
    InferenceServicer,
    abort,
    parse_short,
    serialize,
)

SERVICES: Final = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)


class PublicServices:
    """Health, whose answer is the readiness of the HTTP API, and reflection."""

    def __init__(self, servicer: InferenceServicer, calls: CallAdmission):
        self._servicer = servicer
        self._calls = calls
        self._health = health.aio.HealthServicer()
        self._reflection = reflection.aio.ReflectionServicer(SERVICES)

    def handlers(self) -> dict[str, Mapping[str, grpc.RpcMethodHandler[Any, Any]]]:
        """The handlers of each service's methods."""
        return {
            health.SERVICE_NAME: {
                "Check": grpc.stream_unary_rpc_method_handler(
                    self._check, response_serializer=serialize
                ),
                "Watch": grpc.stream_stream_rpc_method_handler(
                    self._watch, response_serializer=serialize
                ),
            },
            reflection.SERVICE_NAME: {
                "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
                    self._reflect, response_serializer=serialize
                )
            },
        }

    async def begin_stop(self) -> None:
        """Report from now on that the server is not ready."""
        await self._health.enter_graceful_shutdown()

    async def _check(self, requests: object, context: Any) -> health_pb2.HealthCheckResponse:
        """Whether calls should be sent here; watchers get a change at the next check."""
        try:
            data = await self._calls.receive_probe(context)
            request = parse_short(health_pb2.HealthCheckRequest, data)
            is_ready = await self._servicer.is_ready()
        except CarryError as error:
            await abort(context, error)
        status = health_pb2.HealthCheckResponse.ServingStatus.Value(
            "SERVING" if is_ready else "NOT_SERVING"
        )
        for name in ("", SERVICE):
            await self._health.set(name, status)
        return await self._health.Check(request, context)

    async def _watch(self, requests: object, context: Any) -> None:
        try:
            async with self._calls.public_stream(context, has_key=self._servicer.has_key(context)):
                data = await self._calls.receive_public(context.read)
                request = parse_short(health_pb2.HealthCheckRequest, data)
                await self._health.Watch(request, context)
        except CarryError as error:
            await abort(context, error)

    async def _reflect(self, requests: object, context: Any) -> None:
        try:
            async with self._calls.public_stream(context, has_key=self._servicer.has_key(context)):
                # an async generator, which the types of the library say it is not
                answers: Any = self._reflection.ServerReflectionInfo(
                    self._requests(context), context
                )
                async for answer in answers:
                    await context.write(answer)
        except CarryError as error:
            await abort(context, error)

    async def _requests(
        self, context: Any
    ) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        while True:
            try:
                data = await self._calls.receive_public(context.read)
            except MalformedBody:
                return  # the client has sent all
            yield parse_short(reflection_pb2.ServerReflectionRequest, data)
