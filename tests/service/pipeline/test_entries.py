"""Entries of a process: when they end, and how many are kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from service.access import key_cache
from service.access.key_cache import MAX_STALE_S, AccessKeys
from service.core.errors import CarryError, StoreUnavailable, Unauthenticated
from service.pipeline import entries as entries_module
from service.pipeline.entries import Entries
from tests.service.access.test_access_keys import Records
from tests.support.access import new_authorization, revoke
from tests.support.clock import ManualClock


def entries_of(keys: AccessKeys) -> Entries:
    """Entries to a pipeline without models."""
    quotas = SimpleNamespace(quota=lambda key_id, limits: None)
    pipeline: Any = SimpleNamespace(models={}, streams=None, quotas=quotas)
    return Entries(pipeline, keys)


async def test_revoked_key_is_dropped_and_those_who_hold_its_entry_are_notified() -> None:
    stored = Records()
    keys = AccessKeys(stored, required=True)
    entries = entries_of(keys)
    authorizations = [(await new_authorization(stored)).encode() for _ in range(2)]
    await keys.refresh()
    ended: dict[bytes, list[CarryError]] = {}
    for authorization in authorizations:
        entry = entries.entry(authorization)
        assert entries.entry(authorization) is entry
        assert entries.cached[authorization] is entry
        entries.notify_end(entry, ended.setdefault(authorization, []).append)
    await revoke(stored, authorizations[0].decode())
    await keys.refresh()
    await keys.refresh()
    assert [type(error) for error in ended[authorizations[0]]] == [Unauthenticated]
    assert not ended[authorizations[1]]
    assert list(entries.cached) == [authorizations[1]]


async def test_listener_that_was_removed_is_not_called() -> None:
    stored = Records()
    keys = AccessKeys(stored, required=True)
    entries = entries_of(keys)
    authorization = await new_authorization(stored)
    await keys.refresh()
    ended: list[CarryError] = []
    entries.notify_end(entries.entry(authorization.encode()), ended.append)()
    await revoke(stored, authorization)
    await keys.refresh()
    assert not ended


async def test_entries_end_when_the_keys_cannot_be_read_for_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, stored = ManualClock(), Records()
    monkeypatch.setattr(key_cache, "time", clock)
    keys = AccessKeys(stored, required=True, now_ms=lambda: 0)
    entries = entries_of(keys)
    authorization = (await new_authorization(stored)).encode()
    await keys.refresh()
    ended: list[CarryError] = []
    entries.notify_end(entries.entry(authorization), ended.append)
    stored.is_away = True
    clock.now_s += MAX_STALE_S - 1
    await keys.refresh()
    assert authorization in entries.cached
    clock.now_s += 2
    await keys.refresh()
    assert not entries.cached
    assert [type(error) for error in ended] == [StoreUnavailable]
    with pytest.raises(StoreUnavailable):
        entries.entry(authorization)


async def test_cached_headers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries_module, "MAX_CACHED", 3)
    stored = Records()
    keys = AccessKeys(stored, required=True)
    entries = entries_of(keys)
    authorizations = [(await new_authorization(stored)).encode() for _ in range(5)]
    await keys.refresh()
    for authorization in authorizations:
        entries.entry(authorization)
        assert len(entries.cached) <= 3
    for wrong in (b"Bearer x", b"Basic y", None):
        with pytest.raises(Unauthenticated):
            entries.entry(wrong)
    assert set(entries.cached) <= set(authorizations)
