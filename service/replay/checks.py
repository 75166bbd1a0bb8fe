"""Checks of replies: against the chunk, and against the reply to its duplicate. None means correct.

The bound is the contract's: |a - b| <= 1e-5 + 1e-5 |b|.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.replay.client import Answer, FloatRows, Reply

ABSOLUTE = 1e-5
RELATIVE = 1e-5


@dataclass(frozen=True, slots=True, eq=False)
class FinalAnswer:
    """The final answer to one chunk.

    Attributes:
        answer: a reply, or the problem that names the stream's position.
        failures: attempts before it that failed with a retryable problem.
        latency_s: from sending the last attempt to its answer.
    """

    answer: Answer
    failures: int
    latency_s: float


def excess(actual: FloatRows, expected: FloatRows) -> NDArray[np.float64]:
    """|a - b| - 1e-5 |b| in float64; the contract holds if it is at most 1e-5."""
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    return np.asarray(np.abs(a - b) - RELATIVE * np.abs(b))


def agree(actual: FloatRows, expected: FloatRows) -> bool:
    """Whether two outputs of the same events are within the contract."""
    return actual.shape == expected.shape and bool((excess(actual, expected) <= ABSOLUTE).all())


def check_reply(answer: Answer, stream: str, start: int, steps: int) -> str | None:
    """The fault in the reply to a chunk at position `start`; None for a correct one."""
    if not isinstance(answer, Reply):
        return None
    chunk = f"stream {stream!r}, chunk at {start}"
    if answer.stream != stream:
        return f"{chunk}: expected a reply of that stream, got one of {answer.stream!r}"
    if answer.position != start + steps:
        return f"{chunk}: expected position {start + steps} after it, got {answer.position}"
    if not np.isfinite(answer.outputs).all():
        return f"{chunk}: expected finite outputs"
    return None


def check_duplicates(
    first: FinalAnswer, second: FinalAnswer, stream: str, start: int
) -> str | None:
    """The fault in the answers to one chunk that was sent twice at once; None if they are correct.

    Both must have the same outputs and the same head, and exactly one must have processed the
    chunk. Where an attempt failed on the way, the one that processed it may be the one whose
    answer was lost, or the store may have lost the commit and the chunk been processed again:
    then only outputs and position have to agree.
    """
    chunk = f"stream {stream!r}, chunk at {start}, sent twice"
    a, b = first.answer, second.answer
    smooth = first.failures == second.failures == 0
    if isinstance(a, Reply) and isinstance(b, Reply):
        if not agree(a.outputs, b.outputs):
            return f"{chunk}: the two replies differ in their outputs"
        if a.position != b.position:
            return f"{chunk}: one reply says position {a.position}, the other {b.position}"
        if smooth and (a.epoch, a.tag) != (b.epoch, b.tag):
            return f"{chunk}: one reply says tag {a.tag}, the other {b.tag}"
        if smooth and a.replayed == b.replayed:
            which = "both were replayed" if a.replayed else "both were processed"
            return f"{chunk}: expected one of two to be replayed, {which}"
        return None
    if not smooth or (not isinstance(a, Reply) and not isinstance(b, Reply)):
        return None
    reply, problem = (a, b) if isinstance(a, Reply) else (b, a)
    if isinstance(reply, Reply) and not isinstance(problem, Reply):
        if problem.code != "already_applied":
            return f"{chunk}: one was answered, the other refused: {problem.code}"
        if problem.position != reply.position:
            return f"{chunk}: one says position {reply.position}, the other {problem.position}"
    return None


def next_position(first: Answer, others: list[Answer]) -> int | None:
    """The position of the stream by the answers to one chunk; None if no answer names it.

    A reply moves the stream to the chunk's end. If another copy of the chunk was refused as ahead,
    the stream has fallen back behind that reply since.
    """
    answers = [first, *others]
    behind = [
        a.position for a in answers if not isinstance(a, Reply) and a.code == "position_ahead"
    ]
    if behind and behind[0] is not None:
        return behind[0]
    replies = [a.position for a in answers if isinstance(a, Reply)]
    if replies:
        return replies[0]
    return next((a.position for a in answers if a.position is not None), None)
