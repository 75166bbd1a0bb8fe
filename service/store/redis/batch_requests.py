"""The requests of a batch, the load of its streams and their commit: each is one buffer.

The client library would allocate and format every argument by itself, which costs more than the
rest of a commit. The names of recent streams are kept as they are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from service.core.values import EPOCH_BYTES, TAG_BYTES, StreamKey
from service.store.base import CommitColumns
from service.store.redis.requests import Script, StoreRequest
from service.store.settings import StoreSettings

BUSY_STREAMS: Final = 4096
"""Streams whose names are kept between their requests."""

EXPECTED_BYTES: Final = EPOCH_BYTES + TAG_BYTES

_CALL: Final = b"*%d\r\n%b$%d\r\n%d\r\n%b%b"
_STREAM: Final = b"$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n"


class BatchRequests:
    """Makes the requests of batches; inside a running event loop.

    Args:
        commit_script: `commit.lua`.
    """

    def __init__(self, settings: StoreSettings, commit_script: Script):
        self._script = commit_script
        self._max_reply_bytes = settings.reply_max_bytes if settings.reply_ttl_ms else 0
        self._ttls = _pack(str(settings.idle_ttl_ms), str(settings.reply_ttl_ms))
        keys = settings.keys

        @lru_cache(maxsize=BUSY_STREAMS)
        def pack_names(key: StreamKey) -> tuple[bytes, bytes]:
            """The name of a stream's state, and its names of state and reply."""
            pair = keys.pair(key)
            return _pack(pair[0]), _pack(*pair)

        self._pack_names = pack_names

    def load(self, keys: Sequence[StreamKey], slot: int) -> StoreRequest:
        """The command that reads the states of streams in one slot."""
        names = [name for name, _ in map(self._pack_names, keys)]
        packed = b"".join([b"*%d\r\n$4\r\nMGET\r\n" % (1 + len(keys)), *names])
        return StoreRequest.for_packed(packed, slot)

    def commit(self, commits: CommitColumns, slot: int) -> StoreRequest:
        """The call of the script that commits streams in one slot."""
        count, script, most = len(commits), self._script, self._max_reply_bytes
        names = b"".join([pair for _, pair in map(self._pack_names, commits.keys)])
        digits = len(str(2 * count))
        packed = [_CALL % (5 + 5 * count, script.by_hash, digits, 2 * count, names, self._ttls)]
        for head, state, reply in zip(
            commits.expected, commits.states, commits.replies, strict=True
        ):
            expected = head[:EXPECTED_BYTES]
            kept = reply if len(reply) <= most else b""
            packed.append(_STREAM % (len(expected), expected, len(state), state, len(kept), kept))
        return StoreRequest.for_packed(b"".join(packed), slot, script, commits.keys)


def _pack(*arguments: str) -> bytes:
    """Arguments of a command as they are sent: bulk strings of RESP."""
    return b"".join(b"$%d\r\n%b\r\n" % (len(each), each) for each in map(str.encode, arguments))
