"""The access keys of one process, at most a second behind the store; they name a request's caller.

Keys are read again every `REFRESH_S`, as a whole if their version has changed. While the store
does not answer, the last known keys are accepted for `MAX_STALE_S`, after that none: a request is
never accepted unchecked. A service without keys is open; it requires keys from when the first one
is created, and continues to if all of them are lost or revoked. So does a new process on a store
that has had keys, such as one that was restored without them.

A key is verified once for each header; then the header finds its caller in `cached`, from which one
is dropped as soon as its key is revoked, changed or expired, or the keys are too old.

Use from one event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import structlog

from service.access.caller import ANYONE, Caller
from service.access.keys import AccessKey, AccessKeyError, decode_key, parse_key
from service.access.limits import KeyLimiters, KeyLimits, StreamQuota
from service.access.tokens import MAX_TOKEN_CHARACTERS, is_token, verify_token
from service.core.errors import CarryError, StoreUnavailable, Unauthenticated
from service.store.capabilities import Quota, RateLeases, StoredKeys, StreamUsage

REFRESH_S: Final = 0.5
"""Time between two reads of the keys' version."""

READ_S: Final = 0.4
"""Longest wait for the store when the keys are polled."""

MAX_STALE_S: Final = 60.0
"""How long the last known keys are accepted while the store does not answer."""

MAX_CACHED: Final = 4096
"""Most cached headers; when there are more, all are verified again."""

SCHEME: Final = b"bearer "
MAX_AUTHORIZATION_BYTES: Final = len(SCHEME) + MAX_TOKEN_CHARACTERS
"""Longest header; it bounds the memory of those that were accepted, which are kept."""

_EXPECTED: Final = "expected Authorization: Bearer carry_..., an access key of this service"
_UNKNOWN: Final = f"{_EXPECTED}, got an unknown key"
"""The same for an unknown id and a wrong secret, so that it does not reveal which ids exist."""

log = structlog.get_logger(__name__)


OnEnd = Callable[[CarryError], None]
"""Called with the reason when a caller is no longer accepted."""


def requires_keys(required: bool | None, stored: tuple[bytes, Mapping[str, bytes]]) -> bool:
    """Whether requests need a key, by the setting and the version and records in the store."""
    version, records = stored
    return bool(required or records or (version and required is None))


