"""The printed tables of a post on Keras' `return_state`, with weights that reproduce them.

The post ("[Keras] Returning the hidden state in keras RNNs with return_state") prints outputs
to eight decimals and no weights; these were solved for so that a one-unit Keras layer gives the
printed numbers. Gate orders are Keras' own: i, f, c, o and z, r, h.
"""

from __future__ import annotations

from dataclasses import dataclass

INPUT = (0.1, 0.2, 0.3, 0.4, 0.5)
PRINTED = 2e-8
"""What eight printed decimals allow."""


@dataclass(frozen=True)
class Table:
    """One layer's weights and what it prints."""

    kind: str
    kernel: tuple[float, ...]
    recurrent_kernel: tuple[float, ...]
    bias: tuple[float, ...] | tuple[tuple[float, ...], tuple[float, ...]]
    sequence: tuple[float, ...]
    state: dict[str, float]


LSTM = Table(
    kind="lstm",
    kernel=(-0.4447798843820714, 0.46231304374295984, 0.30179282527343426, -0.07272730458424718),
    recurrent_kernel=(
        -0.7263635029979324,
        -0.12025956274825447,
        0.13120876679180524,
        0.6638659191411659,
    ),
    bias=(0.0, 1.0, 0.0, 0.0),
    sequence=(0.00734747, 0.02000349, 0.03651035, 0.05576567, 0.07689518),
    state={"lstm_1.hidden": 0.07689518, "lstm_1.carry": 0.15496857},
)
GRU = Table(
    kind="gru",
    kernel=(0.16116131133056427, 0.00516463009902529, 0.49307392126638067),
    recurrent_kernel=(-0.4339989510650185, 0.8121823896194228, 0.3898777711880326),
    bias=((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    sequence=(0.02443524, 0.06332285, 0.1107745, 0.16312647, 0.21796873),
    state={"gru_1.hidden": 0.21796873},
)
TABLES = (LSTM, GRU)
