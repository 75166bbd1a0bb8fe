"""Limits, quotas and tokens of access keys, by chunks of both protocols."""

from __future__ import annotations

import asyncio
import time

import pytest

from service.access.caller import Verb
from service.access.keys import parse_key
from service.access.limits import KeyLimits
from service.access.tokens import TokenClaims, sign_token
from service.core.errors import CarryError, LimitExceeded
from service.core.values import Reply, StreamKey, StreamState
from service.store.codec import encode_state
from service.store.layout import HEADER_BYTES
from tests.service.transports.doors import send_chunk, send_tensor
from tests.service.transports.v1.harness import Harness, problem, rows
from tests.support.access import revoke
from tests.support.pipelines import chunk_of
from tests.support.servers import becomes


async def test_limits_of_a_key_hold_on_every_path(api: Harness) -> None:
    limits = KeyLimits(requests_per_s=0.001)
    for door in (send_chunk, send_tensor):
        key = await api.key(limits=limits)
        other = await api.key(limits=limits)
        stream = door.__name__
        assert [await door(api, key, stream) for _ in range(3)] == [200, 429, 429]
        assert api.position(stream) == 2
        assert await door(api, other, f"{stream}2") == 200
        url = f"/v1/models/probe/streams/{stream}"
        response = await api.client.get(url, headers={"authorization": key})
        document = problem(response, 429, "limit_exceeded")
        assert (document["limit"], document["allowed"]) == ("requests_per_s", 0.001)
        assert response.headers["retry-after"] == "60"


async def test_events_and_concurrent_requests_of_a_key_are_limited(api: Harness) -> None:
    events = await api.key(limits=KeyLimits(events_per_s=0.001))
    # a request in debt delays what follows; nothing else does
    assert [await send_chunk(api, events, "e") for _ in range(2)] == [200, 429]
    one = await api.key(limits=KeyLimits(concurrent_requests=1))
    api.store.held = asyncio.Event()
    first = asyncio.create_task(send_chunk(api, one, "c"))

    await becomes(lambda: api.store.holds > 0, "a load that is held")
    assert await send_chunk(api, one, "d") == 429
    api.store.held.set()
    assert await first == 200
    assert await send_chunk(api, one, "d") == 200


async def test_token_narrows_its_key_on_both_paths_and_ends_with_it(api: Harness) -> None:
    api.clock[0] = 1_000_000
    scope = {"verbs": (Verb.PREDICT,), "prefix": "acme:7:"}
    for door in (send_chunk, send_tensor):
        key = await api.key(prefix="acme:")
        holder = parse_key(key.removeprefix("Bearer "))
        assert holder is not None
        token = f"Bearer {sign_token(holder, TokenClaims(exp=1100, **scope))}"
        stream = f"acme:7:{door.__name__}"
        for _ in range(3):
            # from the second request on, the fast path knows the token
            assert await door(api, token, "acme:8:x") == 403
        assert await door(api, token, stream) == 200
        listing = {"headers": {"authorization": token}, "params": {"prefix": "acme:7:"}}
        problem(await api.client.get("/v1/models/probe/streams", **listing), 403, "forbidden")
        api.clock[0] = 1_100_000
        await api.refresh_keys()
        assert await door(api, token, stream) == 401
        api.clock[0] = 1_000_000
        assert await door(api, token, f"{stream}2") == 200
        await revoke(api.store.keys, key)
        await api.refresh_keys()
        assert await door(api, token, stream) == 401


async def test_tokens_share_the_limits_of_their_key(api: Harness) -> None:
    key = await api.key(limits=KeyLimits(requests_per_s=0.001))
    holder = parse_key(key.removeprefix("Bearer "))
    assert holder is not None
    tokens = [f"Bearer {sign_token(holder, TokenClaims(exp=9e9, sub=name))}" for name in ("a", "b")]
    assert [await send_chunk(api, each, "s") for each in (*tokens, key)] == [200, 429, 429]


