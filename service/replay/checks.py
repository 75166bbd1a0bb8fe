"""Checks of replies beyond those of the client: finite outputs, and equal answers to duplicates.

None means correct. The bound is the contract's: |a - b| <= 1e-5 + 1e-5 |b|.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from carry_client import CarryError, Problem, Reply
from service.replay.client import FloatRows

ABSOLUTE = 1e-5
RELATIVE = 1e-5


def excess(actual: FloatRows, expected: FloatRows) -> NDArray[np.float64]:
    """|a - b| - 1e-5 |b| in float64; the contract holds if it is at most 1e-5."""
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    return np.asarray(np.abs(a - b) - RELATIVE * np.abs(b))


def agree(actual: FloatRows, expected: FloatRows) -> bool:
    """Whether two outputs of the same events are within the contract."""
    return actual.shape == expected.shape and bool((excess(actual, expected) <= ABSOLUTE).all())


def check_outputs(reply: Reply, start: int) -> str | None:
    """The fault in the outputs of a chunk at position `start`."""
    if all(np.isfinite(values).all() for values in reply.outputs.values()):
        return None
    return f"stream {reply.stream!r}, chunk at {start}: expected finite outputs"


def check_duplicates(
    first: Reply | CarryError, second: Reply | CarryError, start: int, *, smooth: bool
) -> str | None:
    """The fault in the answers to one chunk that was sent twice at once.

    Both must have the same outputs and the same head, and exactly one must have processed the
    chunk. Unless it went smoothly, without a failed attempt, the one that processed it may be the
    one whose answer was lost, or the store may have lost the commit and the chunk been processed
    again: then only outputs and position have to agree.
    """
    if isinstance(first, CarryError):
        first, second = second, first
    if isinstance(first, CarryError):
        return None
    chunk = f"stream {first.stream!r}, chunk at {start}, sent twice"
    if isinstance(second, CarryError):
        if not smooth or not isinstance(second, Problem):
            return None
        if second.code != "already_applied":
            return f"{chunk}: one was answered, the other refused: {second.code}"
        if second.position != first.position:
            return f"{chunk}: one says position {first.position}, the other {second.position}"
        return None
    if first.stream != second.stream:
        return f"{chunk}: expected a reply of that stream, got one of {second.stream!r}"
    if not all(agree(first.outputs[name], second.outputs[name]) for name in first.outputs):
        return f"{chunk}: the two replies differ in their outputs"
    if first.position != second.position:
        return f"{chunk}: one reply says position {first.position}, the other {second.position}"
    if smooth and first.head != second.head:
        return f"{chunk}: one reply says {first.head}, the other {second.head}"
    if smooth and first.is_replayed == second.is_replayed:
        which = "both were replayed" if first.is_replayed else "both were processed"
        return f"{chunk}: expected one of two to be replayed, {which}"
    return None
