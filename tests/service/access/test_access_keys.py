"""Access keys: their text, records, scopes, and the copy that a process has of them."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.access import key_cache
from service.access.caller import ANYONE, Caller, Verb
from service.access.key_cache import MAX_STALE_S, AccessKeys
from service.access.keys import (
    AccessKey,
    AccessKeyError,
    decode_key,
    encode_key,
    new_key,
    parse_key,
)
from service.access.settings import AccessSettings
from service.access.tokens import TokenClaims, sign_token
from service.core.errors import CarryError, Forbidden, StoreUnavailable, Unauthenticated
from service.settings import Settings
from service.start_checks import CannotServeError, may_be_open
from tests.support.access import change_key, new_authorization, revoke
from tests.support.clock import ManualClock

PREDICT = (Verb.PREDICT,)
SCOPE: dict[str, Any] = {
    "name": "a tenant",
    "verbs": PREDICT,
    "models": ("flights",),
    "prefix": "acme:",
    "created_ms": 5,
}

UNUSED: Any = None
"""In place of the capabilities of a store that count for the limits of keys."""


class Records:
    """A store of access keys in memory."""

    def __init__(self) -> None:
        self.records: dict[str, bytes] = {}
        self.version = b""
        self.is_away = False
        self.reads = 0

    async def read(
        self, version: bytes | None, deadline_s: float = math.inf
    ) -> tuple[bytes, Mapping[str, bytes]] | None:
        if self.is_away:
            raise StoreUnavailable("away")
        if version == self.version:
            return None
        self.reads += 1
        return self.version, dict(self.records)

    async def write(self, records: Mapping[str, bytes]) -> None:
        self.records |= records
        self.version = b"%d" % (int(self.version or b"0") + 1)


def process(stored: Records, *, required: bool | None = True, **options: Any) -> AccessKeys:
    return AccessKeys(stored, UNUSED, UNUSED, required=required, **options)


def authenticate(keys: AccessKeys, authorization: str | None) -> Caller:
    return keys.caller(None if authorization is None else authorization.encode())


def test_record_has_the_hash_of_the_secret_only() -> None:
    text, record = new_key(AccessKey(**SCOPE))
    assert parse_key(str(text)) == text
    assert len(bytes.fromhex(text.secret)) == 32
    assert len({text.secret[at : at + 8] for at in range(0, 64, 8)}) == 8
    stored = encode_key(record)
    assert text.secret.encode() not in stored
    assert json.loads(stored)["secret_sha256"] == hashlib.sha256(text.secret.encode()).hexdigest()
    assert decode_key(stored) == record
    assert record.matches(text.secret)
    assert not record.matches(text.secret[:-1] + ("0" if text.secret[-1] != "0" else "1"))
    assert new_key(AccessKey(**SCOPE))[0] != text


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"max_streams": 3},
        {"verbs": ["predict", "everything"]},
        {"verbs": []},
        {"models": []},
        {"models": ["fl.ights"]},
        {"prefix": "a/b"},
        {"limits": {"requests_per_s": 0}},
        {"limits": {"requests_per_s": "x"}},
        {"limits": {"streams": -1}},
        {"limits": {"requests_per_day": 1}},
    ],
    ids=str,
)
def test_record_that_could_restrict_more_is_rejected(change: dict[str, Any]) -> None:
    record = json.loads(encode_key(new_key(AccessKey(**SCOPE))[1]))
    with pytest.raises(AccessKeyError):
        decode_key(json.dumps({**record, **change}).encode())


@pytest.mark.parametrize(
    ("models", "covered", "others"),
    [
        (("flights",), ["flights"], ["flight", "flights2", ""]),
        (("fl*", "x"), ["fl", "flights", "x"], ["afl", "xx"]),
        (("*-prod",), ["a-prod", "-prod"], ["a-prod-2", "aprod"]),
        (("*",), ["anything"], []),
        # with backtracking 4 s, and for each further star ten times as long
        (("*a" * 6 + "*b",), ["a" * 63 + "b"], ["a" * 64]),
    ],
)
def test_model_patterns_cover_whole_names(
    models: tuple[str, ...], covered: list[str], others: list[str]
) -> None:
    caller, began_s = Caller("id", "n", frozenset(PREDICT), models), time.process_time()
    assert all(caller.covers_model(model) for model in covered)
    assert not any(caller.covers_model(model) for model in others)
    assert time.process_time() - began_s < 1


def test_scope_needs_verb_model_and_prefix() -> None:
    caller = AccessKey(**SCOPE).caller("0a1b2c3d4e5f")
    caller.check(PREDICT, "flights", "acme:1")
    caller.check((Verb.LIST, Verb.PREDICT), "flights", None)
    for verbs, model, stream in [
        ((Verb.LIST,), "flights", "acme:1"),
        (PREDICT, "other", "acme:1"),
        (PREDICT, "flights", "acme2:1"),
        (PREDICT, "flights", "ACME:1"),
        (PREDICT, "flights", ""),
    ]:
        with pytest.raises(Forbidden) as caught:
            caller.check(verbs, model, stream)
        facts = caught.value.facts
        assert (facts["verb"], facts["model"], facts["stream"]) == (verbs[0], model, stream)
        assert facts["allowed"] == {"verbs": ["predict"], "models": ["flights"], "prefix": "acme:"}


@pytest.mark.parametrize(
    ("host", "settings", "is_open"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {}, True),
        ("0.0.0.0", {"insecure": True}, True),
        ("127.0.0.1", {"require_keys": True}, False),
        ("0.0.0.0", {"require_keys": True, "insecure": True}, False),
        ("0.0.0.0", {}, None),
        ("::", {}, None),
        ("::ffff:192.0.2.1", {}, None),
    ],
)
def test_service_without_keys_starts_on_loopback_only(
    host: str, settings: dict[str, bool], is_open: bool | None
) -> None:
    access = Settings(access=AccessSettings(**settings))
    with capture_logs() as events:
        if is_open is None:
            with pytest.raises(CannotServeError, match="CARRY_INSECURE=1"):
                may_be_open(access, host)
        else:
            assert may_be_open(access, host) == is_open
    is_exposed = is_open is True and "insecure" in settings
    assert [event["event"] for event in events] == (["insecure"] if is_exposed else [])


async def test_each_unusable_key_is_rejected() -> None:
    stored, clock = Records(), [1000]
    keys = process(stored, now_ms=lambda: clock[0])
    good = await new_authorization(stored, **SCOPE)
    expiring = await new_authorization(stored, expires_ms=2000)
    await keys.refresh()
    assert authenticate(keys, good) == AccessKey(**SCOPE).caller(good.split("_")[1])
    assert authenticate(keys, good.replace("Bearer", "bEARER ")).name == "a tenant"
    other = f"Bearer carry_{good.split('_')[1]}_{expiring.split('_')[2]}"
    padded = good.replace(" ", " " * 5000)  # accepted, it would be kept
    spelled = (good[:-1], good + "0", other, good.upper(), padded)
    for wrong in (None, "", "Bearer", "Basic YTpi", *spelled):
        with pytest.raises(Unauthenticated):
            authenticate(keys, wrong)
    clock[0] = 1999
    caller = authenticate(keys, expiring)
    assert keys.is_current(caller)
    text = parse_key(good.removeprefix("Bearer "))
    assert text is not None
    token = f"Bearer {sign_token(text, TokenClaims(exp=2))}"
    assert keys.is_current(by_token := authenticate(keys, token))
    clock[0] = 2000
    assert not keys.is_current(by_token)
    with pytest.raises(Unauthenticated, match="expired"):
        authenticate(keys, expiring)
    assert not keys.is_current(caller)
    await revoke(stored, good)
    await keys.refresh()
    with pytest.raises(Unauthenticated, match="revoked"):
        authenticate(keys, good)


@pytest.mark.parametrize(("required", "is_open"), [(None, False), (True, False), (False, True)])
async def test_store_that_lost_its_keys_is_open_only_by_the_setting(
    required: bool | None, is_open: bool
) -> None:
    """A restored one may have none; one that was never closed is open by default."""
    stored = Records()
    keys = process(stored, required=required)
    await keys.refresh()
    assert (keys.open_caller is ANYONE) == (not required)
    await stored.write({})
    await keys.refresh()
    assert (keys.open_caller is ANYONE) == is_open
    await new_authorization(stored)
    await keys.refresh()
    assert keys.open_caller is None
    # a process that required keys continues to, even if all of them are lost
    stored.records.clear()
    stored.version = b"lost"
    await keys.refresh()
    assert keys.open_caller is None


async def test_keys_are_read_again_only_when_they_changed() -> None:
    stored = Records()
    keys = process(stored, required=False)
    for _ in range(3):
        await keys.refresh()
        assert stored.reads == 1
    await new_authorization(stored)
    await keys.refresh()
    assert stored.reads == 2


async def test_last_known_keys_are_accepted_for_a_while_if_the_store_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, stored = ManualClock(), Records()
    monkeypatch.setattr(key_cache, "time", clock)
    keys = process(stored, now_ms=lambda: 0)
    authorization = (await new_authorization(stored)).encode()
    await keys.refresh()
    ended: list[CarryError] = []
    keys.notify_end(keys.caller(authorization), ended.append)
    stored.is_away = True
    clock.now_s += MAX_STALE_S - 1
    with capture_logs() as events:
        await keys.refresh()
        await keys.refresh()
    assert [event["event"] for event in events] == ["access_keys_not_read"]
    assert keys.caller(authorization) is keys.cached[authorization]
    assert not ended
    clock.now_s += 2
    with pytest.raises(StoreUnavailable):
        keys.caller(authorization)
    await keys.refresh()
    assert not keys.cached
    assert [type(error) for error in ended] == [StoreUnavailable]
    stored.is_away = False
    await keys.refresh()
    keys.caller(authorization)


async def test_unreadable_record_is_no_valid_key_but_requires_keys() -> None:
    stored = Records()
    keys = process(stored, required=False)
    authorization = await new_authorization(stored)
    stored.records[authorization.split("_")[1]] += b"x"
    with capture_logs() as events:
        await keys.refresh()
    assert [event["event"] for event in events] == ["access_key_not_readable"]
    assert keys.open_caller is None
    with pytest.raises(Unauthenticated):
        authenticate(keys, authorization)


@pytest.mark.parametrize("with_token", [False, True])
@pytest.mark.parametrize("change", ["revoked", "narrowed"])
async def test_changed_key_is_dropped_and_its_listeners_are_notified(
    change: str, *, with_token: bool
) -> None:
    stored = Records()
    keys = process(stored)
    key, unchanged = [await new_authorization(stored) for _ in range(2)]
    text = parse_key(key.removeprefix("Bearer "))
    assert text is not None
    claims = TokenClaims(exp=time.time() + 3600, verbs=(Verb.PREDICT, Verb.LIST))
    header = f"Bearer {sign_token(text, claims)}" if with_token else key
    authorizations = [header.encode(), unchanged.encode()]
    await keys.refresh()
    ended: dict[bytes, list[CarryError]] = {}
    removed: list[CarryError] = []
    for authorization in authorizations:
        caller = keys.caller(authorization)
        assert keys.caller(authorization) is caller
        assert keys.cached[authorization] is caller
        keys.notify_end(caller, ended.setdefault(authorization, []).append)
        keys.notify_end(caller, removed.append)()
    if change == "revoked":
        await revoke(stored, key)
    else:
        await change_key(stored, key, verbs=PREDICT, prefix="acme:")
    for _ in range(2):
        await keys.refresh()
    assert [type(error) for error in ended[authorizations[0]]] == [Unauthenticated]
    assert not ended[authorizations[1]]
    assert not removed
    assert list(keys.cached) == authorizations[1:]
    if change == "narrowed" and not with_token:
        caller = keys.caller(authorizations[0])
        assert (caller.verbs, caller.prefix) == ({Verb.PREDICT}, "acme:")
    else:
        # the token claims a verb that its key no longer has
        with pytest.raises(Unauthenticated):
            keys.caller(authorizations[0])


async def test_cached_headers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_cache, "MAX_CACHED", 3)
    stored = Records()
    keys = process(stored)
    authorizations = [(await new_authorization(stored)).encode() for _ in range(5)]
    await keys.refresh()
    for authorization in authorizations:
        keys.caller(authorization)
        assert len(keys.cached) <= 3
    for wrong in (b"Bearer x", b"Basic y", None):
        with pytest.raises(Unauthenticated):
            keys.caller(wrong)
    assert set(keys.cached) <= set(authorizations)
