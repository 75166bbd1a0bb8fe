"""Converts recurrent Keras layers, and the cells of an `RNN`, to layers of a `ModelSpec`.

A cell is a layer of the specification: `RNN([LSTMCell(8), GRUCell(4)])` becomes two of them.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers as kl
from numpy.typing import NDArray

from models.importing.converted import (
    ConvertedLayer,
    UnsupportedLayerError,
    activation_name,
    expect_float32,
    weights_of,
)

CELL_KINDS: dict[type, str] = {
    kl.LSTMCell: "lstm",
    kl.GRUCell: "gru",
    kl.SimpleRNNCell: "simple_rnn",
}
CELL_PARTS = {"lstm": ("hidden", "carry"), "gru": ("hidden",), "simple_rnn": ("hidden",)}
"""Kinds of cells, and their state parts in Keras' order."""
CELL_LAYERS = {kl.LSTM: "lstm", kl.GRU: "gru"}
_MERGE_MODES = ("concat", "sum", "mul", "ave")
LAST_STEP = "served with an output for every step, the last one equal"


def convert_recurrent(layer: Any, rank: int) -> tuple[ConvertedLayer, ...]:
    """Translate an `LSTM`, `GRU`, `SimpleRNN` or `RNN` layer: one layer for each cell."""
    if layer.go_backwards:
        raise UnsupportedLayerError(
            "go_backwards=True reads the sequence from its end, and a stream has none yet; use "
            "go_backwards=False, or Bidirectional for whole sequences"
        )
    cells = [_convert_cell(cell) for cell in cells_of(layer)]
    if not layer.return_sequences:
        note = f"return_sequences=False: {LAST_STEP}"
        cells[-1] = ConvertedLayer(cells[-1].data, cells[-1].weights, note)
    return tuple(cells)


def convert_bidirectional(layer: Any, rank: int) -> tuple[ConvertedLayer, ...]:
    """Translate a `Bidirectional` layer of two LSTM or two GRU."""
    forward, backward = layer.forward_layer, layer.backward_layer
    for direction in (forward, backward):
        if type(direction) not in CELL_LAYERS or type(direction) is not type(forward):
            raise UnsupportedLayerError(
                f"it wraps {type(direction).__name__} {direction.name!r}; expected two LSTM or "
                "two GRU"
            )
        expect_float32(direction)
    if forward.go_backwards:
        raise UnsupportedLayerError("go_backwards=True: its first layer would read from the end")
    if layer.merge_mode not in _MERGE_MODES:
        raise UnsupportedLayerError(
            f"merge_mode={layer.merge_mode}: expected one of {list(_MERGE_MODES)}"
        )
    if not layer.return_sequences:
        raise UnsupportedLayerError(
            "return_sequences=False joins the forward layer's last step with the backward "
            "layer's first, which is the output of no step; expected return_sequences=True, or "
            "an LSTM or GRU without Bidirectional, which can serve streams"
        )
    options, others = _cell_options(forward.cell), _cell_options(backward.cell)
    differ = [name for name, value in options.items() if others[name] != value]
    if differ:
        raise UnsupportedLayerError(
            f"its backward_layer differs in {differ}; expected equal options"
        )
    data = {
        "kind": "bidirectional",
        "cell": CELL_LAYERS[type(forward)],
        "merge": layer.merge_mode,
        **options,
    }
    weights = {
        f"{name}.{kind}": value
        for name, direction in (("forward", forward), ("backward", backward))
        for kind, value in _cell_weights(direction.cell).items()
    }
    return (ConvertedLayer(data, weights),)


def cells_of(layer: Any) -> list[Any]:
    """The Keras cells of a recurrent layer, from its input to its output."""
    cell = layer.cell
    return list(cell.cells) if isinstance(cell, kl.StackedRNNCells) else [cell]


def state_parts(layer: Any) -> list[tuple[str, ...]]:
    """The state parts of each cell that a Keras layer starts from and returns, in Keras' order.

    A bidirectional layer is one layer of the specification, with the parts of both directions.
    """
    if isinstance(layer, kl.Bidirectional):
        (inner,) = state_parts(layer.forward_layer)
        return [tuple(f"{side}.{part}" for side in ("forward", "backward") for part in inner)]
    if not isinstance(layer, keras.layers.RNN):
        return []
    return [CELL_PARTS.get(CELL_KINDS.get(type(cell), ""), ()) for cell in cells_of(layer)]


def _convert_cell(cell: Any) -> ConvertedLayer:
    kind = CELL_KINDS.get(type(cell))
    if kind is None:
        raise UnsupportedLayerError(
            f"it holds a {type(cell).__name__}; expected "
            f"{', '.join(sorted(known.__name__ for known in CELL_KINDS))}"
        )
    expect_float32(cell)
    return ConvertedLayer({"kind": kind, **_cell_options(cell)}, _cell_weights(cell))


def _cell_options(cell: Any) -> dict[str, Any]:
    options = {
        "units": cell.units,
        "activation": activation_name(cell.activation),
        "use_bias": cell.use_bias,
        "dropout": cell.dropout,
        "recurrent_dropout": cell.recurrent_dropout,
    }
    if not isinstance(cell, kl.SimpleRNNCell):
        options["recurrent_activation"] = activation_name(cell.recurrent_activation)
    if isinstance(cell, kl.GRUCell):
        options["reset_after"] = bool(cell.reset_after)
    return options


def _cell_weights(cell: Any) -> dict[str, NDArray[np.float32]]:
    return weights_of(cell, "kernel", "recurrent_kernel", "bias")
