"""`carry keys`: limits of a new key, and tokens that a key signs."""

from __future__ import annotations

import json
import time

import pytest

from service.access.caller import Verb
from service.access.keys import decode_key
from service.access.limits import KeyLimits
from service.access.tokens import verify_token
from tests.support.command import Result, carry
from tests.support.servers import RealServer


def keys(*words: str) -> Result:
    return carry("keys", *words)


def test_created_key_has_its_limits_and_signs_tokens_within_its_scope(
    pipeline_server: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ("--redis-url", pipeline_server.url)
    limits = ("--requests-per-s", "20.5", "--streams", "100", "--state-bytes", "1000000")
    made = keys("create", "shop", *limits, "--prefix", "acme:", *at)
    assert made.exit_code == 0, made.stderr
    assert "at most 20.5 requests_per_s, 100 streams, 1000000 state_bytes" in made.stderr
    key = made.stdout.decode().strip()
    key_id = key.split("_")[1]
    shown = json.loads(keys("show", key_id, *at).stdout)
    assert shown["limits"] == {"requests_per_s": 20.5, "streams": 100, "state_bytes": 1_000_000}
    with pipeline_server.client() as client:
        record = decode_key(client.hget("carry:keys", key_id))
    assert record.limits == KeyLimits(requests_per_s=20.5, streams=100, state_bytes=1_000_000)

    monkeypatch.setenv("CARRY_API_KEY", key)
    signed = keys("token", "--prefix", "acme:7:", "--minutes", "5", "--allow", "predict")
    assert signed.exit_code == 0, signed.stderr
    now_ms = time.time_ns() // 1_000_000
    holder = record.caller(key_id)
    caller = verify_token(
        signed.stdout.decode().strip(), {key_id: record}, now_ms, lambda *_: holder
    )
    assert (caller.prefix, caller.verbs) == ("acme:7:", {Verb.PREDICT})
    assert caller.expires_ms is not None
    assert abs(caller.expires_ms - now_ms - 300_000) < 60_000

    monkeypatch.setenv("CARRY_API_KEY", "wrong")
    failed = keys("token")
    assert failed.exit_code == 1
    assert "expected an access key in CARRY_API_KEY" in failed.stderr


@pytest.mark.parametrize("option", ["--streams=0", "--requests-per-s=-1", "--days=0"])
def test_limits_that_allow_nothing_are_usage_errors(option: str) -> None:
    assert keys("create", "shop", option).exit_code == 2


def test_tokens_that_expire_at_once_are_usage_errors() -> None:
    assert keys("token", "--minutes=0").exit_code == 2
