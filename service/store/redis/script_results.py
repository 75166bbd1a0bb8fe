"""Results of the commit and delete scripts, stream by stream."""

from __future__ import annotations

from typing import Any, Final

import structlog

from service.core.errors import StoreRefused
from service.core.values import StreamKey
from service.store.base import COMMITTED, CommitResult, Conflicted, state_damaged_error
from service.store.codec import CodecError, StateHeader
from service.store.redis.connections import RETRY_AFTER_S
from service.store.redis.router import Router

WRITTEN: Final = [1]
"""What a script returns for a stream that it wrote."""

log = structlog.get_logger(__name__)


def parse_result(router: Router, key: StreamKey, reply: list[Any]) -> CommitResult:
    """The result of one stream, as a script returned it."""
    if reply[0] == 1:
        return COMMITTED
    if reply[0] == 0:
        if len(reply) == 1:
            return Conflicted(None)
        try:
            header = StateHeader.decode(reply[1])
            return Conflicted(None if header.is_tombstone else header.head)
        except CodecError as error:
            return state_damaged_error(key, error, reply[1])
    text = reply[1].decode("utf-8", "replace")
    if text.startswith("WRONGTYPE"):
        # The value is no string. A deletion identifies it by the same bytes (`delete.lua`).
        return state_damaged_error(key, CodecError(text), bytes(32) + reply[1])
    if text.startswith("READONLY"):
        router.refresh()
    log.error("store_refused", model=key.model, stream=key.stream, reason=text)
    return StoreRefused(
        f"the store at {router.redacted_url} refused stream {key.stream!r}: {text}",
        stream=key.stream,
        retry_after_s=RETRY_AFTER_S,
    )
