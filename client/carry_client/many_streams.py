"""One chunk for each of many streams of a model, in requests of at most `STREAMS_PER_REQUEST`.

A request that is too long for the service is sent again in halves.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, Final

from carry_client.calls import LOG, Attempts, Call, Sleep
from carry_client.chunks import Chunk
from carry_client.errors import (
    AlreadyApplied,
    BodyTooLarge,
    CarryError,
    Problem,
    StreamMoved,
    read_problem,
)
from carry_client.models import ModelCore
from carry_client.replies import Reply, unreadable
from carry_client.steps import to_steps
from carry_client.streams import OTHER_HEAD, StreamCore
from carry_client.types import Events

STREAMS_PER_REQUEST: Final = 256


def send_many(
    model: ModelCore, chunks: Sequence[tuple[StreamCore, Events]], params: Mapping[str, str]
) -> Call[dict[str, Reply | CarryError]]:
    """Send one chunk to each of many streams; see `Model.send_many`."""
    names = Counter(stream.name for stream, _ in chunks)
    others = {stream.model.name for stream, _ in chunks} - {model.name}
    if others:
        raise ValueError(f"expected streams of model {model.name!r}, got some of {others}")
    if len(names) < len(chunks):
        twice = [name for name, count in names.items() if count > 1]
        raise ValueError(f"expected each stream once, got twice: {twice[:3]}")
    with ExitStack() as stack:
        for stream, _ in chunks:
            stack.enter_context(stream.in_use())
        return (yield from _deliver(model, chunks, params))


def _deliver(
    model: ModelCore, chunks: Sequence[tuple[StreamCore, Events]], params: Mapping[str, str]
) -> Call[dict[str, Reply | CarryError]]:
    """The outcomes by name, in the order of the streams."""
    waiting: dict[StreamCore, Chunk] = {}
    outcomes: dict[str, Reply | CarryError] = {}
    steps = [to_steps(events) for _, events in chunks]
    for each in steps:
        yield from model.check_rows(each)
    for (stream, _), each in zip(chunks, steps, strict=True):
        try:
            head = yield from stream.known_head()
        except StreamMoved as error:
            outcomes[stream.name] = error
        else:
            stream.is_uncertain = True
            waiting[stream] = Chunk(head.position, each)
    limit = min(STREAMS_PER_REQUEST, (yield from model.description()).max_items)
    attempts = Attempts(model.session)
    while waiting:
        some = dict(islice(waiting.items(), limit))
        try:
            results = yield from _attempt(model, some, params, attempts)
        except BodyTooLarge as problem:
            if len(some) == 1:
                outcomes.update({stream.name: problem for stream in some})
                del waiting[next(iter(some))]
            limit = max(1, len(some) // 2)
            continue
        except Problem as problem:
            outcomes.update({stream.name: problem for stream in waiting})
            break
        failed: Problem | None = None
        for (stream, chunk), result in zip(some.items(), results, strict=True):
            outcome = yield from _read_outcome(stream, chunk, result, params)
            outcomes[stream.name] = outcome
            del waiting[stream]
            if isinstance(outcome, Problem) and outcome.is_retryable:
                failed, waiting[stream] = outcome, chunk
        if failed is not None:
            try:
                delay_s = attempts.next_delay_s(failed)
            except Problem:
                break
            yield Sleep(delay_s)
    return {stream.name: outcomes[stream.name] for stream, _ in chunks}


def _attempt(
    model: ModelCore,
    chunks: Mapping[StreamCore, Chunk],
    params: Mapping[str, str],
    attempts: Attempts,
) -> Call[list[Any]]:
    """The results of a request for many streams."""
    items = []
    for stream, chunk in chunks.items():
        head = stream.head
        match = {"if_match": head.etag} if head is not None and head.epoch else {}
        items.append(
            {"stream": stream.name, "position": chunk.start, **match, **stream.member(chunk)}
        )
    path = f"{model.path}/chunks"
    body = {"chunks": items}
    document = yield from model.session.request(
        "POST", path, body, params=params, attempts=attempts
    )
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, list) or len(results) != len(items):
        raise unreadable(ValueError(f"expected {len(items)} results"), document)
    return results


def _read_outcome(
    stream: StreamCore, chunk: Chunk, result: Any, params: Mapping[str, str]
) -> Call[Reply | CarryError]:
    """The outcome of one item; a stream that is elsewhere is recovered by itself."""
    try:
        if "error" not in result:
            return (yield from stream.accept_reply(chunk, result["reply"], params))
        problem = read_problem(int(result["status"]), result["error"])
        if isinstance(problem, AlreadyApplied):
            stream.accept(chunk, problem.head)
        if isinstance(problem, OTHER_HEAD):
            return (yield from stream.deliver(chunk, params))
        if problem.is_retryable:
            LOG.info("stream %r: %s", stream.name, problem)
        return problem
    except CarryError as error:
        return error
    except (KeyError, TypeError, ValueError) as error:
        return unreadable(error, result)
