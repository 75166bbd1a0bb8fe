"""Access keys: their text, and the record that the store has of each.

A key is `carry_<id>_<secret>`: the id, 12 hex digits, is public and names the key in lists and
logs; the secret, 64 hex digits, is drawn from 256 random bits. The store has only the SHA-256 of
the secret. A secret of such entropy cannot be guessed, so that a slow hash would protect nothing
(docs/decisions/access.md). A record is JSON; the decoder rejects one with a member that it does not
know, since that could restrict the key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import Final, Literal, NamedTuple

import msgspec

from service.access.caller import Caller, Verb, is_model_pattern
from service.access.limits import KeyLimits
from service.core.errors import OperatorError

FORMAT: Final = 1
MAX_NAME: Final = 64
MAX_PREFIX: Final = 256
_KEY: Final = re.compile(r"carry_([0-9a-f]{12})_([0-9a-f]{64})", re.ASCII)
_is_key_id = re.compile(r"[0-9a-f]{12}", re.ASCII).fullmatch
_is_prefix = re.compile(r"[A-Za-z0-9._:@-]*", re.ASCII).fullmatch


class AccessKeyError(OperatorError, ValueError):
    """A key that cannot be made, or a record that cannot be read; one line."""


class KeyText(NamedTuple):
    """The parts of a key."""

    key_id: str
    secret: str

    def __str__(self) -> str:
        return f"carry_{self.key_id}_{self.secret}"


def parse_key(text: str) -> KeyText | None:
    """The parts of a key; None for other text."""
    match = _KEY.fullmatch(text)
    return None if match is None else KeyText(match[1], match[2])


class AccessKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The record of one key.

    Attributes:
        secret_sha256: in hex.
        revoked_ms: when it was revoked, epoch milliseconds; the record stays, so that a service
            whose last key was revoked does not become open.
    """

    format: Literal[1] = FORMAT
    name: str
    secret_sha256: str = ""
    verbs: tuple[Verb, ...]
    models: tuple[str, ...]
    prefix: str
    created_ms: int
    expires_ms: int | None = None
    revoked_ms: int | None = None
    limits: KeyLimits | None = None

    def matches(self, secret: str) -> bool:
        """Whether this is the key's secret; takes the same time for every other one."""
        return hmac.compare_digest(_sha256(secret), self.secret_sha256)

    def caller(self, key_id: str) -> Caller:
        """The key's holder, whose limits are not enforced yet."""
        return Caller(
            key_id,
            self.name,
            frozenset(self.verbs),
            self.models,
            self.prefix,
            self.expires_ms,
            self.limits,
        )

    def status(self, now_ms: int) -> Literal["active", "expired", "revoked"]:
        """Whether it is accepted, and otherwise why not."""
        if self.revoked_ms is not None:
            return "revoked"
        is_expired = self.expires_ms is not None and self.expires_ms <= now_ms
        return "expired" if is_expired else "active"


def new_key(key: AccessKey) -> tuple[KeyText, AccessKey]:
    """Draw a key; returns it and its record, the only time that its secret is known.

    Args:
        key: the record without a secret.

    Raises:
        AccessKeyError: a member is not allowed.
    """
    _check(key)
    text = KeyText(secrets.token_hex(6), secrets.token_hex(32))
    return text, msgspec.structs.replace(key, secret_sha256=_sha256(text.secret))


def check_key_id(text: str) -> str:
    """The id, if it is one.

    Raises:
        AccessKeyError
    """
    if not _is_key_id(text):
        raise AccessKeyError(f"expected the id of a key, 12 hex digits, got {text[:100]!r}")
    return text


def encode_key(key: AccessKey) -> bytes:
    """The record as the store has it."""
    return msgspec.json.encode(key)


def decode_key(record: bytes) -> AccessKey:
    """Decode a record.

    Raises:
        AccessKeyError
    """
    try:
        key = _DECODER.decode(record)
    except msgspec.MsgspecError as error:
        raise AccessKeyError(f"expected the record of an access key: {error}") from error
    _check(key)
    return key


_DECODER: Final = msgspec.json.Decoder(AccessKey)


def _check(key: AccessKey) -> None:
    if not 1 <= len(key.name) <= MAX_NAME or not key.name.isprintable():
        raise AccessKeyError(
            f"name: expected 1 to {MAX_NAME} printable characters, got {key.name[:100]!r}"
        )
    if not key.verbs:
        raise AccessKeyError(f"verbs: expected one or more of {', '.join(Verb)}, got none")
    for pattern in key.models or ("",):
        if not is_model_pattern(pattern):
            raise AccessKeyError(
                "models: expected names of a-z 0-9 _ -, in which * stands for any characters, got "
                f"{pattern[:100]!r}"
            )
    if len(key.prefix) > MAX_PREFIX or not _is_prefix(key.prefix):
        raise AccessKeyError(
            f"prefix: expected at most {MAX_PREFIX} of A-Z a-z 0-9 . _ : @ -, got "
            f"{key.prefix[:100]!r}"
        )


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
