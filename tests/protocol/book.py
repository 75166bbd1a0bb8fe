"""Real values behind the numbers of the model, and each decision taken once.

A state's one float spells in octal digits the events that led to it, so it forgets nothing: the
state of another history is another number. Every value is the service's own (`StreamState`,
`Chunk`, `StoredReply`), every decision a call of the `Rules`; asked again, the answer is looked
up. All script calls that were ever made are kept, to be made on a real server.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from models.spec.state import State
from service.core.delivery import chunk_digest, start_epoch
from service.core.errors import CarryError
from service.core.values import (
    FIRST_TAG,
    Chunk,
    Feed,
    Precondition,
    Steps,
    StoredReply,
    StreamHead,
    StreamKey,
    StreamState,
    Tombstone,
)
from service.store.base import Commit, CommitResult, Conflicted
from service.store.codec import head_bytes
from tests.protocol.rules import Pair, Process, Resolution, Rules
from tests.protocol.world import STREAMS, ChunkPlan, Guard, Job, Scenario

MODEL = "probe"
FINGERPRINT = b"\x0f" * 16
NOW_MS = 1_700_000_000_000
_NO_INTS = np.zeros(0, np.int64)


class Call(NamedTuple):
    """One call of a script as the model understands it: states and replies by number."""

    kind: str
    stream: int
    state: int
    reply: int
    expected: int
    new: int
    new_reply: int
    after_state: int
    after_reply: int
    done: bool


class Book:
    """The values and decisions of one exploration."""

    def __init__(self, scenario: Scenario, rules: Rules):
        self.scenario = scenario
        self.rules = rules
        self.keys = [StreamKey(MODEL, stream) for stream in STREAMS]
        self.states: list[StreamState | Tombstone | None] = [None]
        self.replies: list[StoredReply | None] = [None]
        self.epochs: dict[bytes, str] = {}
        self.calls: dict[Call, None] = {}
        self._ids: dict[object, int] = {}
        # Which number an object has; the book keeps them all alive.
        self._objects: dict[int, int] = {}
        self._memo: dict[tuple[object, ...], Any] = {}

    def uid(self, job: Job) -> int:
        """Names a chunk in histories: a chunk with a position is one however often it is sent."""
        plan = self.plan(job)
        number = job.number if isinstance(plan, ChunkPlan) and plan.position is None else 0
        return (job.client * 16 + job.plan) * 16 + number

    def plan(self, job: Job) -> Any:
        """What the job is to do."""
        return self.scenario.clients[job.client].plans[job.plan]

    def name(self, uid: int) -> str:
        """The chunk's name in stories."""
        return self.scenario.clients[uid // 256].plans[uid // 16 % 16].name

    def events(self, uid: int) -> tuple[int, ...]:
        """The chunk's events."""
        plan = self.scenario.clients[uid // 256].plans[uid // 16 % 16]
        return plan.events if isinstance(plan, ChunkPlan) else ()

    def past(self, state: int) -> tuple[int, ...]:
        """The events that led to a state, as its float spells them."""
        found = self.stream(state)
        digits = "" if found is None else f"{int(found.state.floats[0]):o}"
        return tuple(int(digit) for digit in digits if digit != "0")

    def stream(self, state: int) -> StreamState | None:
        """The stream in this state; None for a tombstone, too."""
        found = self.states[state]
        return found if isinstance(found, StreamState) else None

    def head(self, state: int) -> StreamHead | None:
        """The head of the stream in this state; None for a tombstone, too."""
        found = self.stream(state)
        return None if found is None else found.head

    def expected(self, state: int) -> StreamHead | None:
        """What a write expects that was decided for this state: a tombstone has a head, too."""
        found = self.states[state]
        return None if found is None else found.head

    def chunk(self, job: Job) -> Chunk:
        """The chunk as a transport would make it."""
        key = ("chunk", job.client, job.plan, job.number, job.named)
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = self._make_chunk(job)
        return found

    def _make_chunk(self, job: Job) -> Chunk:
        plan = self.plan(job)
        rows = np.array([[digit] for digit in plan.events], np.float32)
        steps = Steps(Feed.INPUTS, len(rows), rows=rows)
        drawn = b""
        if plan.position is None:
            drawn = self.rules.nonce(job.client, job.plan, job.number)
        head = self.head(job.named)
        guard = plan.guard if head is not None else Guard.NONE
        return Chunk(
            self.keys[plan.stream],
            steps,
            chunk_digest(None, steps, drawn),
            plan.position,
            head.epoch if guard is Guard.EPOCH else None,
            Precondition((head.etag,)) if guard is Guard.IF_MATCH else None,
        )

    def _decide(self, key: tuple[object, ...], decide: Any, *arguments: Any) -> Any:
        """A decision, or the error it raises, taken once."""
        if key in self._memo:
            return self._memo[key]
        try:
            found = decide(*arguments)
        except CarryError as error:
            found = error.with_traceback(None)
        self._memo[key] = found
        return found

    def evaluate_chunk(self, job: Job, state: int) -> Process | Any:
        """`evaluate_chunk`: Process, Replay, or the refusal."""
        key = ("evaluate_chunk", job.client, job.plan, job.number, job.named, state)
        return self._decide(key, self.rules.evaluate_chunk, self.chunk(job), self.stream(state))

    def is_continuation(self, job: Job, state: int) -> bool:
        """`is_continuation` from a copy in memory."""
        key = ("is_continuation", job.client, job.plan, job.number, job.named, state)
        return self._decide(key, self.rules.is_continuation, self.chunk(job), self.stream(state))

    def retry(self, job: Job, first: int, state: int, reply: int, own: int) -> Resolution | Any:
        """`resolve_duplicate`: which answer, or the refusal."""
        key = ("retry", job.client, job.plan, job.number, job.named, first, state, reply, own)
        return self._decide(
            key,
            self.rules.resolve_duplicate,
            self.chunk(job),
            self.stream(first),
            self.stream(state),
            self.replies[reply],
            self.head(own),
        )

    def resolve_conflict(self, job: Job, new: int, found: int) -> Resolution:
        """`resolve_conflict` of the state that was found."""
        return self.rules.resolve_conflict(self.chunk(job), self.head(new), self.head(found))

    def resolve_retried_commit(
        self, stream: int, expected: int, new: int, found: int
    ) -> CommitResult:
        """The result of a repeated commit that conflicts."""
        commit = self._commit(stream, expected, new, 0)
        key = ("resolve_retried_commit", stream, expected, new, found)
        return self._decide(
            key, self.rules.resolve_retried_commit, commit, Conflicted(self.head(found))
        )

    def resolve_retried_deletion(self, stream: int, expected: int, found: int) -> CommitResult:
        """`resolve_retried_deletion` of a repeated deletion."""
        result = Conflicted(self.head(found))
        return self.rules.resolve_retried_deletion(
            self.keys[stream], self.expected(expected), result
        )

    def apply_chunk(self, job: Job, base: int) -> int:
        """The state after a chunk, computed and named."""
        key = ("apply_chunk", job.client, job.plan, job.number, job.named, job.attempts, base)
        found = self._memo.get(key)
        if found is None:
            found = self._memo[key] = self._advance(job, base)
        return found

    def _advance(self, job: Job, base: int) -> int:
        before, chunk = self.stream(base), self.chunk(job)
        value = float(before.state.floats[0]) if before is not None else 0.0
        outputs = []
        for row in chunk.steps.rows:
            value = value * 8 + float(row[0])
            outputs.append([value])
        state = State(np.array([value], np.float32), _NO_INTS)
        new = self.rules.apply_chunk(chunk, before, state, fingerprint=FINGERPRINT, now_ms=NOW_MS)
        if before is None:
            new = new._replace(head=new.head._replace(epoch=self._epoch(job)))
        return self._kept(new, np.array(outputs, np.float32))

    def begin(self, job: Job, source: int) -> int:
        """A state restored or forked."""
        new = start_epoch(self.stream(source), fingerprint=FINGERPRINT, now_ms=NOW_MS)
        head = new.head._replace(epoch=self._epoch(job))
        return self._kept(new._replace(head=head), None)

    def _epoch(self, job: Job) -> bytes:
        # Named by who drew it: the order in which epochs were drawn makes no other world.
        epoch = bytes((job.client + 1, job.plan + 1, job.number + 1, job.attempts + 1, 0, 0, 0, 1))
        name = f"{self.plan(job).name}.{job.number + 1}" + (f".{job.attempts}" * (job.attempts > 0))
        self.epochs[epoch] = f"epoch {name}"
        return epoch

    def tombstone(self, job: Job) -> int:
        """The tombstone of one attempt of a deletion."""
        epoch = self.rules.tombstone_epoch(job.client, job.plan, job.number, job.attempts)
        key = ("tombstone", epoch)
        if key not in self._ids:
            self._ids[key] = len(self.states)
            self.states.append(Tombstone(StreamHead(epoch, FIRST_TAG, 0)))
            self.replies.append(None)
            self._objects[id(self.states[-1])] = self._ids[key]
        return self._ids[key]

    def _kept(self, new: StreamState, outputs: Any) -> int:
        key = (new.head, new.last, float(new.state.floats[0]))
        found = self._ids.get(key)
        if found is None:
            found = self._ids[key] = len(self.states)
            reply = None if outputs is None else StoredReply(new.head, outputs)
            self.states.append(new)
            self.replies.append(reply)
            self._objects[id(new)] = self._objects[id(reply)] = found
        return found

    def _commit(self, stream: int, expected: int, new: int, reply: int) -> Commit:
        head = self.expected(expected)
        return Commit(self.keys[stream], head, self.states[new], self.replies[reply])

    def commit(
        self, stream: int, state: int, reply: int, expected: int, new: int
    ) -> tuple[int, int, bool]:
        """`commit.lua` on a stream's two keys: the keys afterwards, and whether it wrote."""
        key = ("commit", stream, state, reply, expected, new)
        found = self._memo.get(key)
        if found is None:
            kept = new if self.scenario.replies and self.replies[new] is not None else 0
            commit = self._commit(stream, expected, new, kept)
            before = Pair(self.states[state], self.replies[reply])
            after, done = self.rules.commit_effect(before, commit)
            found = self._number(after.state), self._number(after.reply), done
            self._memo[key] = found
            self.calls[Call("commit", stream, state, reply, expected, new, kept, *found)] = None
        return found

    def delete(
        self, stream: int, state: int, reply: int, expected: int, new: int, by_epoch: bool
    ) -> tuple[int, int, bool]:
        """`delete.lua` on a stream's two keys.

        Args:
            new: the tombstone.
            by_epoch: any state of the expected one's epoch will do.
        """
        kind = "delete by epoch" if by_epoch else "delete"
        key = (kind, stream, state, reply, expected, new)
        found = self._memo.get(key)
        if found is None:
            before = Pair(self.states[state], self.replies[reply])
            condition = self.condition(expected, by_epoch)
            after, done = self.rules.delete_effect(before, condition, self.states[new])
            found = self._number(after.state), self._number(after.reply), done
            self._memo[key] = found
            self.calls[Call(kind, stream, state, reply, expected, new, 0, *found)] = None
        return found

    def condition(self, expected: int, by_epoch: bool) -> bytes:
        """The head that `delete.lua` is given to expect."""
        head = self.expected(expected)
        if head is None:
            return b""
        return head.epoch if by_epoch else head_bytes(head)

    def _number(self, value: object) -> int:
        return 0 if value is None else self._objects[id(value)]

    def read(self, stream: int, state: int, reply: int) -> None:
        """Note that a stream and its reply were read together."""
        self.calls[Call("read", stream, state, reply, 0, 0, 0, state, reply, True)] = None
