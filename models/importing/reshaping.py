"""Operations that only choose or rename what they read: slices, `Reshape` and `Masking`.

A slice of the steps can be served if it is the last one, `x[:, -1]`: there is an output for every
step, of which the last equals Keras' output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from keras import layers as kl

from models.importing.converted import ConvertedLayer, UnsupportedLayerError
from models.importing.recurrent import LAST_STEP
from models.importing.states import Value

_ALL = slice(None)


def read_through(node: Any, value: Value, notes: list[str]) -> Value | ConvertedLayer | None:
    """The value that such an operation gives, or the `slice` that it is; None for any other.

    Args:
        node: the Keras node.
        value: what it reads.
        notes: what the user should know is added here.

    Raises:
        UnsupportedLayerError: it chooses or arranges something else.
    """
    operation, shape = node.operation, tuple(node.outputs[0].shape)
    owner = f"{type(operation).__name__} {operation.name!r}"
    if isinstance(operation, kl.Masking):
        if value.columns is None:
            raise UnsupportedLayerError(
                "it would skip steps by the values of a layer before it; expected it at the "
                "front, where it reads the model's input"
            )
        return replace(value, shape=shape)
    if isinstance(operation, kl.Reshape):
        return _reshape(value, shape, owner)
    if type(operation).__name__ == "GetItem":
        return _get_item(node, value, shape, owner, notes)
    return None


def _reshape(value: Value, shape: tuple[Any, ...], owner: str) -> Value:
    same = len(shape) == len(value.shape) and shape[1:] == value.shape[1:]
    one_column = value.columns is not None and len(value.columns) == 1 and len(value.shape) == 2
    if same or (one_column and len(shape) == 3 and shape[2] == 1):
        return replace(value, shape=shape, owner=owner)
    if len(value.shape) == 2 and value.columns is None:
        return replace(value, shape=shape, owner=owner, arranged=shape[1:])
    raise UnsupportedLayerError(
        f"it rearranges steps and features, {list(value.shape)} to {list(shape)}; expected "
        "[batch, steps] to [batch, steps, 1]: give the rows to the model as they are"
    )


def _get_item(
    node: Any, value: Value, shape: tuple[Any, ...], owner: str, notes: list[str]
) -> Value | ConvertedLayer:
    arguments = [*node.arguments.args[1:], *node.arguments.kwargs.values()]
    key = arguments[-1]
    items = _full_key(list(key) if isinstance(key, (list, tuple)) else [key], len(value.shape))
    text = f"[{', '.join(map(_format, items))}]"
    if value.part is not None or value.state_input is not None or items[0] != _ALL:
        raise UnsupportedLayerError(f"{text}: expected a slice of a sequence, x[:, ...]")
    features = items[-1]
    if len(value.shape) == 3 and items[1] != _ALL:
        if items[1] != -1 or features != _ALL or value.columns is not None:
            raise UnsupportedLayerError(
                f"{text} takes some of the steps; expected the last one of a layer's output, "
                "x[:, -1], since a stream gets an output at every step"
            )
        notes.append(f"{owner}: x[:, -1]: {LAST_STEP}")
        return replace(value, shape=shape, owner=owner)
    if features == _ALL:
        return replace(value, shape=shape, owner=owner)
    width = range(value.shape[-1]) if value.columns is None else value.columns
    chosen = width[features]
    is_sequence = len(value.shape) == 3 or value.columns is None
    if not is_sequence or (isinstance(chosen, int) and value.columns is None):
        raise UnsupportedLayerError(
            f"{text} takes one value without its axis; expected to keep it, x[..., 2:3]"
        )
    if isinstance(chosen, int):
        chosen = range(chosen, chosen + 1)
    if chosen.step != 1 or not chosen:
        raise UnsupportedLayerError(f"{text}: expected adjacent features, x[..., 2:5]")
    if value.columns is None:
        return ConvertedLayer({"kind": "slice", "start": chosen.start, "stop": chosen.stop})
    return replace(value, shape=shape, owner=owner, columns=chosen)


def _full_key(items: list[Any], rank: int) -> list[Any]:
    """One item for each axis."""
    if Ellipsis in items:
        at = items.index(Ellipsis)
        return [*items[:at], *[_ALL] * (rank - len(items) + 1), *items[at + 1 :]]
    return [*items, *[_ALL] * (rank - len(items))]


def _format(item: Any) -> str:
    if not isinstance(item, slice):
        return str(item)
    start, stop = ("" if end is None else end for end in (item.start, item.stop))
    return f"{start}:{stop}" + ("" if item.step in (None, 1) else f":{item.step}")
