"""What the pipeline checks of its caller: limits in each use case, and rights at the admission."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from service.access.caller import Caller, Verb
from service.access.limits import KeyLimiters, KeyLimits
from service.core.errors import CarryError, Forbidden, LimitExceeded
from service.core.values import Feed, ForecastRequest, StreamKey
from service.pipeline.pipeline import Pipeline
from tests.support.pipelines import chunk_of, rows_of, sequence_of, worker

MODEL, STREAM = "probe", "acme:1"
KEY = StreamKey(MODEL, STREAM)
ROWS = rows_of(np.random.default_rng(2), 1)

UseCase = Callable[[Pipeline, Caller], Awaitable[object]]


async def admit(pipeline: Pipeline, caller: Caller) -> None:
    rejection = pipeline.check_admission(caller, MODEL, KEY, 60)
    if rejection is not None:
        raise rejection


async def process_one_of_many(pipeline: Pipeline, caller: Caller) -> None:
    (result,) = await pipeline.process_many(caller, [chunk_of(STREAM, ROWS)])
    if isinstance(result, CarryError):
        raise result


async def restore(pipeline: Pipeline, caller: Caller) -> None:
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


USE_CASES: Mapping[str, UseCase] = {
    "check_admission": admit,
    "process": lambda p, c: p.process(c, chunk_of(STREAM, ROWS)),
    "process_many": process_one_of_many,
    "forecast": lambda p, c: p.forecast(c, KEY, ForecastRequest(1)),
    "read": lambda p, c: p.streams.read(c, KEY),
    "read_state": lambda p, c: p.streams.read_state(c, KEY),
    "delete": lambda p, c: p.streams.delete(c, KEY),
    "page": lambda p, c: p.streams.page(c, MODEL, STREAM, None, 9),
    "delete_prefix": lambda p, c: p.streams.delete_prefix(c, MODEL, STREAM),
    "restore": restore,
    "fork": lambda p, c: p.streams.fork(c, KEY, "acme:2", None),
    "predict": lambda p, c: p.predict(c, MODEL, [sequence_of(ROWS)]),
}


@pytest.mark.parametrize("name", USE_CASES)
async def test_use_case_counts_for_the_limits_of_its_caller(
    store_url: str, artifact: Artifact, name: str
) -> None:
    unused: Any = None
    limiter = KeyLimiters(unused).limiter("0" * 12, KeyLimits(requests_per_s=0.001))
    limited = Caller("0" * 12, "test", frozenset(Verb), ("*",), "", limiter=limiter)
    async with worker(store_url, artifact) as pipeline:
        job = pipeline.enqueue(limited, chunk_of("first", ROWS, 0), time.monotonic() + 60, print)
        assert job.payload.key.stream == "first"
        with pytest.raises(LimitExceeded):
            await USE_CASES[name](pipeline, limited)


@pytest.mark.parametrize(
    ("rights", "is_allowed"),
    [
        ((Verb, ("pro*",), "acme:"), True),
        (({Verb.LIST}, ("*",), ""), False),
        ((Verb, ("other",), ""), False),
        ((Verb, ("*",), "acme:10"), False),
    ],
    ids=["allowed", "verb", "model", "stream"],
)
async def test_admission_needs_the_verb_the_model_and_the_stream(
    store_url: str, artifact: Artifact, rights: tuple[Any, Any, str], is_allowed: bool
) -> None:
    """Its check is another piece of code than that of the other use cases."""
    verbs, *scope = rights
    caller = Caller("0" * 12, "test", frozenset(verbs), *scope)
    async with worker(store_url, artifact) as pipeline:
        if is_allowed:
            assert pipeline.check_admission(caller, MODEL, KEY, 60) is None
        else:
            with pytest.raises(Forbidden):
                pipeline.check_admission(caller, MODEL, KEY, 60)
