"""Cache of the access keys in one process, at most a second behind the store.

Keys are read again every `REFRESH_S`, as a whole if their version has changed. While the store
does not answer, the last known keys are accepted for `MAX_STALE_S`, after that none: a request is
never accepted unchecked. A service without keys is open; it requires keys from when the first one
is created, and continues to if all of them are lost or revoked. So does a new process on a store
that has had keys, such as one that was restored without them.

Use from one event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from service.access.keys import AccessKey, AccessKeyError, decode_key, parse_key
from service.access.principal import Principal
from service.access.tokens import MAX_TOKEN_CHARACTERS, is_token, verify_token
from service.core.errors import CarryError, StoreUnavailable, Unauthenticated
from service.store.capabilities import StoredKeys

REFRESH_S: Final = 0.5
"""Time between two reads of the keys' version."""

READ_S: Final = 0.4
"""Longest wait for the store when the keys are polled."""

MAX_STALE_S: Final = 60.0
"""How long the last known keys are accepted while the store does not answer."""

SCHEME: Final = b"bearer "
MAX_AUTHORIZATION_BYTES: Final = len(SCHEME) + MAX_TOKEN_CHARACTERS
"""Longest header; it bounds the memory of those that were accepted, which are kept."""

_EXPECTED: Final = "expected Authorization: Bearer carry_..., an access key of this service"
_UNKNOWN: Final = f"{_EXPECTED}, got an unknown key"
"""The same for an unknown id and a wrong secret, so that it does not reveal which ids exist."""

log = structlog.get_logger(__name__)


def requires_keys(required: bool | None, stored: tuple[bytes, Mapping[str, bytes]]) -> bool:
    """Whether requests need a key, by the setting and the version and records in the store."""
    version, records = stored
    return bool(required or records or (version and required is None))


class AccessKeys:
    """The keys of one process.

    Args:
        stored: where they are read from.
        required: whether requests need a key even if there is none; None if the store has had one.
        now_ms: wall clock in epoch milliseconds, for expiry.
        on_change: called with `access_key_created` or `access_key_revoked`, and facts, when the
            keys in the store have changed.
        on_refresh: called after each attempt to read the keys, and when `start` has read them.

    Attributes:
        is_open: whether requests need no key.
    """

    def __init__(
        self,
        stored: StoredKeys,
        *,
        required: bool | None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        on_change: Callable[..., None] = lambda change, **facts: None,
    ):
        self._stored = stored
        self._on_change = on_change
        self._now_ms = now_ms
        self._required = required
        self.is_open = not required
        self.on_refresh: Callable[[], None] = lambda: None
        self._version: bytes | None = None
        self._keys: dict[str, AccessKey] = {}
        self._principals: dict[str, Principal] = {}
        self._read_s = time.monotonic()
        self._is_failing = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the keys, and keep reading them; once, after the store is started.

        Raises:
            StoreUnavailable, StoreRefused
        """
        await self._read(math.inf)
        self.on_refresh()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop reading; once, before the store is closed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Read the keys again, if the store answers."""
        try:
            await self._read(time.monotonic() + READ_S)
        except CarryError as error:
            if not self._is_failing:
                log.warning("access_keys_not_read", code=error.code, reason=error.detail)
            self._is_failing = True
        else:
            self._is_failing = False
        self.on_refresh()

    async def _read(self, deadline_s: float) -> None:
        began_s = time.monotonic()
        stored = await self._stored.read(self._version, deadline_s)
        self._read_s = began_s
        if stored is None:
            return
        is_first, (self._version, records) = self._version is None, stored
        if requires_keys(self._required, stored):
            self.is_open = False
        keys: dict[str, AccessKey] = {}
        for key_id, record in records.items():
            try:
                keys[key_id] = decode_key(record)
            except AccessKeyError as error:
                log.error("access_key_not_readable", key=key_id, reason=str(error))
        before, self._keys = self._keys, keys
        self._principals.clear()
        if not is_first:
            self._report(before)

    def _report(self, before: Mapping[str, AccessKey]) -> None:
        for key_id, key in self._keys.items():
            known = before.get(key_id)
            if known is None:
                self._on_change("access_key_created", key=key_id, name=key.name)
            if key.revoked_ms is not None and (known is None or known.revoked_ms is None):
                self._on_change("access_key_revoked", key=key_id, name=key.name)

    def authenticate(self, authorization: bytes | None) -> Principal:
        """The holder of the key, or of the token, in an Authorization header.

        Raises:
            Unauthenticated: there is none, or it is not valid.
            StoreUnavailable: the keys could not be read for too long.
        """
        self.check_fresh()
        if authorization is None:
            raise Unauthenticated(f"{_EXPECTED}, got none").with_key("no_key", None)
        if authorization[: len(SCHEME)].lower() != SCHEME:
            raise Unauthenticated(f"{_EXPECTED}, got another scheme").with_key("malformed", None)
        if len(authorization) > MAX_AUTHORIZATION_BYTES:
            raise Unauthenticated(
                f"{_EXPECTED}, of at most {MAX_AUTHORIZATION_BYTES} bytes, got {len(authorization)}"
            ).with_key("malformed", None)
        bearer = authorization[len(SCHEME) :].strip(b" ").decode("latin-1")
        if is_token(bearer):
            return verify_token(bearer, self._keys, self._now_ms())
        text = parse_key(bearer)
        if text is None:
            raise Unauthenticated(_UNKNOWN).with_key("malformed", None)
        key = self._keys.get(text.key_id)
        if key is None or not key.matches(text.secret):
            reason = "unknown_key" if key is None else "wrong_secret"
            raise Unauthenticated(_UNKNOWN).with_key(reason, text.key_id, is_proven=False)
        status = key.status(self._now_ms())
        if status != "active":
            raise Unauthenticated(f"the key {text.key_id} is {status}").with_key(
                status, text.key_id
            )
        return self._principal(text.key_id, key)

    def _principal(self, key_id: str, key: AccessKey) -> Principal:
        """The holder of a key, made once: entries are compared with it twice a second."""
        principal = self._principals.get(key_id)
        if principal is None:
            principal = self._principals[key_id] = key.principal(key_id)
        return principal

    def check_fresh(self) -> None:
        """Check that the keys were read recently enough to be relied on.

        Raises:
            StoreUnavailable
        """
        if time.monotonic() - self._read_s > MAX_STALE_S:
            raise StoreUnavailable(
                f"the access keys could not be read from the store for {MAX_STALE_S:g} s",
                retry_after_s=1,
            )

    def is_current(self, principal: Principal) -> bool:
        """Whether the principal's key is still accepted, with the same scope, and so its token."""
        key, now_ms = self._keys.get(principal.key_id), self._now_ms()
        if key is None or key.status(now_ms) != "active":
            return False
        known, holder = self._principal(principal.key_id, key), principal.signer or principal
        is_same = known is holder or known == holder
        return is_same and (principal.expires_ms is None or principal.expires_ms > now_ms)
