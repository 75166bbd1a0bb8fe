"""Fingerprint: depends on everything that determines outputs, and on nothing else."""

from __future__ import annotations

import copy
import hashlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from models.artifact.fingerprint import canonical_json, compute_fingerprint
from models.spec.model import parse_spec
from tests.support.models import SMALL, random_weights, small_spec

WEIGHTS = random_weights(small_spec())
BASE = compute_fingerprint(small_spec(), WEIGHTS)

Change = Callable[[dict[str, Any]], None]


def after(change: Change) -> bytes:
    data = copy.deepcopy(SMALL)
    change(data)
    return compute_fingerprint(parse_spec(data), WEIGHTS)


def put(*path: str | int, value: Any) -> Change:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = value

    return change


DETERMINES = {
    "zone": put("events", "timezone", value="UTC"),
    "mean": put("events", "fields", 0, "mean", value=3.7000000000000006),
    "std": put("events", "fields", 0, "std", value=2.0),
    "transform": put("events", "fields", 0, "transform", value="signed_log1p"),
    "optional": put("events", "fields", 0, "optional", value=True),
    "field name": put("events", "fields", 6, "name", value="later"),
    "gap mean": put("events", "fields", 2, "gap_mean", value=2.6),
    "gap std": put("events", "fields", 2, "gap_std", value=1.8),
    "vocabulary order": put(
        "events", "fields", 3, "vocabulary", value=["B6", "UA", "Österreich", "航空"]
    ),
    "normalisation": put("events", "fields", 1, "normalisation", value={"std": 1.0}),
    "prior deviation": put("events", "fields", 1, "normalisation", value={"std": 1.5}),
    "memory": put("events", "fields", 1, "normalisation", value={"std": 1.0, "memory_events": 9}),
    "season": put("events", "fields", 1, "season_events", value=5),
    "calendar": put("events", "fields", 2, "calendar", value=["hour", "yearday"]),
    "embedding": put("events", "fields", 4, "embedding", value=9),
    "units": put("layers", 0, "units", value=4),
    "activation": put("layers", 5, "activation", value="tanh"),
    "recurrent activation": put("layers", 0, "recurrent_activation", value="hard_sigmoid"),
    "bias": put("layers", 0, "use_bias", value=False),
    "reset after": put("layers", 3, "reset_after", value=False),
    "epsilon": put("layers", 2, "epsilon", value=1e-4),
    "layer name": put("layers", 5, "name", value="last"),
    "layer inputs": put("layers", 3, "inputs", value=["lstm_1"]),
    "merge": put("layers", 4, "inputs", value=["gru_1", "layer_normalization_1"]),
    "head name": put("heads", 0, "name", value="seen"),
    "head input": put("heads", 0, "input", value="gru_1"),
    "head activation": put("heads", 1, "activation", value="relu"),
    "quantiles": put("heads", 2, "quantiles", value=[0.2, 0.5, 0.9]),
    "forecast targets": put("heads", 2, "targets", value=["delay", "load"]),
    "threshold": put("heads", 3, "above", value=16.0),
    "most probable categories": put("heads", 4, "top", value=3),
    "label classes": lambda data: data["heads"].append(
        {"kind": "label", "name": "l", "classes": ["a", "b"]}
    ),
    "anomaly targets": put("heads", 5, "targets", value=["load", "heavy", "carrier"]),
    "head order": lambda data: data["heads"].reverse(),
    "layers": lambda data: data["layers"].append({"kind": "activation", "activation": "tanh"}),
}

LEAVES = {
    "model name": put("name", value="other"),
    "model description": put("description", value="Another text."),
    "field description": put("events", "fields", 0, "description", value="Tonnes."),
    "largest vocabulary": put("events", "fields", 3, "max_vocabulary", value=4),
    "rare categories": put("events", "fields", 3, "min_count", value=4),
    "dropout": put("layers", 0, "dropout", value=0.0),
    "recurrent dropout": put("layers", 0, "recurrent_dropout", value=0.0),
    "dropout layer": put("layers", 1, "rate", value=0.9),
    "dense targets": put("heads", 1, "targets", value=["delay"]),
    "no dense targets": put("heads", 1, "targets", value=[]),
    "training": put("training", "epochs", value=99),
    "no training": put("training", value=None),
    "names spelt out": put("layers", 0, "name", value="lstm_1"),
}


