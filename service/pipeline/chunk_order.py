"""Applies chunks of many streams, the items of one request, in order within each stream."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from service.core.errors import (
    AlreadyApplied,
    CarryError,
    InvalidInput,
    PositionBehind,
    PreviousFailed,
)
from service.core.values import Chunk, Reply

Submit = Callable[[list[Chunk]], Awaitable[list[Reply | CarryError]]]
"""Applies chunks of different streams together."""


async def apply_in_order(
    items: Sequence[Chunk | CarryError], submit: Submit
) -> list[Reply | CarryError]:
    """Apply items, as `Pipeline.process_many` does; returns their outcomes."""
    chunks = [item for item in items if isinstance(item, Chunk)]
    if len({chunk.key.stream for chunk in chunks}) == len(items):
        # no item waits for another one
        return [
            _locate(result, index) if isinstance(result, CarryError) else result
            for index, result in enumerate(await submit(chunks))
        ]
    results: dict[int, Reply | CarryError] = {}
    blocking: dict[str | None, CarryError] = {}
    waiting = list(enumerate(items))
    while waiting:
        # apply the first item of each stream that is not blocked, all of them together
        runnable: dict[str | None, tuple[int, Chunk]] = {}
        behind: list[tuple[int, Chunk | CarryError]] = []
        for index, item in waiting:
            stream = item.key.stream if isinstance(item, Chunk) else _stream_of(item)
            if stream in runnable:
                behind.append((index, item))
                continue
            if not isinstance(item, Chunk):
                results[index] = item
                # an item without a stream name blocks no other item
                if stream is not None:
                    blocking[stream] = item
                continue
            failed = blocking.get(stream)
            blocked = None if failed is None else _blocked_by(item, failed)
            if blocked is None:
                runnable[stream] = index, item
                continue
            results[index] = blocked
            if not item.dry_run:
                blocking[stream] = blocked
        chunks = [chunk for _, chunk in runnable.values()]
        applied = await submit(chunks) if chunks else []
        for (index, item), result in zip(runnable.values(), applied, strict=True):
            if isinstance(result, CarryError):
                result = _locate(result, index)
                if not item.dry_run:
                    blocking[item.key.stream] = result
            results[index] = result
        waiting = behind
    return [results[index] for index in range(len(items))]


def _locate(error: CarryError, index: int) -> CarryError:
    """The error of an item; one about its values gets the item's place in the request."""
    return error.within(f"chunks[{index}]") if isinstance(error, InvalidInput) else error


def _blocked_by(chunk: Chunk, failed: CarryError) -> PreviousFailed | None:
    """The error of a chunk behind a failed item of its stream; None if it may be applied."""
    if isinstance(failed, AlreadyApplied | PositionBehind) and chunk.position is not None:
        return None
    first = failed.facts.get("previous", failed.code)
    return PreviousFailed(
        f"an earlier item of stream {chunk.key.stream!r} failed with {first}",
        stream=chunk.key.stream,
        previous=first,
    )


def _stream_of(error: CarryError) -> str | None:
    """The stream of an item that could not be parsed; None if it is not known."""
    stream = error.facts.get("stream")
    return stream if isinstance(stream, str) else None
