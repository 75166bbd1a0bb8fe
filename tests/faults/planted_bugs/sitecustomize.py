"""Plants the bug that `PLANTED_BUG` names in a worker; the service knows nothing of it.

A run puts this folder on the workers' PYTHONPATH. `SCRIPTS` and `TOPIC_SCRIPTS` are changes of the
store's Lua scripts; `CODE`, `VERSION_CODE` and `HANDOVER_CODE` call functions of the service's
modules.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPTS = {
    # A late commit of a worker that caches a removed stream brings it back.
    "raised-stream": (("compare_and_set", "if expected ~= '' then", "if false then"),),
    # A deletion from an abandoned connection deletes a stream that was created since its retry.
    "unconditional-delete": (
        (
            "delete",
            "if head ~= '' and (expected == '' or string.sub(head, 1, #expected) ~= expected) then",
            "if false then",
        ),
    ),
    # A creation from an abandoned connection that arrives after a deletion brings the stream back.
    "no-tombstone": (("delete", "redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])", ""),),
    # After a rollback a stream may come to the same position with other events; a worker that
    # caches the old state there continues from it.
    "position-only": (
        ("compare_and_set", "string.sub(header, 33, 56)", "string.sub(header, 57, 64)"),
        ("delete", "string.sub(header, 33, 56)", "string.sub(header, 57, 64)"),
    ),
}

TOPIC_SCRIPTS = {
    # An owner that was suspended for longer than its lease goes on to read and to commit, also what
    # the next owner has acknowledged.
    "no-fence": (
        ("topic_commit", "ARGV[index]) == 0 then", "ARGV[index]) == 2 then"),
        ("topic_commit", "if stored[1] ~= ARGV[5] or ", "if "),
        ("topic_commit", "tonumber(stored[2]) ~= ARGV[6] - 1", "false"),
        ("topic_read", "if stored ~= fence then", "if false then"),
        ("topic_lease", "if not is_held or tonumber(stored[5]) < tonumber(ARGV[7])", "if false"),
    ),
    # Entries are acknowledged when they are read.
    "acknowledge-first": (
        ("topic_read", "'COUNT', most,", "'COUNT', most, 'NOACK',"),
        ("topic_commit", "ARGV[index]) == 0 then", "ARGV[index]) == 2 then"),
    ),
}


def compare_positions() -> None:
    """A commit compares the position alone, not epoch and tag."""
    from service.store.redis import redis_store

    redis_store.COMPARED = slice(24, 32)


def share_tags() -> None:
    """Of two equal appends that race, the loser takes the other's commit for its own."""
    from service.core import delivery

    # in place: the fork server, which starts the workers, has imported it by name
    delivery.new_nonce.__code__ = (lambda: b"").__code__


def evaluate_cached() -> None:
    """Chunks are evaluated against the cached state, which another worker may have replaced."""
    from service.pipeline.chunk_load import ChunkLoader

    load = ChunkLoader._load

    async def load_cached(self: Any, members: Any) -> Any:
        stored = await load(self, members)
        copies = [self._cache.get(member.key) for member in members]
        return [copy.value if copy else one for copy, one in zip(copies, stored, strict=True)]

    ChunkLoader._load = load_cached


CODE: dict[str, Callable[[], None]] = {
    "position-only": compare_positions,
    "equal-tags": share_tags,
    "cached-refusal": evaluate_cached,
}


def continue_any_version() -> None:
    """A chunk continues the cached state of its stream, whichever version computed that."""
    from service.pipeline.chunk_load import WRITER, ChunkLoader

    cached = ChunkLoader._cached

    def cached_by_any(self: Any, job: Any) -> Any:
        own, copy = self._fingerprint, self._cache.get(job.payload.key)
        if copy is not None:
            self._fingerprint = copy.value[WRITER]
        try:
            return cached(self, job)
        finally:
            self._fingerprint = own

    ChunkLoader._cached = cached_by_any


def use_state_behind() -> None:
    """A version's own state is used as it is, although its head is behind the stream's."""
    from service.pipeline import rewarm
    from service.store.base import decode_value

    own_state = rewarm._own_state

    def state_at_head(served: Any, key: Any, history: Any) -> Any:
        state, record = own_state(served, key, history), decode_value(key, history.record)
        return state and state._replace(head=record.head)

    rewarm._own_state = state_at_head


def announce_nothing() -> None:
    """No reply says that its state has not seen all events."""
    from service.pipeline.served_model import ServedModel

    ServedModel.warmth = lambda *_: None


VERSION_CODE: dict[str, Callable[[], None]] = {
    "any-cache": continue_any_version,
    "state-behind": use_state_behind,
    "unannounced": announce_nothing,
}


def ignore_marks() -> None:
    """A consumer computes events that the loaded state contains."""
    from service.core.values import SourceMark

    SourceMark.covers = lambda self, event: False


def mark_before_last() -> None:
    """A consumer computes the last event that the loaded state contains."""
    from service.core.values import SourceMark

    SourceMark.covers = lambda self, event: self.source == event.source and self[1:] > event[1:]


def overwrite_living() -> None:
    """The loader overwrites streams that live, also those that it has loaded before."""
    from service.backfill import load

    create, is_loaded = load.StreamLoader.__init__, load._is_loaded

    def create_overwriting(self: Any, *arguments: Any, **options: Any) -> None:
        create(self, *arguments, **{**options, "overwrite": True})

    load.StreamLoader.__init__ = create_overwriting
    load._is_loaded = lambda stored, head: is_loaded(stored, head) and stored == head


HANDOVER_CODE: dict[str, Callable[[], None]] = {
    "no-mark": ignore_marks,
    "mark-before-last": mark_before_last,
    "load-overwrites": overwrite_living,
}


def plant(bug: str) -> None:
    """Change the code at once, and each script where it is read."""
    (CODE | VERSION_CODE | HANDOVER_CODE).get(bug, lambda: None)()
    read = Path.read_bytes

    def read_changed(path: Path) -> bytes:
        text = read(path)
        for script, old, new in (SCRIPTS | TOPIC_SCRIPTS).get(bug, ()):
            if path.name == f"{script}.lua":
                if text.count(old.encode()) != 1:
                    raise ValueError(f"{path}: expected {old!r} once")
                text = text.replace(old.encode(), new.encode())
        return text

    Path.read_bytes = read_changed


if "PLANTED_BUG" in os.environ:
    plant(os.environ["PLANTED_BUG"])
