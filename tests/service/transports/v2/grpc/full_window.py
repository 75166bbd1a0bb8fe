"""Fills the window of one ModelStreamInfer call, and prints what was read and answered, as JSON.

    python -m tests.service.transports.v2.grpc.full_window [stop]

A process of its own, since Triton's client registers the same messages. With `stop` the service
stops while the window is full.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import uvloop

from service.core.errors import CarryError, ShuttingDown
from service.transports.v2.grpc import v2_pb2 as pb
from service.transports.v2.grpc.incoming import InferMessage
from service.transports.v2.grpc.infer_stream import InferStream
from service.transports.v2.grpc.message_admission import MessageAdmission

WINDOW = 64
UNLIMITED = MessageAdmission(2**40, 2**20, 60.0)


class Call:
    """A call with twice as many requests as its window, each of its own sequence."""

    def __init__(self) -> None:
        self.read = 0
        self.answered: list[int] = []
        self.may_answer = asyncio.Event()
        self.stopping = asyncio.Event()
        self.is_shut_down = False

    async def requests(self) -> AsyncIterator[bytes]:
        for number in range(2 * WINDOW):
            self.read += 1
            request = pb.ModelInferRequest(model_name="m", id=str(number))
            request.parameters["sequence_id"].int64_param = number + 1
            yield request.SerializeToString()

    async def infer(self, message: InferMessage) -> pb.ModelInferResponse:
        await self.may_answer.wait()
        return pb.ModelInferResponse(model_name="m", id=message.head.id)

    async def answer(
        self, model: str, work: Callable[[], Awaitable[pb.ModelInferResponse]]
    ) -> pb.ModelInferResponse | CarryError:
        return await work()

    async def run(self) -> None:
        stream = InferStream(self.infer, self.answer, UNLIMITED, WINDOW, self.stopping)
        try:
            async for response in stream.responses(self.requests()):
                self.answered.append(int(response.infer_response.id))
        except ShuttingDown:
            self.is_shut_down = True


async def run_turns() -> None:
    """Let every task run as far as it can."""
    for _ in range(10 * WINDOW):
        await asyncio.sleep(0)


async def fill_window(stops: bool) -> dict[str, object]:
    """What was read and answered: the window is full, the service may stop, then answers come."""
    call = Call()
    running = asyncio.create_task(call.run())
    await run_turns()
    unanswered = call.read
    if stops:
        call.stopping.set()
        await run_turns()
    call.may_answer.set()
    await running
    return {
        "unanswered": unanswered,
        "answered": call.answered,
        "is_shut_down": call.is_shut_down,
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(fill_window("stop" in sys.argv))))
