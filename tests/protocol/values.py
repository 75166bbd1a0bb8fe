"""Real values behind the numbers of the model, and each decision evaluated once.

A state's one float spells in octal digits the events that led to it, so it forgets nothing: the
state of another history is another number. Every value is the service's own (`StreamState`,
`Chunk`, `StoredReply`), every decision a call of the `Rules`, memoised. All script calls are
recorded, to be made on a real server.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
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
from service.store.base import Commit, Conflicted
from service.store.codec import head_bytes
from tests.protocol.rules import Pair, Rules
from tests.protocol.world import STREAMS, Guard, Job, Plan, PlanKind, Scenario

MODEL = "probe"
FINGERPRINT = b"\x0f" * 16
NOW_MS = 1_700_000_000_000
NO_INTS = np.zeros(0, np.int64)


class ScriptCall(NamedTuple):
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


def evaluated_once(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a job and numbers: its value, or the error it raises, evaluated once."""

    @wraps(method)
    def evaluate(self: Values, job: Job, *numbers: int) -> Any:
        key = (method, job[:5], *numbers)
        if key not in self.memo:
            try:
                self.memo[key] = method(self, job, *numbers)
            except CarryError as error:
                self.memo[key] = error.with_traceback(None)
        return self.memo[key]

    return evaluate


