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

from service.core import delivery, values
from service.core.errors import CarryError, OutcomeUnknown
from service.core.values import StreamState, Tombstone
from service.store.redis import outcomes
from tests.protocol import histories
from tests.protocol.histories import HistoryRead
from tests.protocol.state import (
    FINGERPRINTS,
    NO_HISTORY,
    NOTHING,
    STREAMS,
    Entry,
    Keys,
    Request,
    Scenario,
    Version,
)
from tests.support.streams import Commit, applied

MODEL = "probe"
WRITTEN = {"fingerprint": FINGERPRINTS[0], "now_ms": 1_700_000_000_000}


class ScriptCall(NamedTuple):
    """One access to the keys of one stream, which expects a version and writes `new`."""

    script: Literal[
        "read", "read history", "commit", "delete", "delete by epoch", "copy", "rewind", "shadow"
    ]
    stream: int
    stored: Keys
    expected: Version = NOTHING
    new: Keys = Keys()
    entry: Entry | None = None  # that a commit adds to the history
    artifact: int = 0  # that reads a history
    position: int | None = None  # up to which a snapshot is read

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


def write(scenario: Scenario, call: ScriptCall) -> Effect:
    """Write all keys."""
    stored, (new, _, history) = call.stored, call.new
    if call.entry is not None:
        history = histories.add_entry(scenario, stored, new, call.entry)
    elif call.script == "rewind":
        history = histories.replace_history(stored.history, history, new)
    elif call.script == "copy" and history.head:
        history = histories.replace_history(NO_HISTORY, history, new)
    elif call.script == "commit":
        history = stored.history
    return Effect(call.new._replace(history=history), True)


def reject(_: Scenario, call: ScriptCall) -> Effect:
    """Write nothing."""
    return Effect(call.stored, False)


def put_version_state(_: Scenario, call: ScriptCall) -> Effect:
    """Write a version state of the stream's branch."""
    new, stored = call.new.state, call.stored
    is_current = histories.is_in_epoch(stored, new) and histories.is_on_branch(stored, new)
    history = histories.put_state(stored, new) if is_current else None
    if history is None:
        return Effect(stored, False)
    return Effect(stored._replace(history=history), True)


