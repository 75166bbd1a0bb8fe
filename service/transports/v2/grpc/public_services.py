"""The standard services that need no key: health, and reflection, by which clients find methods."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, Final

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from service.core.errors import CarryError, ShuttingDown
from service.transports.common.failure_log import as_carry_error
from service.transports.v2.grpc.call import ReadingHandler
from service.transports.v2.grpc.infer_requests import SERVICE
from service.transports.v2.grpc.messages import parse
from service.transports.v2.grpc.status import StatusCode
from service.transports.v2.metadata import Metadata

HEALTH: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION: Final = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
SERVICES: Final = (HEALTH, REFLECTION, SERVICE)

_Status = health_pb2.HealthCheckResponse
Run = Callable[[ReadingHandler], Awaitable[None]]


class PublicServices:
    """Answers the calls of these services.

    Attributes:
        methods: what answers a call, by the path of its method.
    """

    def __init__(self, metadata: Metadata):
        self._metadata = metadata
        self._end: CarryError | None = None
        self._is_ready = False
        self._changed = asyncio.Event()
        methods: dict[str, Run] = {
            f"/{HEALTH}/Check": self._check,
            f"/{HEALTH}/Watch": self._watch,
            f"/{REFLECTION}/ServerReflectionInfo": self._reflect,
        }
        self.methods: dict[str, Run] = {
            path: partial(_run, method) for path, method in methods.items()
        }

    def begin_stop(self) -> None:
        """Report to watchers that the server is not ready, and end their calls."""
        self._end = ShuttingDown("the service is stopping")
        self._notify()

    async def _check(self, handler: ReadingHandler) -> None:
        """Whether calls should be sent here; watchers get a change at the next check."""
        request = parse(health_pb2.HealthCheckRequest, await handler.read_only())
        status = await self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            handler.call.end(StatusCode.NOT_FOUND, "the server has no such service")
        else:
            handler.call.respond(_health(status))
            handler.call.end()

    async def _status(self, service: str) -> Any:
        is_ready = self._end is None and (await self._metadata.ready())["ready"]
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            self._notify()
        if service not in ("", SERVICE):
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if is_ready else _Status.NOT_SERVING

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _watch(self, handler: ReadingHandler) -> None:
        request = parse(health_pb2.HealthCheckRequest, await handler.read_only())
        sent = None
        while True:
            changed = self._changed
            status = await self._status(request.service)
            if status != sent:
                sent = status
                handler.call.respond(_health(status))
            if self._end is not None:
                raise self._end.copy()
            await changed.wait()

    async def _reflect(self, handler: ReadingHandler) -> None:
        while (data := await handler.read()) is not None:
            request = parse(reflection_pb2.ServerReflectionRequest, data)
            handler.call.respond(_reflection(request).SerializeToString())
        handler.call.end()


async def _run(method: Run, handler: ReadingHandler) -> None:
    """Run a method; an error ends its call."""
    try:
        await method(handler)
    except Exception as error:
        handler.call.fail(as_carry_error(error))


def _health(status: Any) -> bytes:
    return health_pb2.HealthCheckResponse(status=status).SerializeToString()


def _reflection(
    request: reflection_pb2.ServerReflectionRequest,
) -> reflection_pb2.ServerReflectionResponse:
    """The response to a request of reflection. There are no extensions."""
    response = reflection_pb2.ServerReflectionResponse(original_request=request)
    pool = descriptor_pool.Default()
    try:
        match request.WhichOneof("message_request"):
            case "list_services":
                for name in SERVICES:
                    response.list_services_response.service.add(name=name)
                return response
            case "file_by_filename":
                file = pool.FindFileByName(request.file_by_filename)
            case "file_containing_symbol":
                file = pool.FindFileContainingSymbol(request.file_containing_symbol)
            case "all_extension_numbers_of_type":
                name = request.all_extension_numbers_of_type
                pool.FindMessageTypeByName(name)
                response.all_extension_numbers_response.base_type_name = name
                return response
            case _:
                raise KeyError
    except KeyError:
        response.error_response.error_code = StatusCode.NOT_FOUND
        response.error_response.error_message = "not found"
        return response
    files = {each.name: each.serialized_pb for each in _with_dependencies(file)}
    response.file_descriptor_response.file_descriptor_proto.extend(files.values())
    return response


def _with_dependencies(file: FileDescriptor) -> Iterator[FileDescriptor]:
    yield file
    for each in file.dependencies:
        yield from _with_dependencies(each)
