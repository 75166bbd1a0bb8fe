"""The outputs and states of the heads, and the state for a decoder, as ONNX nodes.

The equations are those of `models.networks.heads` and `models.networks.heads`, in the
same order of operations. Sequences
are [T, B, width], an anomaly head's part of the state is [1, B, P]. Values beyond a row's
length mean nothing, but are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log, pi

import numpy as np
from numpy.typing import NDArray

from models.errors import SpecError
from models.events.schema import (
    STATISTICS,
    BooleanField,
    CategoricalField,
    EventField,
    NumericField,
)
from models.onnx.cells import activation
from models.onnx.messages import MOST, DataType, Nodes, Value
from models.spec.heads import (
    DEVIATION_LIMIT,
    EXPONENT_LIMIT,
    LOG_DEVIATION_LIMIT,
    AnomalyHead,
    ClassificationHead,
    DenseHead,
    ForecastHead,
    Head,
    LabelHead,
    SequenceHead,
    has_surprise,
)
from models.spec.layout import anomaly_width, event_field, gives_parameters, target_categories
from models.spec.model import ModelSpec, schema_of


def head_output(
    nodes: Nodes,
    spec: ModelSpec,
    head: Head,
    weights: Mapping[str, NDArray[np.float32]],
    x: Value,
    rows: Value,
    state: tuple[Value, Value],
) -> tuple[Value, Value | None]:
    """One head.

    Args:
        weights: the model's, by name.
        x: float32 [T, B, in], the sequence of the layer that the head reads.
        rows: float32 [T, B, F], the encoded rows.
        state: the part [1, B, P] of a head that scores events, and each row's last valid step,
            int64 [1, B, 1]; not read for other heads.

    Returns:
        Outputs [T, B, size], and the part of a head that scores events after the chunk.
    """
    if isinstance(head, SequenceHead):
        return x, None
    if has_surprise(head):
        return _top_categories(nodes, spec, head, weights, x, rows, state)
    raw = dense(nodes, weights, f"heads.{head.name}", x)
    match head:
        case DenseHead():
            return activation(nodes, head.activation, raw), None
        case ForecastHead():
            return _forecast(nodes, spec, head, raw, rows), None
        case ClassificationHead():
            categorical = isinstance(event_field(spec, head.target), CategoricalField)
            return activation(nodes, "softmax" if categorical else "sigmoid", raw), None
        case LabelHead():
            return activation(nodes, "softmax" if head.classes else "sigmoid", raw), None
        case AnomalyHead():
            part, last = state
            before = nodes.concat([part, nodes.part(raw, 0, -1, axis=0)], axis=0)
            after = _last_valid(nodes, raw, part, last)
            nats = _nats(nodes, spec, head, before, rows)
            if gives_parameters(spec, head):
                nats = nodes.concat([nats, before], axis=2)
            return nats, after


def _last_valid(nodes: Nodes, values: Value, part: Value, last: Value) -> Value:
    """The values [T, B, P] at each row's last valid step, as the part [1, B, P]."""
    index = nodes.add("Expand", last, nodes.add("Shape", part))
    return nodes.add("GatherElements", values, index, axis=0)


def _top_categories(
    nodes: Nodes,
    spec: ModelSpec,
    head: ClassificationHead,
    weights: Mapping[str, NDArray[np.float32]],
    x: Value,
    rows: Value,
    state: tuple[Value, Value],
) -> tuple[Value, Value]:
    """Probabilities and codes of the most probable categories, and the surprise of the event.

    The forecast before the chunk is computed from its part as one further step.
    """
    part, last = state
    field = target_categories(spec, head)
    raw = dense(nodes, weights, f"heads.{head.name}", nodes.concat([part, x], axis=0))
    logs = nodes.add("LogSoftmax", raw, axis=-1)
    index = schema_of(spec).column_index[field.name]
    code = _codes(nodes, nodes.part(rows, index, index + 1, axis=2))
    nats = nodes.add("Neg", nodes.add("GatherElements", logs, code, axis=2))
    size = nodes.integers(min(head.top or 1, field.codes))
    best, codes = nodes.add_many("TopK", logs, size, count=2, axis=2)
    probabilities, codes = (nodes.part(each, 1, MOST, axis=0) for each in (best, codes))
    probabilities = nodes.add("Exp", probabilities)
    codes = nodes.add("Cast", codes, to=DataType.FLOAT32)
    return nodes.concat([probabilities, codes, nats], axis=2), _last_valid(nodes, x, part, last)


def _codes(nodes: Nodes, column: Value) -> Value:
    return nodes.add("Cast", nodes.add("Round", column), to=DataType.INT64)


