"""Tokens that keys sign: what they narrow, and which are not accepted."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
import pytest

from service.access.caller import Caller, Verb
from service.access.keys import AccessKey, KeyText, new_key
from service.access.limits import KeyLimits
from service.access.tokens import TokenClaims, is_token, sign_token, verify_token
from service.core.errors import Forbidden, Unauthenticated

NOW_MS = 1_700_000_000_000
NOW_S = NOW_MS // 1000
LIMITS = KeyLimits(concurrent_requests=3)
EXP = {"exp": NOW_S + 60}


@pytest.fixture(scope="module")
def made() -> tuple[KeyText, AccessKey]:
    record = AccessKey(
        name="shop",
        verbs=(Verb.PREDICT, Verb.LIST),
        models=("pro*", "small"),
        prefix="acme:",
        created_ms=0,
        expires_ms=NOW_MS + 3_600_000,
        limits=LIMITS,
    )
    return new_key(record)


def encoded(key: KeyText, claims: Any, digest: bytes | None = None, **header: Any) -> str:
    """A token of any claims, made without the service's code, by RFC 7515 and RFC 7518."""

    def part(value: bytes) -> bytes:
        return base64.urlsafe_b64encode(value).rstrip(b"=")

    head = {"alg": "HS256", "typ": "JWT", "kid": key.key_id, **header}
    signed = part(json.dumps(head).encode()) + b"." + part(json.dumps(claims).encode())
    if digest is None:
        digest = hashlib.sha256(key.secret.encode()).digest()
    return (signed + b"." + part(hmac.digest(digest, signed, "sha256"))).decode()


def verified(made: tuple[KeyText, AccessKey], token: str, now_ms: int = NOW_MS) -> Caller:
    key, record = made
    return verify_token(token, {key.key_id: record}, now_ms, lambda key_id, key: key.caller(key_id))


def test_token_of_another_library_narrows_its_key(made: tuple[KeyText, AccessKey]) -> None:
    claims = {
        **EXP,
        "iss": "shop",
        "sub": "tenant 7",
        "iat": NOW_S,
        "jti": "1",
        "nbf": NOW_S,
        "verbs": ["predict"],
        "models": ["probe", "pro*e"],
        "prefix": "acme:7:",
    }
    key, record = made
    by_library = jwt.encode(
        claims,
        hashlib.sha256(key.secret.encode()).digest(),
        algorithm="HS256",
        headers={"kid": key.key_id},
    )
    for token in (encoded(key, claims), by_library):
        assert is_token(token)
        caller = verified(made, token)
        caller.check((Verb.PREDICT,), "probe", "acme:7:x")
        for verb, model, stream in (
            (Verb.LIST, "probe", "acme:7:x"),
            (Verb.PREDICT, "small", "acme:7:x"),
            (Verb.PREDICT, "probe", "acme:8:x"),
        ):
            with pytest.raises(Forbidden):
                caller.check((verb,), model, stream)
        assert caller.key_id == key.key_id
        assert (caller.name, caller.subject) == ("shop", "tenant 7")
        assert caller.limits == LIMITS
        assert caller.expires_ms == NOW_MS + 60_000
        assert caller.signer == record.caller(key.key_id)


def test_token_without_scope_has_that_of_its_key(made: tuple[KeyText, AccessKey]) -> None:
    key, record = made
    caller = verified(made, sign_token(key, TokenClaims(exp=NOW_S + 1e6)))
    holder = record.caller(key.key_id)
    assert caller.verbs == holder.verbs
    assert (caller.models, caller.prefix) == (holder.models, holder.prefix)
    # not longer than the key itself
    assert caller.expires_ms == holder.expires_ms


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({**EXP, "verbs": ["predict", "delete"]}, "`verbs` claims more"),
        ({**EXP, "verbs": []}, "at least one"),
        ({**EXP, "verbs": ["fly"]}, "verbs"),
        ({**EXP, "models": ["*"]}, "`models` claims more"),
        ({**EXP, "models": ["pr*"]}, "`models` claims more"),
        ({**EXP, "models": ["pro", "smaller"]}, "`models` claims more"),
        ({**EXP, "models": ["pro.*"]}, "`models` claims more"),
        ({**EXP, "models": []}, "at least one"),
        ({**EXP, "prefix": "acme"}, "`prefix` claims more"),
        ({**EXP, "prefix": ""}, "`prefix` claims more"),
        ({**EXP, "aud": "other"}, "aud"),
        ({**EXP, "max_streams": 3}, "max_streams"),
        ({"exp": NOW_S}, "it has expired"),
        ({"exp": str(NOW_S + 60)}, "exp"),
        ({"exp": 1e308}, "exp"),
        ({**EXP, "nbf": NOW_S + 1}, "not valid yet"),
        ({}, "exp"),
        ([], "object"),
    ],
)
def test_claims_that_do_not_narrow_are_rejected(
    made: tuple[KeyText, AccessKey], claims: Any, reason: str
) -> None:
    with pytest.raises(Unauthenticated, match=reason):
        verified(made, encoded(made[0], claims))


def test_tokens_that_the_key_did_not_sign_are_rejected(made: tuple[KeyText, AccessKey]) -> None:
    key, record = made
    other, _ = new_key(record)
    good = encoded(key, EXP)
    head, claims, signature = good.split(".")
    wider = encoded(key, {**EXP, "sub": "x"}).split(".")[1]
    nested = base64.urlsafe_b64encode(b"[" * 2900).decode()
    unsigned = jwt.encode(EXP, "", algorithm="none", headers={"kid": key.key_id})
    forged = (
        encoded(KeyText(key.key_id, other.secret), EXP),
        encoded(other, EXP),
        encoded(key, EXP, kid=None),
        encoded(key, EXP, kid=[key.key_id]),
        encoded(key, EXP, alg="HS512"),
        encoded(key, EXP, alg="none"),
        encoded(key, EXP, crit=["exp"]),
        unsigned,
        f"{head}.{wider}.{signature}",
        f"{head}.{claims}.",
        f"{head}.{claims}.{signature[:-2]}AA",
        "..",
        "a.b.c",
        f"{nested}.{claims}.{signature}",
        f"{head}.{claims}.{signature}" + "A" * 5000,
    )
    assert verified(made, good).key_id == key.key_id
    for token in forged:
        with pytest.raises(Unauthenticated, match="the token is not accepted"):
            verified(made, token)


def test_answer_does_not_reveal_whether_the_id_of_a_token_exists(
    made: tuple[KeyText, AccessKey],
) -> None:
    key, record = made
    other, _ = new_key(record)
    details = set()
    for key_id in (key.key_id, other.key_id):
        with pytest.raises(Unauthenticated) as caught:
            verified(made, encoded(KeyText(key_id, other.secret), EXP))
        details.add(caught.value.detail)
    assert len(details) == 1


def test_token_ends_with_its_key(made: tuple[KeyText, AccessKey]) -> None:
    token = encoded(made[0], {"exp": NOW_S + 1e6})
    assert verified(made, token)
    with pytest.raises(Unauthenticated, match=r"its key \w+ is expired"):
        verified(made, token, NOW_MS + 3_600_000)


def test_record_without_a_secret_signs_nothing() -> None:
    record = AccessKey(name="a", verbs=(Verb.LIST,), models=("*",), prefix="", created_ms=0)
    key = KeyText("0" * 12, "")
    with pytest.raises(Unauthenticated):
        verified((key, record), encoded(key, EXP, digest=b""))