def test_changes_of_outputs_have_different_fingerprints() -> None:
    found = {BASE, *(after(change) for change in DETERMINES.values())}

    assert len(found) == 1 + len(DETERMINES)


@pytest.mark.parametrize("change", LEAVES.values(), ids=LEAVES.keys())
def test_changes_without_effect_on_outputs_keep_the_fingerprint(change: Change) -> None:
    assert after(change) == BASE


def test_the_label_column_is_not_in_the_fingerprint() -> None:
    def labelled(column: str) -> bytes:
        head = {"kind": "label", "name": "l", "column": column}
        return after(lambda data: data["heads"].append(head))

    assert labelled("") == labelled("other") != BASE


def test_the_time_zone_matters_only_with_a_timestamp() -> None:
    def without_time(zone: str) -> bytes:
        def change(data: dict[str, Any]) -> None:
            del data["events"]["fields"][2]
            data["events"]["timezone"] = zone

        return after(change)

    assert without_time("UTC") == without_time("Asia/Kathmandu") != BASE


def test_every_weight_is_in_the_fingerprint() -> None:
    found = {BASE}
    for name, array in WEIGHTS.items():
        other = array.copy()
        other.flat[-1] = np.nextafter(other.flat[-1], np.float32(9))
        found.add(compute_fingerprint(small_spec(), {**WEIGHTS, name: other}))

    assert len(found) == 1 + len(WEIGHTS)


def test_the_fingerprint_ignores_order_and_memory_layout_of_weights() -> None:
    spec = small_spec()
    swapped = {
        **WEIGHTS,
        "lstm_1.kernel": WEIGHTS["gru_1.kernel"],
        "gru_1.kernel": WEIGHTS["lstm_1.kernel"],
    }
    turned = {**WEIGHTS, "lstm_1.kernel": np.asfortranarray(WEIGHTS["lstm_1.kernel"])}
    reshaped = {**WEIGHTS, "lstm_1.bias": WEIGHTS["lstm_1.bias"].reshape(1, -1)}

    assert compute_fingerprint(spec, swapped) != BASE
    assert compute_fingerprint(spec, reshaped) != BASE
    assert compute_fingerprint(spec, dict(reversed(WEIGHTS.items()))) == BASE
    assert compute_fingerprint(spec, turned) == BASE


def test_the_fingerprint_is_the_hash_of_documented_bytes() -> None:
    spec = parse_spec(
        {
            "name": "fixed",
            "features": 1,
            "layers": [{"kind": "gru", "units": 1}],
            "heads": [{"kind": "sequence", "name": "h"}],
        }
    )
    weights = {
        "gru_1.kernel": np.array([[1, 2, 3]], np.float32),
        "gru_1.recurrent_kernel": np.array([[4, 5, 6]], np.float32),
        "gru_1.bias": np.array([[7, 8, 9], [10, 11, 12]], np.float32),
    }

    hashed = (
        b'{"events":null,"features":1,"heads":[{"input":"gru_1","kind":"sequence","name":"h"}],'
        b'"layers":[{"inputs":["features"],"kind":"gru","name":"gru_1","units":1}],"numerics":1}'
        b'{"name":"gru_1.bias","shape":[2,3]}'
        + struct.pack("<6f", 7, 8, 9, 10, 11, 12)
        + b'{"name":"gru_1.kernel","shape":[1,3]}'
        + struct.pack("<3f", 1, 2, 3)
        + b'{"name":"gru_1.recurrent_kernel","shape":[1,3]}'
        + struct.pack("<3f", 4, 5, 6)
    )
    assert compute_fingerprint(spec, weights) == hashlib.sha256(hashed).digest()[:16]


def test_canonical_json() -> None:
    assert canonical_json({"b": [1.0, "é"], "a": None}) == '{"a":null,"b":[1.0,"é"]}'.encode()
    with pytest.raises(ValueError):
        canonical_json(float("nan"))