class AccessKeys:
    """The keys of one process.

    Args:
        stored: where they are read from.
        rates, usage: count for their limits.
        required: whether requests need a key even if there is none; None if the store has had one.
        now_ms: wall clock in epoch milliseconds, for expiry.
        on_change: called with `access_key_created` or `access_key_revoked`, and facts, when the
            keys in the store have changed.

    Attributes:
        open_caller: the caller of each request while they need no key; None if they need one.
        cached: verified headers and their callers, only while requests need a key.
        limiters: the limits of rates.
    """

    def __init__(
        self,
        stored: StoredKeys,
        rates: RateLeases,
        usage: StreamUsage,
        *,
        required: bool | None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        on_change: Callable[..., None] = lambda change, **facts: None,
    ):
        self._stored = stored
        self._usage = usage
        self._on_change = on_change
        self._now_ms = now_ms
        self._required = required
        self.open_caller: Caller | None = None if required else ANYONE
        self.cached: dict[bytes | None, Caller] = {}
        self.limiters = KeyLimiters(rates)
        self._quotas: dict[str, StreamQuota] = {}
        self._on_end: dict[Caller, set[OnEnd]] = {}
        self._version: bytes | None = None
        self._keys: dict[str, AccessKey] = {}
        self._holders: dict[str, Caller] = {}
        self._read_s = time.monotonic()
        self._is_failing = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Read the keys, and keep reading them; once, after the store is started.

        Raises:
            StoreUnavailable, StoreRefused
        """
        await self._read(math.inf)
        self._drop_ended()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._run()), loop.create_task(self.limiters.run())]

    async def close(self) -> None:
        """Stop reading; once, before the store is closed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

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
        self._drop_ended()

    async def _read(self, deadline_s: float) -> None:
        began_s = time.monotonic()
        stored = await self._stored.read(self._version, deadline_s)
        self._read_s = began_s
        if stored is None:
            return
        is_first, (self._version, records) = self._version is None, stored
        if requires_keys(self._required, stored):
            self.open_caller = None
        keys: dict[str, AccessKey] = {}
        for key_id, record in records.items():
            try:
                keys[key_id] = decode_key(record)
            except AccessKeyError as error:
                log.error("access_key_not_readable", key=key_id, reason=str(error))
        before, self._keys = self._keys, keys
        self._holders.clear()
        if not is_first:
            self._report(before)

    def _report(self, before: Mapping[str, AccessKey]) -> None:
        for key_id, key in self._keys.items():
            known = before.get(key_id)
            if known is None:
                self._on_change("access_key_created", key=key_id, name=key.name)
            if key.revoked_ms is not None and (known is None or known.revoked_ms is None):
                self._on_change("access_key_revoked", key=key_id, name=key.name)

    def caller(self, authorization: bytes | None) -> Caller:
        """The caller of a request with this header; call it before more of the request is read.

        Raises:
            Unauthenticated: there is no key or token that is accepted.
            StoreUnavailable: the keys could not be read for too long.
        """
        if self.open_caller is not None:
            return self.open_caller
        caller = self._authenticate(authorization)
        known = self.cached.get(authorization)
        if known == caller:
            return known
        if len(self.cached) >= MAX_CACHED:
            self.cached.clear()
        self.cached[authorization] = caller
        return caller

    def notify_end(self, caller: Caller, on_end: OnEnd) -> Callable[[], None]:
        """Call `on_end` once the caller is no longer accepted, within a second of that; for what
        outlives its request. Returns the function that ends this."""
        listeners = self._on_end.setdefault(caller, set())
        listeners.add(on_end)

        def remove() -> None:
            listeners.discard(on_end)
            if not listeners:
                self._on_end.pop(caller, None)

        return remove

    def _drop_ended(self) -> None:
        """Drop the callers that are no longer accepted."""
        stale = self._stale() if self.open_caller is None else None
        if stale is not None:
            self.cached.clear()
        for authorization, caller in list(self.cached.items()):
            if not self.is_current(caller):
                del self.cached[authorization]
        for caller, listeners in list(self._on_end.items()):
            reason = stale or self._end(caller)
            if reason is not None:
                del self._on_end[caller]
                for on_end in list(listeners):
                    on_end(reason)

    def _end(self, caller: Caller) -> CarryError | None:
        """Why a caller is no longer accepted; None if it is."""
        if caller.key_id is None:
            required = Unauthenticated("the service now requires an access key")
            return required if self.open_caller is None else None
        if self.is_current(caller):
            return None
        return Unauthenticated(f"the key {caller.key_id} is no longer accepted")

    def _authenticate(self, authorization: bytes | None) -> Caller:
        """The holder of the key, or of the token, in an Authorization header."""
        if (stale := self._stale()) is not None:
            raise stale
        if authorization is None:
            raise _rejection(f"{_EXPECTED}, got none", "no_key")
        if authorization[: len(SCHEME)].lower() != SCHEME:
            raise _rejection(f"{_EXPECTED}, got another scheme")
        if len(authorization) > MAX_AUTHORIZATION_BYTES:
            most = f"at most {MAX_AUTHORIZATION_BYTES} bytes"
            raise _rejection(f"{_EXPECTED}, of {most}, got {len(authorization)}")
        bearer = authorization[len(SCHEME) :].strip(b" ").decode("latin-1")
        if is_token(bearer):
            return verify_token(bearer, self._keys, self._now_ms(), self._holder)
        text = parse_key(bearer)
        if text is None:
            raise _rejection(_UNKNOWN)
        key = self._keys.get(text.key_id)
        if key is None or not key.matches(text.secret):
            reason = "unknown_key" if key is None else "wrong_secret"
            raise Unauthenticated(_UNKNOWN).with_key(reason, text.key_id, is_proven=False)
        status = key.status(self._now_ms())
        if status != "active":
            raise _rejection(f"the key {text.key_id} is {status}", status, text.key_id)
        return self._holder(text.key_id, key)

    def _holder(self, key_id: str, key: AccessKey) -> Caller:
        """The holder of a key, made once: cached ones are compared with it twice a second."""
        holder = self._holders.get(key_id)
        if holder is None:
            limiter = self.limiters.limiter(key_id, key.limits)
            quota = self._quota(key_id, key.limits)
            holder = replace(key.caller(key_id), limiter=limiter, quota=quota)
            self._holders[key_id] = holder
        return holder

    def _quota(self, key_id: str, limits: KeyLimits | None) -> StreamQuota | None:
        """The quota of a key; None if it has none."""
        if limits is None or (limits.streams is None and limits.state_bytes is None):
            return None
        quota, known = Quota(limits.streams, limits.state_bytes), self._quotas.get(key_id)
        if known is None or known.quota != quota:
            known = self._quotas[key_id] = StreamQuota(self._usage, key_id, quota)
        return known

    def _stale(self) -> StoreUnavailable | None:
        """The error if the keys were not read recently enough to be relied on."""
        if time.monotonic() - self._read_s <= MAX_STALE_S:
            return None
        return StoreUnavailable(
            f"the access keys could not be read from the store for {MAX_STALE_S:g} s",
            retry_after_s=1,
        )

    def is_current(self, caller: Caller) -> bool:
        """Whether the caller's key is still accepted, with the same scope, and so its token."""
        key, now_ms = self._keys.get(caller.key_id or ""), self._now_ms()
        if caller.key_id is None or key is None or key.status(now_ms) != "active":
            return False
        known, holder = self._holder(caller.key_id, key), caller.signer or caller
        is_same = known is holder or known == holder
        return is_same and (caller.expires_ms is None or caller.expires_ms > now_ms)


def _rejection(
    detail: str, reason: str = "malformed", key_id: str | None = None
) -> Unauthenticated:
    return Unauthenticated(detail).with_key(reason, key_id)
