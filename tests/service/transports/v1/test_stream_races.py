"""Deletions, restores and forks of streams that others write between the read and the write."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from service.core.errors import OutcomeUnknown
from service.core.values import FIRST_TAG, StreamKey
from tests.service.transports.v1.harness import Harness, problem, rows
from tests.support.streams import Commit

ADDRESS = "/v1/models/probe/streams"
KEY = StreamKey("probe", "s")


def moved(api: Harness, key: StreamKey = KEY) -> str:
    """Replace a stream behind the store's back by one of another epoch; returns its ETag."""
    states = api.store.states
    head = replace(states[KEY].head, epoch=b"others01", tag=FIRST_TAG)
    states[key] = states[KEY]._replace(head=head)
    return f'"{head.etag}"'


def once(work: Callable[[], Any]) -> Callable[[Any], None]:
    """A hook of the faulty store that does something before the first write only."""
    pending = [work]

    def hook(_: StreamKey | Commit) -> None:
        if pending:
            pending.pop()()

    return hook


async def saved(api: Harness) -> Any:
    """A stream, and its state as a client keeps it."""
    await api.chunk({"inputs": rows(2).tolist()})
    return (await api.client.get(f"{ADDRESS}/s/state")).json()


def etag(state: Any) -> dict[str, str]:
    return {"if-match": f'"{state["epoch"]}-{state["tag"]}"'}


def delete(api: Harness, state: Any, headers: dict[str, str]) -> Any:
    return api.client.delete(f"{ADDRESS}/s", headers=headers)


def restore(api: Harness, state: Any, headers: dict[str, str]) -> Any:
    return api.client.put(f"{ADDRESS}/s/state", json=state, headers=headers)


def fork(api: Harness, state: Any, headers: dict[str, str]) -> Any:
    return api.client.post(f"{ADDRESS}/s/fork", json={"to": "t"}, headers=headers)


OTHERS, ANY = b"others01", "*"


@pytest.mark.parametrize(
    ("write", "condition", "is_gone", "status", "epoch"),
    [
        (delete, None, False, 412, OTHERS),
        (delete, None, True, 412, None),
        (delete, "", False, 204, None),
        (restore, None, False, 412, OTHERS),
        (restore, None, True, 412, None),
        (restore, ANY, False, 200, b"new"),
        (fork, "", False, 409, OTHERS),
    ],
)
async def test_a_write_respects_a_stream_that_changed_since_it_was_read(
    api: Harness,
    write: Callable[..., Any],
    condition: str | None,
    is_gone: bool,
    status: int,
    epoch: bytes | None,
) -> None:
    """Under its ETag, any or no condition, after the stream is replaced or deleted."""
    state = await saved(api)
    key = StreamKey("probe", "t") if write is fork else KEY
    headers = etag(state) if condition is None else {"if-match": condition} if condition else {}
    hook = once(lambda: api.store.states.pop(key) if is_gone else moved(api, key))
    api.store.on_delete = api.store.on_commit = hook
    response = await write(api, state, headers)
    assert response.status_code == status, response.text
    if status >= 400:
        code = "stream_exists" if write is fork else "state_changed"
        assert problem(response, status, code)["epoch"] == (epoch.hex() if epoch else None)
    left = api.store.states.get(key)
    if epoch == b"new":
        assert left.head.epoch not in (OTHERS, bytes.fromhex(state["epoch"]))
    else:
        assert (left and left.head.epoch) == epoch


@pytest.mark.parametrize("write", [restore, fork])
async def test_restore_and_fork_succeed_after_a_concurrent_deletion(
    api: Harness, write: Callable[..., Any]
) -> None:
    """The deletion leaves a tombstone where the write expected nothing."""
    state = await saved(api)
    name = "s" if write is restore else "t"
    if write is restore:
        api.store.states.pop(KEY)

    async def deleted_first(commits: Any, deadline_s: float = math.inf) -> Any:
        api.store.commit = commit
        response: httpx.Response = await api.client.delete(f"{ADDRESS}/{name}")
        problem(response, 404, "stream_not_found")
        return await commit(commits, deadline_s)

    commit = api.store.commit
    api.store.commit = deleted_first
    assert (await write(api, state, {})).status_code == 201
    assert api.position(name) == 2


@pytest.mark.parametrize("write", [delete, restore, fork])
async def test_a_write_reports_an_unknown_outcome(api: Harness, write: Callable[..., Any]) -> None:
    state = await saved(api)
    api.store.on_delete = lambda key: OutcomeUnknown("lost", stream=key.stream)
    api.store.on_commit = lambda commit: OutcomeUnknown("lost", stream=commit.key.stream)
    problem(await write(api, state, {} if write is fork else etag(state)), 503, "outcome_unknown")


# Damaged states


async def test_a_conditional_restore_keeps_a_damaged_state(
    api: Harness, damage: Callable[[str], None]
) -> None:
    state = await saved(api)
    damage("s")
    problem(await restore(api, state, etag(state)), 500, "state_damaged")
    problem(await api.client.get(f"{ADDRESS}/s"), 500, "state_damaged")
    assert (await restore(api, state, {"if-match": "*"})).status_code == 200
    assert api.position() == 2


@pytest.mark.parametrize(
    ("headers", "status"), [({}, 409), ({"if-match": "*"}, 200)], ids=["plain", "any state"]
)
async def test_a_restore_does_not_delete_a_stream_that_replaced_a_damaged_state(
    api: Harness, damage: Callable[[str], None], headers: dict[str, str], status: int
) -> None:
    state = await saved(api)
    sound = api.store.states[KEY]
    other = sound._replace(head=replace(sound.head, epoch=b"others01", tag=FIRST_TAG))
    damage("s")
    deletions: list[str] = []

    def replaced(key: StreamKey) -> None:
        deletions.append(key.stream)
        api.store.states[key] = other

    api.store.on_delete = replaced
    assert (await restore(api, state, headers)).status_code == status
    assert deletions == ["s"]
    assert (api.store.states[KEY].head == other.head) is (status == 409)
