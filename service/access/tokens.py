"""Tenant tokens: JSON Web Tokens that are signed by an access key and allow a part of what it does.

The holder of a key signs tokens without the service: HS256 over the claims, with the SHA-256 of the
key's secret, and the key's id as `kid` in the header. The service has that digest, so it verifies a
token without another secret. A token expires (`exp`), may not be used before a time (`nbf`), and
narrows verbs, models and prefix; one that claims more than its key allows is rejected, as is one
with a claim that the service does not know, since it could be meant as a restriction. It ends with
its key, and shares the key's limits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Final

import jwt
import msgspec

from service.access.caller import Caller, Verb, is_model_pattern
from service.access.keys import AccessKey, KeyText
from service.core.errors import Unauthenticated

ALGORITHM: Final = "HS256"
MAX_TOKEN_CHARACTERS: Final = 4096
MAX_SUBJECT: Final = 100
"""Characters of a subject that are logged."""

DIGEST_BYTES: Final = 32
MAX_EXP_S: Final = 253_402_300_799
"""The last second of the year 9999."""


class TokenClaims(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The claims of a token.

    Attributes:
        exp: when it expires, in epoch seconds.
        nbf: from when on it is accepted, in epoch seconds.
        sub: the tenant, for logs; `iss`, `iat` and `jti` are ignored.
        verbs, models, prefix: what it allows; None for what its key allows.
    """

    exp: Annotated[float, msgspec.Meta(le=MAX_EXP_S)]
    nbf: float | None = None
    sub: str | None = None
    iss: str | None = None
    iat: float | None = None
    jti: str | None = None
    verbs: tuple[Verb, ...] | None = None
    models: tuple[str, ...] | None = None
    prefix: str | None = None


def is_token(text: str) -> bool:
    """Whether this is a token, and not a key."""
    return text.count(".") == 2


def sign_token(key: KeyText, claims: TokenClaims) -> str:
    """Sign a token."""
    digest = hashlib.sha256(key.secret.encode()).digest()
    return _JWS.encode(
        msgspec.json.encode(claims), digest, algorithm=ALGORITHM, headers={"kid": key.key_id}
    )


def verify_token(
    text: str,
    keys: Mapping[str, AccessKey],
    now_ms: int,
    holder: Callable[[str, AccessKey], Caller],
) -> Caller:
    """The holder of a token.

    Args:
        holder: returns the holder of a key, given its id.

    Raises:
        Unauthenticated: it is not accepted.
    """
    known_id = None
    try:
        if len(text) > MAX_TOKEN_CHARACTERS:
            raise _rejection(f"expected at most {MAX_TOKEN_CHARACTERS} characters, got {len(text)}")
        key_id = jwt.get_unverified_header(text).get("kid")
        key = keys.get(key_id) if isinstance(key_id, str) else None
        known_id = None if key is None else key_id
        digest = b"" if key is None else bytes.fromhex(key.secret_sha256)
        if key is None or key_id is None or len(digest) != DIGEST_BYTES:
            raise _rejection(_NOT_SIGNED, "unknown_key")
        payload = _JWS.decode(text, digest, algorithms=[ALGORITHM])
        claims = _DECODER.decode(payload)
    except jwt.InvalidSignatureError as error:
        rejected = _rejection(_NOT_SIGNED)
        raise rejected.with_key("wrong_secret", known_id, is_proven=False) from error
    except (jwt.PyJWTError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _rejection(str(error)).with_key("malformed", known_id, is_proven=False) from error
    status = key.status(now_ms)
    if status != "active":
        raise _rejection(f"its key {key_id} is {status}", status, key_id)
    if claims.exp * 1000 <= now_ms:
        raise _rejection("it has expired", "expired", key_id)
    if claims.nbf is not None and claims.nbf * 1000 > now_ms:
        raise _rejection("it is not valid yet (nbf)", "not_valid_yet", key_id)
    return _narrow(holder(key_id, key), claims)


def _narrow(holder: Caller, claims: TokenClaims) -> Caller:
    """The key's holder with what the token allows.

    Raises:
        Unauthenticated: the token claims more than its key allows.
    """
    verbs = holder.verbs if claims.verbs is None else frozenset(claims.verbs)
    models = holder.models if claims.models is None else claims.models
    prefix = holder.prefix if claims.prefix is None else claims.prefix
    exceeding = {
        "verbs": not verbs <= holder.verbs,
        # a `*` of the token has to be covered by one of the key, which matches any characters
        "models": not all(is_model_pattern(each) and holder.covers_model(each) for each in models),
        "prefix": not prefix.startswith(holder.prefix),
    }
    for claim, exceeds in exceeding.items():
        if exceeds:
            detail = f"`{claim}` claims more than its key {holder.key_id} allows"
            raise _rejection(detail, f"exceeds_{claim}", holder.key_id)
    if not verbs or not models:
        detail = "expected at least one of `verbs` and one of `models`"
        raise _rejection(detail, "malformed", holder.key_id)
    expires_ms = round(claims.exp * 1000)
    if holder.expires_ms is not None:
        expires_ms = min(expires_ms, holder.expires_ms)
    return replace(
        holder,
        verbs=verbs,
        models=models,
        prefix=prefix,
        expires_ms=expires_ms,
        signer=holder,
        subject=None if claims.sub is None else claims.sub[:MAX_SUBJECT],
    )


_NOT_SIGNED: Final = "expected the signature of a key of this service, and its id as `kid`"
"""The same for an unknown id and a wrong signature, so that it does not tell which ids exist."""

_JWS: Final = jwt.PyJWS()
_DECODER: Final = msgspec.json.Decoder(TokenClaims)


def _rejection(
    detail: str, reason: str = "malformed", key_id: str | None = None
) -> Unauthenticated:
    return Unauthenticated(f"the token is not accepted: {detail}").with_key(reason, key_id)