def compare_and_set(scenario: Scenario, call: ScriptCall) -> Effect:
    """The scripts: compare epoch and tag, or the epoch, then write all keys."""
    stored = call.stored.state.compared
    is_expected = bool(stored) == bool(call.condition) and stored.startswith(call.condition)
    return write(scenario, call) if is_expected else reject(scenario, call)


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
    acknowledged_head: Callable[..., Any] = delivery.acknowledged_head
    resolve_conflict: Callable[..., Any] = delivery.resolve_conflict
    resolve_duplicate: Callable[..., Any] = delivery.resolve_duplicate
    resolve_retried_commit: Callable[..., Any] = outcomes.resolve_retried_commit
    resolve_retried_deletion: Callable[..., Any] = outcomes.resolve_retried_deletion
    append_nonce: Callable[[Request], bytes] = append_nonce
    tombstone_epoch: Callable[[Request], bytes] = unique_bytes
    commit_effect: Callable[[Scenario, ScriptCall], Effect] = compare_and_set
    delete_effect: Callable[[Scenario, ScriptCall], Effect] = compare_and_set
    shadow_effect: Callable[[Scenario, ScriptCall], Effect] = put_version_state
    state_of: Callable[[HistoryRead, int], histories.Computed] = histories.state_of
    outcome_unknown: Callable[[str], CarryError] = outcome_unknown
    reject_from_cache: bool = False  # a cached state may reject a chunk
    # an abandoned write is not repeated on a new connection, even where another was sent behind it
    forget_abandoned: bool = False
    answer_early: bool = False  # a chunk is answered once it is computed from a cached state
    continue_any_model: bool = False  # a cached state is continued, whichever model computed it
    keep_epoch: bool = False  # a rewind stays in the epoch


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
        self.switch = cache(self._switch)

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

    def _advance(self, request: Request, base: Version, artifact: int = 0) -> Version:
        """The version after a chunk; a start over leaves nothing of what it replaces."""
        base = NOTHING if request.operation.starts_over else base
        value = float(base.value) if base.stream else 0.0
        outputs = histories.advance(artifact, value, request.operation.events)
        written = {**WRITTEN, "fingerprint": FINGERPRINTS[artifact]}
        new = self.rules.apply_chunk(
            self.chunk(request), base.stream, histories.state(outputs[-1]), **written
        )
        new = new._replace(since=base.since)
        if base.stream is None:
            new = _with_epoch(new, request)
        reply = values.StoredReply(new.head, np.array(outputs, np.float32)[:, None])
        return self._version(new, {**base.chunks, request.chunk_id: new.head}, reply)

    def copy(self, request: Request, source: Version) -> Version:
        """A restored, forked or acknowledged version."""
        if request.operation.acknowledges:
            new = source.stream._replace(head=self.rules.acknowledged_head(source.head))
            return self._version(new, {**source.chunks, request.chunk_id: new.head})
        written = {**WRITTEN, "fingerprint": source.stream.fingerprint}
        new = _with_epoch(delivery.start_epoch(source.stream, **written), request)
        return self._version(new, source.chunks)

    def _switch(self, stored: HistoryRead, artifact: int) -> Version:
        """The stored version as another model would have it."""
        value, since = self.rules.state_of(stored, artifact)
        fields = {
            "fingerprint": FINGERPRINTS[artifact],
            "state": histories.state(value),
            "since": since,
        }
        return self._version(stored.record.stream._replace(**fields), stored.record.chunks)

    def rewind(self, request: Request, stored: HistoryRead, artifact: int) -> Version | None:
        """The version of an earlier position, in a new epoch; None if its state is not available
        exactly."""
        position = request.operation.position or 0
        computed = histories.rewound_state(stored, artifact, position)
        if computed is None or computed[1] is not None:
            return None
        source = stored.record.stream._replace(state=histories.state(computed[0]), since=None)
        written = {**WRITTEN, "fingerprint": FINGERPRINTS[artifact], "position": position}
        new = _with_epoch(delivery.start_epoch(source, **written), request)
        if self.rules.keep_epoch:
            new = new._replace(head=replace(new.head, epoch=source.head.epoch))
        chunks = stored.record.chunks.items()
        return self._version(
            new, {name: head for name, head in chunks if head.position <= position}
        )

    def tombstone(self, request: Request) -> Version:
        """The tombstone of one attempt of a deletion."""
        head = values.StreamHead(self.rules.tombstone_epoch(request), values.FIRST_TAG, 0)
        return self._version(Tombstone(head), {})

    def _version(self, stored: Any, chunks: dict[Any, Any], reply: Any = None) -> Version:
        """The version with this head, history and state, a new one unless there is one."""
        number, has_state = len(self._versions) + 1, isinstance(stored, StreamState)
        state = (stored.fingerprint, stored.state.floats[0], stored.since) if has_state else ()
        identity = (stored.head, tuple(chunks.items()), reply is None, state)
        if identity not in self._versions:
            version = self._versions[identity] = Version(number, stored, reply)
            version.chunks = chunks
        return self._versions[identity]

    def run_script(self, call: ScriptCall) -> Effect:
        """The keys after a script, and whether it wrote."""
        if call not in self.calls:
            effects = {
                "shadow": self.rules.shadow_effect,
                "delete": self.rules.delete_effect,
                "delete by epoch": self.rules.delete_effect,
            }
            effect = effects.get(call.script, self.rules.commit_effect)
            self.calls[call] = effect(self.scenario, call)
        return self.calls[call]

    def record_read(self, stream: int, stored: Keys) -> None:
        """Record that both keys were read together."""
        self.calls[ScriptCall("read", stream, stored)] = Effect(stored, True)

    def read_history(
        self, stream: int, stored: Keys, artifact: int, position: int | None = None
    ) -> HistoryRead:
        """What a model reads of a stream with its history."""
        call = ScriptCall("read history", stream, stored, artifact=artifact, position=position)
        self.calls[call] = Effect(stored, True)
        return histories.read(stored, artifact, position)


def _with_epoch(new: StreamState, request: Request) -> StreamState:
    return new._replace(head=replace(new.head, epoch=unique_bytes(request)))
