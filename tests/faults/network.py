"""A network with lossless memory, and a second implementation of it in whole numbers.

One LSTM layer whose gates are held open by their biases (hard sigmoids, so exactly 1) and whose
activations are linear. What is left of its equations is

    c' = c R + x W        h = c

with a signed permutation R and whole numbers in W and x. Nothing fades: an event that is wrong,
missing, doubled or in another's place changes every later output for good, and by at least 1,
because R turns a difference without making it smaller. All of it is exact in float32 below
2^24, independent of the order of summation, the rest of the batch and the runtime: outputs are
compared bit by bit.

R has cycles of 3, 5 and 8 units, each with one change of sign, so it comes back to itself after
240 steps: only events a multiple of 240 places apart could change places unseen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import write_artifact
from models.spec.model import ModelSpec, parse_spec

MODEL: Final = "keeps-all"
OUTPUT: Final = "state"
FEATURES: Final = 3
CYCLES: Final = (3, 5, 8)
UNITS: Final = sum(CYCLES)
PERIOD: Final = 240
LARGEST: Final = 4
"""Input values are whole numbers from -LARGEST to LARGEST."""

_OPEN: Final = 30.0

Rows = NDArray[np.int8]
"""[T, F]: the events of a chunk."""

Outputs = NDArray[np.float32]
"""[T, H]: one row per event."""


def spec() -> ModelSpec:
    """The layer and a head that shows all of its units."""
    layer = {
        "kind": "lstm",
        "name": "cell",
        "units": UNITS,
        "activation": "linear",
        "recurrent_activation": "hard_sigmoid",
    }
    heads = [{"kind": "sequence", "name": OUTPUT}]
    return parse_spec({"name": MODEL, "features": FEATURES, "layers": [layer], "heads": heads})


def turning() -> NDArray[np.float32]:
    """R, [H, H]: one cycle after the other, each with one sign changed."""
    turn = np.zeros((UNITS, UNITS), np.float32)
    first = 0
    for length in CYCLES:
        for place in range(length):
            sign = -1 if place == length - 1 else 1
            turn[first + place, first + (place + 1) % length] = sign
        first += length
    return turn


def entering() -> NDArray[np.float32]:
    """W, [F, H]: small whole numbers, no column like another, each cycle fed by each value."""
    numbers = np.random.default_rng(11).integers(1, 4, (FEATURES, UNITS))
    signs = np.random.default_rng(12).choice([-1, 1], (FEATURES, UNITS))
    return (numbers * signs).astype(np.float32)


def weights() -> dict[str, NDArray[np.float32]]:
    """In Keras' order of gates: input, forget, candidate, output."""
    closed = np.zeros((FEATURES, UNITS), np.float32)
    still = np.zeros((UNITS, UNITS), np.float32)
    bias = np.full((4, UNITS), _OPEN, np.float32)
    bias[2] = 0
    return {
        "cell.kernel": np.concatenate([closed, closed, entering(), closed], axis=1),
        "cell.recurrent_kernel": np.concatenate(
            [still, still, turning() - np.eye(UNITS, dtype=np.float32), still], axis=1
        ),
        "cell.bias": bias.reshape(-1),
    }


def write(folder: Path) -> Path:
    """The artifact below a folder of models; returns that folder."""
    write_artifact(folder / MODEL, spec(), weights())
    return folder


def random_events(random: np.random.Generator, count: int) -> Rows:
    """Events, [count, F], none of them all zero (it would change nothing)."""
    rows = random.integers(-LARGEST, LARGEST + 1, (count, FEATURES), dtype=np.int8)
    rows[~rows.any(axis=1), 0] = 1
    return rows


class Reference:
    """c' = c R + x W in whole numbers, without the service and without a runtime."""

    def __init__(self) -> None:
        turn = turning().astype(np.int64)
        # c R takes each unit from one other, perhaps with its sign changed
        self._source = np.abs(turn).argmax(axis=0)
        self._sign = turn.sum(axis=0)
        self._entering = entering().astype(np.int64)

    def zero(self) -> NDArray[np.int64]:
        """The state of a stream without events, [H]."""
        return np.zeros(UNITS, np.int64)

    def outputs(self, state: NDArray[np.int64], rows: Rows) -> NDArray[np.int64]:
        """What a chunk of rows [T, F] gives from a state [H]: [T, H]; the last is the next
        state."""
        added = rows.astype(np.int64) @ self._entering
        found = np.empty_like(added)
        for step, entry in enumerate(added):
            state = state[self._source] * self._sign + entry
            found[step] = state
        return found

    def turned(self, difference: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
        """A difference [H] of two states after `steps` more events that they share."""
        for _ in range(steps % PERIOD):
            difference = difference[self._source] * self._sign
        return difference