def dense(nodes: Nodes, weights: Mapping[str, NDArray[np.float32]], name: str, x: Value) -> Value:
    """x W + b over the last axis; b if the model has one."""
    product = nodes.add("MatMul", x, nodes.constant(weights[f"{name}.kernel"]))
    bias = weights.get(f"{name}.bias")
    return product if bias is None else nodes.add("Add", product, nodes.constant(bias))


def _forecast(nodes: Nodes, spec: ModelSpec, head: ForecastHead, raw: Value, rows: Value) -> Value:
    """Rising quantiles, or points, in the fields' own units: [T, B, targets * k]."""
    columns = []
    count = max(1, len(head.quantiles))
    pieces = nodes.split(raw, [count] * len(head.targets), axis=2)
    for name, piece in zip(head.targets, pieces, strict=True):
        field = event_field(spec, name)
        if not isinstance(field, NumericField) or field.mean is None or field.std is None:
            raise SpecError(f"head {head.name!r}: expected a fitted numeric field {name!r}")
        value = _rising(nodes, piece) if count > 1 else piece
        if field.normalisation is None:
            # in this order, which is that of the graphs of older artifacts
            value = nodes.add("Mul", value, nodes.number(field.std))
            value = nodes.add("Add", value, nodes.number(field.mean))
        else:
            columns_of = schema_of(spec).column_index
            at = [columns_of[f"{name}.{each}"] for each in STATISTICS]
            mean, std = (nodes.part(rows, index, index + 1, axis=2) for index in at)
            value = nodes.add("Add", nodes.add("Mul", value, std), mean)
        if field.transform == "signed_log1p":
            size = nodes.add("Min", nodes.add("Abs", value), nodes.number(EXPONENT_LIMIT))
            grown = nodes.add("Sub", nodes.add("Exp", size), nodes.number(1.0))
            value = nodes.add("Mul", nodes.add("Sign", value), grown)
        columns.append(value)
    return nodes.concat(columns, axis=2)


def _rising(nodes: Nodes, values: Value) -> Value:
    """q_1 = y_1, q_k = q_(k-1) + softplus(y_k)."""
    first = nodes.part(values, 0, 1, axis=2)
    rest = nodes.add("Softplus", nodes.part(values, 1, np.iinfo(np.int64).max, axis=2))
    return nodes.add("CumSum", nodes.concat([first, rest], axis=2), nodes.integers(2))


def _nats(nodes: Nodes, spec: ModelSpec, head: AnomalyHead, before: Value, rows: Value) -> Value:
    """-log p of each row under the parameters at the same place: [T, B, 1]."""
    schema = schema_of(spec)
    fields = [event_field(spec, name) for name in head.targets]
    pieces = nodes.split(before, [anomaly_width(field) for field in fields], axis=2)
    total: Value | None = None
    for field, parameters in zip(fields, pieces, strict=True):
        index = schema.column_index[field.name]
        nats = _field_nats(nodes, field, parameters, nodes.part(rows, index, index + 1, axis=2))
        missing = schema.column_index.get(f"{field.name}.missing")
        if missing is not None:
            absent = nodes.part(rows, missing, missing + 1, axis=2)
            nats = nodes.add("Mul", nodes.add("Sub", nodes.number(1.0), absent), nats)
        total = nats if total is None else nodes.add("Add", total, nats)
    if total is None:
        raise SpecError(f"head {head.name!r}: expected at least one target")
    return total


def _field_nats(nodes: Nodes, field: EventField, parameters: Value, value: Value) -> Value:
    """[T, B, width], [T, B, 1] -> [T, B, 1]."""
    match field:
        case NumericField():
            mean, log_deviation = nodes.split(parameters, [1, 1], axis=2)
            log_deviation = _clip(nodes, log_deviation, LOG_DEVIATION_LIMIT)
            narrowing = nodes.add("Exp", nodes.add("Neg", log_deviation))
            deviation = nodes.add("Mul", nodes.add("Sub", value, mean), narrowing)
            deviation = _clip(nodes, deviation, DEVIATION_LIMIT)
            half = nodes.add("Mul", nodes.add("Mul", deviation, deviation), nodes.number(0.5))
            constant = nodes.add("Add", log_deviation, nodes.number(0.5 * log(2 * pi)))
            return nodes.add("Add", constant, half)
        case CategoricalField():
            logs = nodes.add("LogSoftmax", parameters, axis=-1)
            return nodes.add("Neg", nodes.add("GatherElements", logs, _codes(nodes, value), axis=2))
        case BooleanField():
            return nodes.add(
                "Sub", nodes.add("Softplus", parameters), nodes.add("Mul", value, parameters)
            )
        case _:
            raise SpecError(f"field {field.name!r}: {field.kind} cannot be a target")


def _clip(nodes: Nodes, value: Value, limit: float) -> Value:
    return nodes.add("Clip", value, nodes.number(-limit), nodes.number(limit))


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
