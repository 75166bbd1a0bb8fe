"""Each use case of the pipeline checks the verbs, models and streams of its caller first."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.access.caller import ANYONE, Caller, Verb
from service.access.limits import KeyLimiters, KeyLimits
from service.core.errors import CarryError, Forbidden, LimitExceeded
from service.core.values import Feed, ForecastRequest, StreamKey
from service.pipeline.pipeline import Pipeline
from service.pipeline.watching import Watches
from service.store.redis.redis_store import RedisStore
from service.store.settings import StoreSettings
from tests.support.pipelines import Counts, chunk_of, rows_of, send, sequence_of, worker

MODEL, STREAM = "probe", "acme:1"
KEY = StreamKey(MODEL, STREAM)
ROWS = rows_of(np.random.default_rng(2), 1)

UseCase = Callable[[Pipeline, Watches, Caller], Awaitable[object]]


async def admit(pipeline: Pipeline, watches: Watches, caller: Caller) -> None:
    rejection = pipeline.check_admission(caller, MODEL, KEY, 60)
    if rejection is not None:
        raise rejection


async def process_one_of_many(pipeline: Pipeline, watches: Watches, caller: Caller) -> None:
    (result,) = await pipeline.process_many(caller, [chunk_of(STREAM, ROWS)])
    if isinstance(result, CarryError):
        raise result


async def restore(pipeline: Pipeline, watches: Watches, caller: Caller) -> None:
    served = pipeline.models[MODEL]
    await pipeline.streams.restore(
        caller,
        KEY,
        feed=Feed.INPUTS,
        position=1,
        fingerprint=served.fingerprint,
        state=served.initial,
        precondition=None,
    )


async def watch(pipeline: Pipeline, watches: Watches, caller: Caller) -> None:
    async with watches.watch(caller, KEY, None):
        pass


async def describe(pipeline: Pipeline, watches: Watches, caller: Caller) -> None:
    names = list(pipeline.describe(caller))
    assert names == ([MODEL] if caller.covers_model(MODEL) else [])


USE_CASES: Mapping[str, tuple[set[Verb], UseCase]] = {
    "check_admission": ({Verb.PREDICT}, admit),
    "process": ({Verb.PREDICT}, lambda p, _, c: p.process(c, chunk_of(STREAM, ROWS))),
    "process_many": ({Verb.PREDICT}, process_one_of_many),
    "forecast": ({Verb.PREDICT}, lambda p, _, c: p.forecast(c, KEY, ForecastRequest(1))),
    "read": ({Verb.PREDICT, Verb.LIST}, lambda p, _, c: p.streams.read(c, KEY)),
    "read_state": ({Verb.READ_STATE}, lambda p, _, c: p.streams.read_state(c, KEY)),
    "delete": ({Verb.DELETE}, lambda p, _, c: p.streams.delete(c, KEY)),
    "page": ({Verb.LIST}, lambda p, _, c: p.streams.page(c, MODEL, STREAM, None, 9)),
    "delete_prefix": ({Verb.DELETE}, lambda p, _, c: p.streams.delete_prefix(c, MODEL, STREAM)),
    "restore": ({Verb.WRITE_STATE}, restore),
    "fork": ({Verb.FORK}, lambda p, _, c: p.streams.fork(c, KEY, "acme:2", None)),
    "watch": ({Verb.WATCH}, watch),
}
"""What names a stream, and the verbs of which it needs one."""

OF_MODELS: Mapping[str, tuple[set[Verb], UseCase]] = {
    "predict": ({Verb.PREDICT}, lambda p, _, c: p.predict(c, MODEL, [sequence_of(ROWS)])),
    "describe": ({Verb.MODELS}, describe),
}


def caller(
    *verbs: Verb, models: tuple[str, ...] = ("*",), prefix: str = "", **options: Any
) -> Caller:
    return Caller("0" * 12, "test", frozenset(verbs or Verb), models, prefix, **options)


@pytest.fixture
async def parts(store_url: str, artifact: Artifact) -> AsyncIterator[tuple[Pipeline, Watches]]:
    store = RedisStore(StoreSettings(store_url, store_wait_s=60))
    async with worker(store_url, artifact, store=store) as pipeline:
        await store.outputs.start()
        yield pipeline, Watches(store, store.outputs, Counts())
        await store.outputs.close()


@pytest.mark.parametrize("name", [*USE_CASES, *OF_MODELS])
async def test_use_case_needs_a_verb_the_model_and_the_stream(
    parts: tuple[Pipeline, Watches], name: str
) -> None:
    needed, use = (USE_CASES | OF_MODELS)[name]

    async def is_allowed(by: Caller) -> bool:
        try:
            await use(*parts, by)
        except Forbidden:
            return False
        except CarryError:
            # the stream does not exist, and the model has no decoder: looked up afterwards
            return True
        return True

    for verb in Verb:
        assert await is_allowed(caller(verb)) == (verb in needed), verb
    assert await is_allowed(ANYONE)
    assert await is_allowed(caller(models=("pro*",), prefix="acme:"))
    if name != "describe":
        assert not await is_allowed(caller(models=("other",)))
    if name in USE_CASES:
        assert not await is_allowed(caller(prefix="acme2:"))
        assert not await is_allowed(caller(prefix="acme:10"))


async def test_fork_needs_both_streams(parts: tuple[Pipeline, Watches]) -> None:
    pipeline, _ = parts
    within = caller(prefix="acme:")
    await send(pipeline, "b:1", ROWS, 0)
    await send(pipeline, STREAM, ROWS, 0)
    for stream, to in (("b:1", "acme:2"), (STREAM, "b:2")):
        with pytest.raises(Forbidden):
            await pipeline.streams.fork(within, StreamKey(MODEL, stream), to, None)
    await pipeline.streams.fork(within, KEY, "acme:2", None)


async def test_items_of_other_tenants_fail_alone(parts: tuple[Pipeline, Watches]) -> None:
    pipeline, _ = parts
    items = [chunk_of(stream, ROWS, 0) for stream in ("b:1", STREAM)]
    forbidden, reply = await pipeline.process_many(caller(prefix="acme:"), items)
    assert isinstance(forbidden, Forbidden)
    assert forbidden.facts["stream"] == "b:1"
    assert not isinstance(reply, CarryError)
    assert reply.head.position == 1


@pytest.mark.parametrize("name", [*(each for each in USE_CASES if each != "watch"), "predict"])
async def test_use_case_counts_for_the_limits_of_its_caller(
    parts: tuple[Pipeline, Watches], name: str
) -> None:
    _, use = (USE_CASES | OF_MODELS)[name]
    unused: Any = None
    limiter = KeyLimiters(unused).limiter("0" * 12, KeyLimits(requests_per_s=0.001))
    limited = caller(limiter=limiter)
    job = parts[0].enqueue(limited, chunk_of("first", ROWS, 0), time.monotonic() + 60, print)
    assert job.payload.key.stream == "first"
    with pytest.raises(LimitExceeded):
        await use(*parts, limited)