class Values:
    """The values and decisions of one exploration."""

    def __init__(self, scenario: Scenario, rules: Rules):
        self.scenario = scenario
        self.rules = rules
        self.keys = [StreamKey(MODEL, stream) for stream in STREAMS]
        self.states: list[StreamState | Tombstone | None] = [None]
        self.replies: list[StoredReply | None] = [None]
        self.calls: dict[ScriptCall, None] = {}
        self._epoch_names: dict[bytes, str] = {}
        self._numbers: dict[object, int] = {}
        # By identity; `states` and `replies` keep every object alive.
        self._numbers_of_objects: dict[int, int] = {id(None): 0}
        self.memo: dict[tuple[object, ...], Any] = {}

    # Plans and their names

    def plan(self, job: Job) -> Plan:
        """The plan that the job sends."""
        return self.scenario.clients[job.client].plans[job.plan]

    def uid(self, job: Job) -> int:
        """Names a chunk in histories: a chunk with a position is one however often it is sent."""
        number = job.number if self.plan(job).position is None else 0
        return (job.client * 16 + job.plan) * 16 + number

    def plan_of_uid(self, uid: int) -> Plan:
        """The plan of an entry in a history."""
        return self.scenario.clients[uid // 256].plans[uid // 16 % 16]

    def show_job(self, job: Job) -> str:
        """A request as messages name it."""
        plan = self.plan(job)
        if plan.kind != PlanKind.CHUNK:
            return plan.name
        if plan.position is None:
            return f"{plan.name} (append)"
        return f"{plan.name} (position {plan.position}){' again' if job.number else ''}"

    def show_state(self, number: int) -> str:
        """A state: the events that led to it, position, epoch and the tag's first digits."""
        head = self.head(number)
        if head is None:
            return "a tombstone" if number else "no stream"
        events = "".join(map(str, self.events(number)))
        name = self._epoch_names[head.epoch]
        return f"[{events} @{head.position}, {name}, tag {head.tag.hex()[:4]}]"

    # States by number

    def stream(self, number: int) -> StreamState | None:
        """The stream in this state; None for a tombstone, too."""
        state = self.states[number]
        return state if isinstance(state, StreamState) else None

    def head(self, number: int) -> StreamHead | None:
        """The head of the stream in this state; None for a tombstone, too."""
        state = self.stream(number)
        return None if state is None else state.head

    def expected(self, number: int) -> StreamHead | None:
        """The head that a write based on this state expects: a tombstone has one, too."""
        state = self.states[number]
        return None if state is None else state.head

    def events(self, number: int) -> tuple[int, ...]:
        """The events that led to a state, as its float spells them."""
        state = self.stream(number)
        digits = "" if state is None else f"{int(state.state.floats[0]):o}"
        return tuple(int(digit) for digit in digits if digit != "0")

    # Decisions

    @evaluated_once
    def evaluate_chunk(self, job: Job, state: int) -> Any:
        """Process, Replay, or the rejection."""
        return self.rules.evaluate_chunk(self.chunk(job), self.stream(state))

    @evaluated_once
    def is_continuation(self, job: Job, state: int) -> Any:
        """Whether the chunk continues a cached state."""
        return self.rules.is_continuation(self.chunk(job), self.stream(state))

    @evaluated_once
    def resolve_duplicate(self, job: Job, first: int, state: int, reply: int, own: int) -> Any:
        """Which answer, or the rejection."""
        streams = self.stream(first), self.stream(state)
        return self.rules.resolve_duplicate(
            self.chunk(job), *streams, self.replies[reply], self.head(own)
        )

    @evaluated_once
    def resolve_conflict(self, job: Job, new: int, state: int) -> Any:
        """Which answer, with the state that was read."""
        return self.rules.resolve_conflict(self.chunk(job), self.head(new), self.head(state))

    @evaluated_once
    def resolve_retried_commit(self, job: Job, expected: int, new: int, state: int) -> Any:
        """The result of a repeated commit that conflicts."""
        key = self.keys[self.plan(job).stream]
        commit = Commit(key, self.expected(expected), self.states[new], None)
        return self.rules.resolve_retried_commit(commit, Conflicted(self.head(state)))

    @evaluated_once
    def resolve_retried_deletion(self, job: Job, expected: int, state: int) -> Any:
        """The result of a repeated deletion that conflicts."""
        key, conflict = self.keys[self.plan(job).stream], Conflicted(self.head(state))
        return self.rules.resolve_retried_deletion(key, self.expected(expected), conflict)

    # What clients send and workers compute

    @evaluated_once
    def chunk(self, job: Job) -> Any:
        """The chunk as a transport would make it."""
        plan, head = self.plan(job), self.head(job.named)
        rows = np.array([[digit] for digit in plan.events], np.float32)
        steps = Steps(Feed.INPUTS, len(rows), rows=rows)
        nonce = self.rules.nonce(*job[:3]) if plan.position is None else b""
        guard = Guard.NONE if head is None else plan.guard
        return Chunk(
            self.keys[plan.stream],
            steps,
            chunk_digest(None, steps, nonce),
            plan.position,
            head.epoch if head and guard is Guard.EPOCH else None,
            Precondition((head.etag,)) if head and guard is Guard.IF_MATCH else None,
        )

    @evaluated_once
    def advance(self, job: Job, base: int) -> Any:
        """The state after a chunk."""
        chunk, before = self.chunk(job), self.stream(base)
        value = float(before.state.floats[0]) if before is not None else 0.0
        outputs = []
        for row in chunk.steps.rows:
            value = value * 8 + float(row[0])
            outputs.append([value])
        state = State(np.array([value], np.float32), NO_INTS)
        new = self.rules.apply_chunk(chunk, before, state, fingerprint=FINGERPRINT, now_ms=NOW_MS)
        if before is None:
            new = self._with_named_epoch(new, job)
        return self._add(new, StoredReply(new.head, np.array(outputs, np.float32)))

    def copy(self, job: Job, source: int) -> int:
        """A restored or forked state."""
        new = start_epoch(self.stream(source), fingerprint=FINGERPRINT, now_ms=NOW_MS)
        return self._add(self._with_named_epoch(new, job), None)

    def _with_named_epoch(self, new: StreamState, job: Job) -> StreamState:
        # Named by its creator: the order in which epochs are drawn makes no other world.
        epoch = bytes((job.client + 1, job.plan + 1, job.number + 1, job.attempts + 1, 0, 0, 0, 1))
        attempt = f".{job.attempts}" if job.attempts else ""
        self._epoch_names[epoch] = f"epoch {self.plan(job).name}.{job.number + 1}{attempt}"
        return new._replace(head=new.head._replace(epoch=epoch))

    def tombstone(self, job: Job) -> int:
        """The tombstone of one attempt of a deletion."""
        epoch = self.rules.tombstone_epoch(job.client, job.plan, job.number, job.attempts)
        return self._add(Tombstone(StreamHead(epoch, FIRST_TAG, 0)), None)

    def _add(self, new: StreamState | Tombstone, reply: StoredReply | None) -> int:
        """The number of a state, a new one unless an equal state has one."""
        is_stream = isinstance(new, StreamState)
        key = (new.head, new.last, float(new.state.floats[0])) if is_stream else new.head.epoch
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.states)
            self.states.append(new)
            self.replies.append(reply)
            self._numbers_of_objects |= {id(new): number}
            if reply is not None:
                self._numbers_of_objects[id(reply)] = number
        return number

    # Scripts

    def run_script(
        self, kind: str, stream: int, state: int, reply: int, expected: int, new: int
    ) -> tuple[int, int, bool]:
        """The keys after a script, and whether it wrote.

        Args:
            kind: `commit`, `delete`, or `delete by epoch`, to which any state of the expected
                one's epoch will do.
            new: the state or the tombstone to write.
        """
        key = (kind, stream, state, reply, expected, new)
        after_script = self.memo.get(key)
        if after_script is None:
            before, new_reply = Pair(self.states[state], self.replies[reply]), 0
            if kind == "commit":
                has_reply = self.scenario.replies and self.replies[new] is not None
                new_reply = new if has_reply else 0
                commit = Commit(
                    self.keys[stream],
                    self.expected(expected),
                    self.states[new],
                    self.replies[new_reply],
                )
                after, done = self.rules.commit_effect(before, commit)
            else:
                condition = self.deletion_condition(kind, expected)
                after, done = self.rules.delete_effect(before, condition, self.states[new])
            numbers = self._numbers_of_objects
            after_script = numbers[id(after.state)], numbers[id(after.reply)], done
            self.memo[key] = after_script
            self.calls[ScriptCall(*key, new_reply, *after_script)] = None
        return after_script

    def deletion_condition(self, kind: str, expected: int) -> bytes:
        """The head, or the start of one, that `delete.lua` is given to expect."""
        head = self.expected(expected)
        if head is None:
            return b""
        return head.epoch if kind == "delete by epoch" else head_bytes(head)

    def record_read(self, stream: int, state: int, reply: int) -> None:
        """Record that a stream and its reply were read together."""
        self.calls[ScriptCall("read", stream, state, reply, 0, 0, 0, state, reply, True)] = None
