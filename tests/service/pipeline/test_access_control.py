"""Access control of a process: which pipelines it drops when, and how many it keeps."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from service.access import key_cache
from service.access.key_cache import MAX_STALE_S, AccessKeys
from service.access.keys import parse_key
from service.access.principal import Verb
from service.access.tokens import TokenClaims, sign_token
from service.core.errors import CarryError, StoreUnavailable, Unauthenticated
from service.pipeline import access_control as module
from service.pipeline.access_control import AccessControl
from tests.service.access.test_access_keys import Records
from tests.support.access import change_key, new_authorization, revoke
from tests.support.clock import ManualClock


def access_control(keys: AccessKeys) -> AccessControl:
    """Access control of a pipeline without models."""
    quotas = SimpleNamespace(quota=lambda key_id, limits: None)
    limiters = SimpleNamespace(limiter=lambda key_id, limits: None)
    pipeline: Any = SimpleNamespace(models={}, streams=None, quotas=quotas, limiters=limiters)
    return AccessControl(pipeline, keys)


async def test_revoked_key_is_dropped_and_its_listeners_are_notified() -> None:
    stored = Records()
    keys = AccessKeys(stored, required=True)
    access = access_control(keys)
    authorizations = [(await new_authorization(stored)).encode() for _ in range(2)]
    await keys.refresh()
    ended: dict[bytes, list[CarryError]] = {}
    for authorization in authorizations:
        pipeline = access.pipeline(authorization)
        assert access.pipeline(authorization) is pipeline
        assert access.cached[authorization] is pipeline
        access.notify_end(pipeline, ended.setdefault(authorization, []).append)
    await revoke(stored, authorizations[0].decode())
    await keys.refresh()
    await keys.refresh()
    assert [type(error) for error in ended[authorizations[0]]] == [Unauthenticated]
    assert not ended[authorizations[1]]
    assert list(access.cached) == [authorizations[1]]


@pytest.mark.parametrize("with_token", [False, True])
async def test_key_whose_scope_changed_is_dropped_and_verified_again(*, with_token: bool) -> None:
    stored = Records()
    keys = AccessKeys(stored, required=True)
    access = access_control(keys)
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
    access.notify_end(access.pipeline(authorization), ended.append)
    access.pipeline(unchanged.encode())
    await change_key(stored, key, verbs=(Verb.PREDICT,), prefix="acme:")
    await keys.refresh()
    assert [type(error) for error in ended] == [Unauthenticated]
    assert list(access.cached) == [unchanged.encode()]
    if with_token:
        # it claims a verb that its key no longer has
        with pytest.raises(Unauthenticated):
            access.pipeline(authorization)
    else:
        pipeline: Any = access.pipeline(authorization)
        assert pipeline.principal.verbs == {Verb.PREDICT}
        assert pipeline.principal.prefix == "acme:"


async def test_listener_that_was_removed_is_not_called() -> None:
    stored = Records()
    keys = AccessKeys(stored, required=True)
    access = access_control(keys)
    authorization = await new_authorization(stored)
    await keys.refresh()
    ended: list[CarryError] = []
    access.notify_end(access.pipeline(authorization.encode()), ended.append)()
    await revoke(stored, authorization)
    await keys.refresh()
    assert not ended


async def test_pipelines_end_when_the_keys_cannot_be_read_for_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, stored = ManualClock(), Records()
    monkeypatch.setattr(key_cache, "time", clock)
    keys = AccessKeys(stored, required=True, now_ms=lambda: 0)
    access = access_control(keys)
    authorization = (await new_authorization(stored)).encode()
    await keys.refresh()
    ended: list[CarryError] = []
    access.notify_end(access.pipeline(authorization), ended.append)
    stored.is_away = True
    clock.now_s += MAX_STALE_S - 1
    await keys.refresh()
    assert authorization in access.cached
    clock.now_s += 2
    await keys.refresh()
    assert not access.cached
    assert [type(error) for error in ended] == [StoreUnavailable]
    with pytest.raises(StoreUnavailable):
        access.pipeline(authorization)


async def test_cached_headers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CACHED", 3)
    stored = Records()
    keys = AccessKeys(stored, required=True)
    access = access_control(keys)
    authorizations = [(await new_authorization(stored)).encode() for _ in range(5)]
    await keys.refresh()
    for authorization in authorizations:
        access.pipeline(authorization)
        assert len(access.cached) <= 3
    for wrong in (b"Bearer x", b"Basic y", None):
        with pytest.raises(Unauthenticated):
            access.pipeline(wrong)
    assert set(access.cached) <= set(authorizations)
