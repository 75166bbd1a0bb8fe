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

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag

from models.artifact.writing import add_measurements, write_artifact
from models.spec.model import parse_spec

MODEL: Final = "keeps-all"
OUTPUT: Final = "state"
FEATURES: Final = 3
CYCLES: Final = (3, 5, 8)
UNITS: Final = sum(CYCLES)
PERIOD: Final = 240
LARGEST: Final = 4  # input values are whole numbers from -LARGEST to LARGEST
_OPEN: Final = 30.0

Rows = NDArray[np.int8]  # [T, F]: the events of a chunk
Outputs = NDArray[np.float32]  # [T, H]: one row per event


def _make_cycle(length: int) -> NDArray[np.int64]:
    cycle = np.roll(np.eye(length, dtype=np.int64), 1, axis=1)
    cycle[-1] *= -1
    return cycle


TURN: Final = block_diag(*map(_make_cycle, CYCLES))
"""R, [H, H]: one cycle after the other, each with one sign changed."""
ENTERING: Final = np.random.default_rng(11).integers(1, 4, (FEATURES, UNITS)) * (
    np.random.default_rng(12).choice([-1, 1], (FEATURES, UNITS))
)
"""W, [F, H]: small whole numbers, no column like another, each cycle fed by each value."""


def write(
    folder: Path,
    name: str = MODEL,
    gain: int = 1,
    burn_in: int | None = None,
    fields: Sequence[str] = (),
) -> Path:
    """The artifact below a folder of models; returns that folder.

    Args:
        name: of the artifact's folder.
        gain: a version whose outputs and states are this many times those of the first.
        burn_in: events after which the start counts as forgotten, which it never is.
        fields: names of the values, for a model of events instead of rows.
    """
    layer = {
        "kind": "lstm",
        "name": "cell",
        "units": UNITS,
        "activation": "linear",
        "recurrent_activation": "hard_sigmoid",
    }
    heads = [{"kind": "sequence", "name": OUTPUT}]
    values = [{"kind": "numeric", "name": each, "mean": 0.0, "std": 1.0} for each in fields]
    inputs = {"events": {"fields": values}} if fields else {"features": FEATURES}
    spec = parse_spec({"name": MODEL, **inputs, "layers": [layer], "heads": heads})
    # by gate: input, forget, candidate, output
    kernel, recurrent = np.zeros((4, FEATURES, UNITS)), np.zeros((4, UNITS, UNITS))
    bias = np.full((4, UNITS), _OPEN)
    # the open forget gate adds the cell's own state
    kernel[2], recurrent[2], bias[2] = gain * ENTERING, TURN - np.eye(UNITS), 0
    weights = {
        "cell.kernel": np.hstack(kernel).astype(np.float32),
        "cell.recurrent_kernel": np.hstack(recurrent).astype(np.float32),
        "cell.bias": bias.reshape(-1).astype(np.float32),
    }
    write_artifact(folder / name, spec, weights)
    if burn_in is not None:
        add_measurements(folder / name, {"burn_in": {"events": burn_in}})
    return folder


def random_events(random: np.random.Generator, count: int) -> Rows:
    """Events, [count, F], none of them all zero (it would change nothing)."""
    rows = random.integers(-LARGEST, LARGEST + 1, (count, FEATURES), dtype=np.int8)
    rows[~rows.any(axis=1), 0] = 1
    return rows


ZERO: Final = np.zeros(UNITS, np.int64)  # the state [H] of a stream without events


def compute(state: NDArray[np.int64], rows: Rows) -> NDArray[np.int64]:
    """c' = c R + x W in whole numbers, without the service and without a runtime: what a chunk of
    rows [T, F] gives from a state [H], as [T, H]; the last row is the next state."""
    outputs = rows.astype(np.int64) @ ENTERING
    for row in outputs:
        row += state @ TURN
        state = row
    return outputs


def turn(difference: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
    """A difference [H] of two states after `steps` more events that they share."""
    return difference @ np.linalg.matrix_power(TURN, steps % PERIOD)
