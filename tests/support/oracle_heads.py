"""Heads of the oracle in float64 NumPy: outputs of one event, and the anomaly head's score."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, pi

import numpy as np

from models.spec.heads import (
    AnomalyHead,
    ClassificationHead,
    DenseHead,
    ForecastHead,
    Head,
    LabelHead,
    SequenceHead,
)
from models.spec.model import ModelSpec
from tests.support.oracle_layers import ACTIVATIONS, Floats, sigmoid, softmax, softplus


def head_outputs(
    spec: ModelSpec,
    head: Head,
    weights: Mapping[str, Floats],
    x: Floats,
    row: Floats,
    parts: dict[str, Floats],
) -> Floats:
    if isinstance(head, SequenceHead):
        return x
    raw = x @ weights[f"heads.{head.name}.kernel"]
    raw = raw + weights.get(f"heads.{head.name}.bias", 0.0)
    if isinstance(head, DenseHead):
        return ACTIVATIONS[head.activation](raw)
    if isinstance(head, ForecastHead):
        return _forecast(spec, head, raw, row)
    if isinstance(head, ClassificationHead) and head.top is not None:
        name = f"{head.name}.forecast"
        before = parts[name] @ weights[f"heads.{head.name}.kernel"]
        before = before + weights[f"heads.{head.name}.bias"]
        parts[name] = x
        where = {column.name: index for index, column in enumerate(spec.columns)}
        surprise = -np.log(softmax(before)[int(row[where[head.target]])])
        top = np.argsort(-raw, kind="stable")[: head.top]
        return np.array([*softmax(raw)[top], *top, surprise])
    if isinstance(head, ClassificationHead):
        return softmax(raw) if _field_kind(spec, head.target) == "categorical" else sigmoid(raw)
    if isinstance(head, LabelHead):
        return softmax(raw) if head.classes else sigmoid(raw)
    assert isinstance(head, AnomalyHead)
    name = f"{head.name}.forecast"
    before, parts[name] = parts[name], raw
    score = nats(spec, head, before, row)
    detected = spec.detection is not None and spec.detection.head == head.name
    return np.array([score, *(before if detected else [])])


def _forecast(spec: ModelSpec, head: ForecastHead, raw: Floats, row: Floats) -> Floats:
    where = {column.name: index for index, column in enumerate(spec.columns)}
    found = []
    count = max(1, len(head.quantiles))
    for t, target in enumerate(head.targets):
        field = spec.events.field(target)
        level = None
        for y in raw[t * count : (t + 1) * count]:
            level = y if level is None else level + softplus(y)
            mean, std = field.mean, field.std
            if field.normalisation is not None:
                mean, std = row[where[f"{target}.mean"]], row[where[f"{target}.std"]]
            value = level * std + mean
            if field.transform == "signed_log1p":
                value = np.sign(value) * (np.exp(abs(value)) - 1)
            found.append(value)
    return np.array(found)


def nats(spec: ModelSpec, head: AnomalyHead, parameters: Floats, row: Floats) -> float:
    """-log p of one encoded row under the forecast `parameters` [P]."""
    where = {column.name: index for index, column in enumerate(spec.columns)}
    total, start = 0.0, 0
    for target in head.targets:
        field = spec.events.field(target)
        value = row[where[target]]
        absent = field.kind != "categorical" and field.optional and row[where[f"{target}.missing"]]
        if field.kind == "numeric":
            mean, s = parameters[start], np.clip(parameters[start + 1], -7, 7)
            deviation = np.clip((value - mean) / np.exp(s), -1e18, 1e18)
            found = log(2 * pi) / 2 + s + deviation**2 / 2
            start += 2
        elif field.kind == "categorical":
            logits = parameters[start : start + field.codes]
            found = -np.log(softmax(logits)[int(value)])
            start += field.codes
        else:
            # -z log p - (1 - z) log(1 - p), also for a z that is neither 0 nor 1
            found = softplus(parameters[start]) - value * parameters[start]
            start += 1
        total += 0.0 if absent else found
    return total


def _field_kind(spec: ModelSpec, name: str) -> str:
    return spec.events.field(name).kind
