"""The encoder's state for a decoder, as ONNX nodes; see `models.networks.decoder_network`."""

from __future__ import annotations

from models.errors import SpecError
from models.onnx.messages import DataType
from models.onnx.nodes import Nodes, Value
from models.spec.model import ModelSpec


def last_observed(nodes: Nodes, spec: ModelSpec, rows: Value, lengths: Value, part: Value) -> Value:
    """The state part `decoder.last` after the chunk.

    Args:
        rows: float32 [T, B, F], encoded.
        lengths: int32 [B], each 1..T.
        part: float32 [1, B, D], the part before the chunk.

    Returns:
        float32 [1, B, D].
    """
    if spec.decoder is None or spec.events is None:
        raise SpecError(f"model {spec.name!r}: expected a decoder")
    index, targets = spec.events.column_index, spec.decoder.targets
    last = nodes.add("Cast", lengths, to=DataType.INT64)
    last = nodes.add("Unsqueeze", last, nodes.integers(0, 2))
    counted: Value | None = None
    at: list[Value] = []
    for name in targets:
        missing = index.get(f"{name}.missing")
        if missing is None:
            at.append(last)
            continue
        if counted is None:
            counted = _valid_steps(nodes, rows, last)
        absent = nodes.add("Cast", nodes.part(rows, missing, missing + 1, axis=2), to=DataType.BOOL)
        there = nodes.add("Where", absent, nodes.integers(0), counted)
        at.append(nodes.add("ReduceMax", there, nodes.integers(0), keepdims=1))
    columns = nodes.integers(*(index[name] for name in targets))
    values = nodes.add("Gather", rows, columns, axis=2)
    series = nodes.concat([part, values], axis=0)
    return nodes.add("GatherElements", series, nodes.concat(at, axis=2), axis=0)


def _valid_steps(nodes: Nodes, rows: Value, last: Value) -> Value:
    """Each step's number from 1, int64 [T, B, 1], 0 beyond a row's length."""
    numbers = nodes.add("Add", nodes.steps(rows), nodes.integers(1))
    numbers = nodes.add("Unsqueeze", numbers, nodes.integers(1, 2))
    valid = nodes.add("LessOrEqual", numbers, last)
    return nodes.add("Where", valid, numbers, nodes.integers(0))
