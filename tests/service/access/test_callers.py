"""Callers of a process: which are dropped when, and how many it keeps."""

from __future__ import annotations

import time

import pytest

from service.access import key_cache
from service.access.caller import Verb
from service.access.key_cache import MAX_STALE_S, AccessKeys
from service.access.keys import parse_key
from service.access.tokens import TokenClaims, sign_token
from service.core.errors import CarryError, StoreUnavailable, Unauthenticated
from tests.service.access.test_access_keys import UNUSED, Records
from tests.support.access import change_key, new_authorization, revoke
from tests.support.clock import ManualClock


async def test_revoked_key_is_dropped_and_its_listeners_are_notified() -> None:
    stored = Records()
    keys = AccessKeys(stored, UNUSED, UNUSED, required=True)
    authorizations = [(await new_authorization(stored)).encode() for _ in range(2)]
    await keys.refresh()
    ended: dict[bytes, list[CarryError]] = {}
    for authorization in authorizations:
        caller = keys.caller(authorization)
        assert keys.caller(authorization) is caller
        assert keys.cached[authorization] is caller
        keys.notify_end(caller, ended.setdefault(authorization, []).append)
    await revoke(stored, authorizations[0].decode())
    await keys.refresh()
    await keys.refresh()
    assert [type(error) for error in ended[authorizations[0]]] == [Unauthenticated]
    assert not ended[authorizations[1]]
    assert list(keys.cached) == [authorizations[1]]


@pytest.mark.parametrize("with_token", [False, True])
async def test_key_whose_scope_changed_is_dropped_and_verified_again(*, with_token: bool) -> None:
    stored = Records()
    keys = AccessKeys(stored, UNUSED, UNUSED, required=True)
    key, unchanged = [await new_authorization(stored) for _ in range(2)]
    authorization = key.encode()
    if with_token:
        text = parse_key(key.removeprefix("Bearer "))
        assert text is not None
        token = sign_token(
            text, TokenClaims(exp=time.time() + 3600, verbs=(Verb.PREDICT, Verb.LIST))
        )
        authorization = f"Bearer {token}".encode()
    await keys.refresh()
    ended: list[CarryError] = []
    keys.notify_end(keys.caller(authorization), ended.append)
    keys.caller(unchanged.encode())
    await change_key(stored, key, verbs=(Verb.PREDICT,), prefix="acme:")
    await keys.refresh()
    assert [type(error) for error in ended] == [Unauthenticated]
    assert list(keys.cached) == [unchanged.encode()]
    if with_token:
        # it claims a verb that its key no longer has
        with pytest.raises(Unauthenticated):
            keys.caller(authorization)
    else:
        caller = keys.caller(authorization)
        assert caller.verbs == {Verb.PREDICT}
        assert caller.prefix == "acme:"


async def test_listener_that_was_removed_is_not_called() -> None:
    stored = Records()
    keys = AccessKeys(stored, UNUSED, UNUSED, required=True)
    authorization = await new_authorization(stored)
    await keys.refresh()
    ended: list[CarryError] = []
    keys.notify_end(keys.caller(authorization.encode()), ended.append)()
    await revoke(stored, authorization)
    await keys.refresh()
    assert not ended


async def test_callers_end_when_the_keys_cannot_be_read_for_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, stored = ManualClock(), Records()
    monkeypatch.setattr(key_cache, "time", clock)
    keys = AccessKeys(stored, UNUSED, UNUSED, required=True, now_ms=lambda: 0)
    authorization = (await new_authorization(stored)).encode()
    await keys.refresh()
    ended: list[CarryError] = []
    keys.notify_end(keys.caller(authorization), ended.append)
    stored.is_away = True
    clock.now_s += MAX_STALE_S - 1
    await keys.refresh()
    assert authorization in keys.cached
    clock.now_s += 2
    await keys.refresh()
    assert not keys.cached
    assert [type(error) for error in ended] == [StoreUnavailable]
    with pytest.raises(StoreUnavailable):
        keys.caller(authorization)


async def test_cached_headers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_cache, "MAX_CACHED", 3)
    stored = Records()
    keys = AccessKeys(stored, UNUSED, UNUSED, required=True)
    authorizations = [(await new_authorization(stored)).encode() for _ in range(5)]
    await keys.refresh()
    for authorization in authorizations:
        keys.caller(authorization)
        assert len(keys.cached) <= 3
    for wrong in (b"Bearer x", b"Basic y", None):
        with pytest.raises(Unauthenticated):
            keys.caller(wrong)
    assert set(keys.cached) <= set(authorizations)