async def test_quota_of_streams_holds_on_every_path_and_deletions_free_it(
    api: Harness,
) -> None:
    key = await api.key(prefix="q:", limits=KeyLimits(streams=2))
    headers = {"authorization": key}
    url = "/v1/models/probe/streams"
    assert await send_chunk(api, key, "q:1") == 200
    assert await send_tensor(api, key, "q:2") == 200
    for _ in range(2):
        assert await send_chunk(api, key, "q:3") == 429
        assert await send_tensor(api, key, "q:3") == 429
    many = {"chunks": [{"stream": s, "inputs": rows(2).tolist()} for s in ("q:1", "q:4", "q:2")]}
    items = (await api.client.post("/v1/models/probe/chunks", json=many, headers=headers)).json()
    assert [item["status"] for item in items["results"]] == [200, 429, 200]
    error = items["results"][1]["error"]
    assert (error["code"], error["limit"]) == ("limit_exceeded", "streams")
    assert (error["allowed"], error["used"], error["stream"]) == (2, 2, "q:4")
    state = (await api.client.get(f"{url}/q:1/state", headers=headers)).json()
    restored = await api.client.put(f"{url}/q:6/state", json=state, headers=headers)
    assert problem(restored, 429, "limit_exceeded")["limit"] == "streams"
    dry = {"inputs": rows(2).tolist(), "dry_run": True}
    assert (await api.chunk(dry, stream="q:7", headers=headers)).status_code == 200
    assert {stream.stream for stream in api.store.states} == {"q:1", "q:2"}
    assert (await api.client.delete(f"{url}/q:1", headers=headers)).status_code == 204
    assert await send_chunk(api, key, "q:3") == 200


async def test_quota_of_bytes_counts_the_states(api: Harness) -> None:
    layout = api.pipeline.models["probe"].state
    size = HEADER_BYTES + 4 * layout.float_size + 8 * layout.int_size
    assert size == len(encode_state(await stored_state(api)))
    key = await api.key(limits=KeyLimits(state_bytes=2 * size + 1))
    statuses = [await send_chunk(api, key, name) for name in ("a", "b", "c", "a")]
    assert statuses == [200, 200, 429, 200]


async def stored_state(api: Harness) -> StreamState:
    """The state of a stream that another key feeds."""
    assert await send_chunk(api, await api.key(), "other") == 200
    return api.store.states[StreamKey("probe", "other")]


async def test_chunks_behind_the_registration_of_a_stream_keep_their_order(api: Harness) -> None:
    key = await api.key(limits=KeyLimits(streams=5))
    caller = api.keys.caller(key.encode())
    results: list[asyncio.Future[Reply | CarryError]] = []

    def send(position: int) -> None:
        chunk = chunk_of("ordered", rows(1), position)
        assert api.pipeline.check_admission(caller, "probe", chunk.key, 60) is None
        result = asyncio.get_running_loop().create_future()
        results.append(result)
        api.pipeline.enqueue(caller, chunk, time.monotonic() + 60, result.set_result)

    for position in range(6):
        send(position)
        await asyncio.sleep(0)
    replies = [await result for result in results]
    assert [reply.head.position for reply in replies] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("streams", [None, 5], ids=["no quota", "quota"])
async def test_a_chunk_whose_client_disconnected_counts_no_longer(
    api: Harness, streams: int | None
) -> None:
    key = await api.key(limits=KeyLimits(concurrent_requests=1, streams=streams))
    caller = api.keys.caller(key.encode())
    chunk, results = chunk_of("left", rows(1), 0), list[Reply | CarryError]()
    job = api.pipeline.enqueue(caller, chunk, time.monotonic() + 60, results.append)
    assert isinstance(api.pipeline.check_admission(caller, "probe", chunk.key, 60), LimitExceeded)
    api.pipeline.cancel(caller, job)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert api.pipeline.check_admission(caller, "probe", chunk.key, 60) is None
    assert await send_chunk(api, key, "next") == 200
    assert not results
