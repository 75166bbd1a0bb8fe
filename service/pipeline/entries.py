"""The entries of one process: from an Authorization header to the pipeline as its key may use it.

A key is verified once for each header; then the header finds its entry in `cached`, from which an
entry is dropped as soon as its key is revoked, changed or expired, or the keys are too old.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from service.access.key_cache import AccessKeys
from service.access.limits import KeyLimiters
from service.core.errors import CarryError, StoreUnavailable, Unauthenticated
from service.pipeline.entry import Entry, KeyEntry
from service.pipeline.pipeline import Pipeline

MAX_CACHED: Final = 4096
"""Most headers with an entry; when there are more, all are verified again."""

OnEnd = Callable[[CarryError], None]
"""Called with the reason when an entry may no longer be used."""


class Entries:
    """Gives entries to transports.

    Args:
        keys: the access keys; None for a service that is always open.

    Attributes:
        open: the entry of everybody; None if requests need a key.
        cached: verified headers and their entries, only while requests need a key.
    """

    def __init__(self, pipeline: Pipeline, keys: AccessKeys | None = None):
        self._pipeline = pipeline
        self._keys = keys
        self._models = pipeline.models
        self._limiters = KeyLimiters()
        self._on_end: dict[Entry, set[OnEnd]] = {}
        self.open: Entry | None = pipeline
        self.cached: dict[bytes | None, KeyEntry] = {}
        if keys is not None:
            keys.on_refresh = self._refresh
            self._refresh()

    def entry(self, authorization: bytes | None) -> Entry:
        """The entry of a request with this header, which need not be read further before.

        Raises:
            Unauthenticated: there is no key that is accepted.
            StoreUnavailable: the keys could not be read for too long.
        """
        if self.open is not None or self._keys is None:
            return self._pipeline
        principal = self._keys.authenticate(authorization)
        if authorization is None:
            raise RuntimeError("a request without a key was authenticated")
        entry = self.cached.get(authorization)
        if entry is None or entry.principal != principal:
            if len(self.cached) >= MAX_CACHED:
                self.cached.clear()
            limiter = self._limiters.limiter(principal.key_id, principal.limits)
            quota = self._pipeline.quotas.quota(principal.key_id, principal.limits)
            entry = KeyEntry(self._pipeline, principal, limiter, quota)
            self.cached[authorization] = entry
        return entry

    def notify_end(self, entry: Entry, on_end: OnEnd) -> Callable[[], None]:
        """Call `on_end` once the entry may no longer be used, within a second of that; for what
        outlives its request. Returns the function that ends this."""
        listeners = self._on_end.setdefault(entry, set())
        listeners.add(on_end)

        def remove() -> None:
            listeners.discard(on_end)
            if not listeners:
                self._on_end.pop(entry, None)

        return remove

    def _refresh(self) -> None:
        """Drop the entries that may no longer be used."""
        keys = self._keys
        if keys is None:
            return
        self.open = self._pipeline if keys.is_open else None
        stale: CarryError | None = None
        try:
            if not keys.is_open:
                keys.check_fresh()
        except StoreUnavailable as error:
            stale = error
        if stale is not None or self._models is not self._pipeline.models:
            self._models = self._pipeline.models
            self.cached.clear()
        for authorization, cached in list(self.cached.items()):
            if not keys.is_current(cached.principal):
                del self.cached[authorization]
        for entry, listeners in list(self._on_end.items()):
            reason = stale or self._end(keys, entry)
            if reason is not None:
                del self._on_end[entry]
                for on_end in list(listeners):
                    on_end(reason)

    def _end(self, keys: AccessKeys, entry: Entry) -> CarryError | None:
        """Why an entry may no longer be used; None if it may."""
        if isinstance(entry, KeyEntry):
            if keys.is_current(entry.principal):
                return None
            return Unauthenticated(f"the key {entry.principal.key_id} is no longer accepted")
        if keys.is_open:
            return None
        return Unauthenticated("the service now requires an access key")
