"""Model of the protocol: the rules, and the versions, decisions and script calls that follow.

Everything that a worker decides is decided by `service.core.delivery` and
`service.store.redis.outcomes`. The two Lua scripts are written again here and compared with the
originals on a real server (`script_comparison`). A planted bug is `Rules` with a part replaced.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
from msgspec.structs import replace

from models.spec.state import State
from service.core import delivery, values
from service.core.errors import CarryError, OutcomeUnknown
from service.core.values import StreamState, Tombstone
from service.store.redis import outcomes
from tests.protocol.state import NOTHING, STREAMS, Keys, Request, Scenario, Version
from tests.support.streams import Commit, applied

MODEL = "probe"
WRITTEN = {"fingerprint": b"\x0f" * 16, "now_ms": 1_700_000_000_000}


class ScriptCall(NamedTuple):
    """One access to the keys of one stream, which expects a version and writes `new`."""

    script: Literal["read", "commit", "delete", "delete by epoch"]
    stream: int
    stored: Keys
    expected: Version = NOTHING
    new: Keys = Keys()

    @property
    def condition(self) -> bytes:
        """The bytes that the stored version must begin with."""
        head = self.expected.compared
        return head[: values.EPOCH_BYTES] if self.script == "delete by epoch" else head

    def commit(self, key: values.StreamKey) -> Commit:
        """The commit that makes the call."""
        expected = self.expected.stored and self.expected.stored.head
        return Commit(key, expected, self.new.state.stored, self.new.reply.reply)


class Effect(NamedTuple):
    """What a script did: the keys afterwards, and whether it wrote."""

    after: Keys
    done: bool


def write(call: ScriptCall) -> Effect:
    """Write both keys."""
    return Effect(call.new, True)


def reject(call: ScriptCall) -> Effect:
    """Write nothing."""
    return Effect(call.stored, False)


def compare_and_set(call: ScriptCall) -> Effect:
    """`commit.lua` and `delete.lua`: compare epoch and tag, or the epoch, then write both keys."""
    stored = call.stored.state.compared
    is_expected = bool(stored) == bool(call.condition) and stored.startswith(call.condition)
    return write(call) if is_expected else reject(call)


def stream_key(stream: int) -> values.StreamKey:
    """The key of S or T."""
    return values.StreamKey(MODEL, STREAMS[stream])


def unique_bytes(request: Request) -> bytes:
    """Other bytes for each attempt of each request: epochs do not depend on who draws first."""
    operation = request.operation
    numbers = (operation.client, operation.index, request.number, request.attempts)
    return bytes(number + 1 for number in numbers).ljust(values.EPOCH_BYTES, b"\x01")


def append_nonce(request: Request) -> bytes:
    """Another nonce for each append that is sent, the same in all its attempts."""
    return unique_bytes(request._replace(attempts=0))


def outcome_unknown(stream: str) -> CarryError:
    """The error for the sender of a write whose answer did not come in time."""
    return OutcomeUnknown(f"whether the store wrote stream {stream!r} is not known", stream=stream)


@dataclass(frozen=True, slots=True)
class Rules:
    """Every decision of the protocol."""

    evaluate_chunk: Callable[..., Any] = delivery.evaluate_chunk
    is_continuation: Callable[..., bool] = delivery.is_continuation
    always_starts: Callable[..., bool] = delivery.always_starts
    apply_chunk: Callable[..., StreamState] = applied
    resolve_conflict: Callable[..., Any] = delivery.resolve_conflict
    resolve_duplicate: Callable[..., Any] = delivery.resolve_duplicate
    resolve_retried_commit: Callable[..., Any] = outcomes.resolve_retried_commit
    resolve_retried_deletion: Callable[..., Any] = outcomes.resolve_retried_deletion
    append_nonce: Callable[[Request], bytes] = append_nonce
    tombstone_epoch: Callable[[Request], bytes] = unique_bytes
    commit_effect: Callable[[ScriptCall], Effect] = compare_and_set
    delete_effect: Callable[[ScriptCall], Effect] = compare_and_set
    outcome_unknown: Callable[[str], CarryError] = outcome_unknown
    reject_from_cache: bool = False  # a cached state may reject a chunk
    # an abandoned write is not repeated on a new connection, even where another was sent behind it
    forget_abandoned: bool = False
    answer_early: bool = False  # a chunk is answered once it is computed from a cached state


class Model:
    """The chunks, versions and script calls of one exploration, each computed once.

    Every value is the service's own (`StreamState`, `Chunk`, `StoredReply`). Calls of scripts are
    recorded, to be made on a real server. A state's one float spells in octal digits the events
    that led to it, so the state of another history is another number.
    """

    def __init__(self, scenario: Scenario, rules: Rules):
        self.scenario, self.rules = scenario, rules
        self.calls: dict[ScriptCall, Effect] = {}
        self._versions: dict[Any, Version] = {}
        self.chunk, self.advance = cache(self._chunk), cache(self._advance)

    def _chunk(self, request: Request) -> values.Chunk:
        """The chunk as a transport would make it."""
        operation, named = request.operation, request.named.head
        rows = np.array([[digit] for digit in operation.events], np.float32)
        steps = values.Steps(values.Feed.INPUTS, len(rows), rows=rows)
        nonce = b"" if operation.position is not None else self.rules.append_nonce(request)
        chunk = values.Chunk(
            stream_key(operation.stream),
            steps,
            delivery.chunk_digest(None, steps, nonce),
            operation.position,
            starts_over=operation.starts_over,
        )
        if named and operation.guard == "epoch":
            return replace(chunk, epoch=named.epoch)
        if named and operation.guard == "if-match":
            return replace(chunk, precondition=values.Precondition((named.etag,)))
        return chunk

    def _advance(self, request: Request, base: Version) -> Version:
        """The version after a chunk; a start over leaves nothing of what it replaces."""
        base = NOTHING if request.operation.starts_over else base
        value = float(base.stream.state.floats[0]) if base.stream else 0.0
        outputs = [value := value * 8 + digit for digit in request.operation.events]
        state = State(np.array([value], np.float32), np.zeros(0, np.int64))
        new = self.rules.apply_chunk(self.chunk(request), base.stream, state, **WRITTEN)
        if base.stream is None:
            new = _with_epoch(new, request)
        reply = values.StoredReply(new.head, np.array(outputs, np.float32)[:, None])
        version = self._version(new, (*base.history.items(), request.chunk_id), reply)
        version.history = {**base.history, request.chunk_id: version}
        return version

    def copy(self, request: Request, source: Version) -> Version:
        """A restored or forked version."""
        new = _with_epoch(delivery.start_epoch(source.stream, **WRITTEN), request)
        version = self._version(new, tuple(source.history.items()))
        version.history = source.history
        return version

    def tombstone(self, request: Request) -> Version:
        """The tombstone of one attempt of a deletion."""
        head = values.StreamHead(self.rules.tombstone_epoch(request), values.FIRST_TAG, 0)
        return self._version(Tombstone(head), ())

    def _version(self, stored: Any, history: tuple[Any, ...], reply: Any = None) -> Version:
        """The version with this head and history, a new one unless there is one."""
        number = len(self._versions) + 1
        return self._versions.setdefault((stored.head, history), Version(number, stored, reply))

    def run_script(self, call: ScriptCall) -> Effect:
        """The keys after a script, and whether it wrote."""
        if call not in self.calls:
            is_commit = call.script == "commit"
            run = self.rules.commit_effect if is_commit else self.rules.delete_effect
            self.calls[call] = run(call)
        return self.calls[call]

    def record_read(self, stream: int, stored: Keys) -> None:
        """Record that both keys were read together."""
        self.calls[ScriptCall("read", stream, stored)] = Effect(stored, True)


def _with_epoch(new: StreamState, request: Request) -> StreamState:
    return new._replace(head=replace(new.head, epoch=unique_bytes(request)))
