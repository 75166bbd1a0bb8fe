"""Specifications: resolved names, and reported errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from models.errors import SpecError
from models.spec.model import parse_spec
from tests.support.models import SMALL, small_spec


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(SMALL), **changes}


def raw(**changes: Any) -> dict[str, Any]:
    return {
        "name": "m",
        "features": 2,
        "layers": [{"kind": "lstm", "units": 2}],
        "heads": [{"kind": "sequence", "name": "h"}],
        **changes,
    }


def test_default_names_and_inputs_are_resolved() -> None:
    spec = small_spec()

    assert [(layer.name, layer.inputs) for layer in spec.layers] == [
        ("lstm_1", ("features",)),
        ("dropout_1", ("lstm_1",)),
        ("layer_normalization_1", ("dropout_1",)),
        ("gru_1", ("features",)),
        ("concatenate_1", ("layer_normalization_1", "gru_1")),
        ("dense_1", ("concatenate_1",)),
    ]
    assert [head.input for head in spec.heads] == ["lstm_1"] + ["dense_1"] * 5
    assert SMALL["layers"][0] == {
        "kind": "lstm",
        "units": 3,
        "dropout": 0.1,
        "recurrent_dropout": 0.2,
    }


def test_a_spec_round_trips() -> None:
    spec = small_spec()

    assert parse_spec(spec.model_dump(mode="json")) == spec
    assert parse_spec(spec.model_dump()) == spec
    assert spec.model_copy() == spec


def test_columns_of_events_and_of_raw_features() -> None:
    spec = parse_spec(raw(features=3))

    assert small_spec().input_features == 13
    assert spec.input_features == 3
    assert [column.name for column in spec.columns] == ["feature_0", "feature_1", "feature_2"]
    assert spec.columns is spec.columns  # computed once


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (7, "valid dictionary"),
        ({}, r"name: Field required"),
        (raw(name="Not A Slug"), r"name: .*pattern"),
        (raw(layers=[]), r"layers: .*at least 1"),
        (raw(layers=5), r"layers: "),
        (raw(layers=[5]), r"layers\.0: "),
        (raw(heads=[]), r"heads: .*at least 1"),
        (raw(extra=1), r"extra: Extra inputs"),
        (raw(features=None), "exactly one of `events` and `features`"),
        (changed(features=3), "exactly one of `events` and `features`"),
        (
            raw(layers=[{"kind": "lstm", "units": 2, "dropout": 1.0}]),
            r"layers\.0\.lstm\.dropout: .*less than 1",
        ),
        (
            raw(layers=[{"kind": "lstm", "units": 2, "activation": "sine"}]),
            r"layers\.0\.lstm\.activation",
        ),
        (raw(layers=[{"kind": "dense", "units": 2}]), "at least one recurrent layer"),
        (
            raw(layers=[{"kind": "conv1d", "units": 2, "kernel_size": 1}]),
            "since no other keeps a state",
        ),
        (
            raw(layers=[{"kind": "slice", "start": 1, "stop": 9}, {"kind": "gru", "units": 2}]),
            "layer 'slice_1': expected `stop` within the",
        ),
        (
            raw(heads=[{"kind": "sequence", "name": "h", "shape": [3, 2]}]),
            r"head 'h': expected a shape of the \d values of .* got \[3, 2\]",
        ),
        (raw(embeddings=[{"column": 9, "codes": 3, "units": 2}]), "embeddings: expected columns 0"),
        (
            raw(embeddings=[{"column": 0, "codes": 3, "units": 2}] * 2),
            "embeddings: expected distinct columns",
        ),
        (
            raw(layers=[{"kind": "lstm", "units": 2, "name": "features"}]),
            "layer 'features': expected a unique name",
        ),
        (
            raw(layers=[{"kind": "lstm", "units": 2, "inputs": ["features", "features"]}]),
            "layer 'lstm_1': expected one input",
        ),
        (
            raw(layers=[{"kind": "lstm", "units": 2}, {"kind": "add"}]),
            "layer 'add_1': expected two or more inputs",
        ),
        (
            raw(
                layers=[
                    {"kind": "gru", "units": 16384},
                    {"kind": "concatenate", "name": "wide", "inputs": ["gru_1"] * 17},
                ]
            ),
            "layer 'wide': expected at most 262144 values per step, got 278528",
        ),
        (raw(heads=[{"kind": "sequence", "name": "h"}] * 2), "head 'h': expected a unique name"),
        (
            raw(heads=[{"kind": "sequence", "name": "h", "input": "x"}]),
            "head 'h' reads 'x', expected one of",
        ),
        (
            raw(heads=[{"kind": "forecast", "name": "h", "targets": ["x"]}]),
            "the model has no `events`",
        ),
        (
            changed(heads=[{"kind": "forecast", "name": "h", "targets": ["x"]}]),
            r"head 'h': expected a target among \['load', .*\], got 'x'",
        ),
        (
            changed(heads=[{"kind": "classification", "name": "h", "target": "load"}]),
            "expected a categorical or boolean target, 'load' is numeric",
        ),
        (
            changed(heads=[{"kind": "classification", "name": "h", "target": "heavy", "above": 1}]),
            "expected a numeric target, 'heavy' is boolean",
        ),
        (
            changed(heads=[{"kind": "classification", "name": "h", "target": "heavy", "top": 2}]),
            "expected a categorical target, 'heavy' is boolean",
        ),
        (
            changed(heads=[{"kind": "anomaly", "name": "h", "targets": ["at"]}]),
            "'at' is timestamp",
        ),
        (
            changed(heads=[{"kind": "dense", "name": "h", "units": 2, "targets": ["load"]}]),
            r"expected one target per unit \(2\)",
        ),
        (changed(training={"epochs": 2}), r"training\.stream: Field required"),
    ],
)
def test_an_invalid_spec_is_rejected_with_its_path(data: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        parse_spec(data, "my.yaml")
    assert str(caught.value).startswith("my.yaml: not a model specification\n")
    assert "Value error" not in str(caught.value)


def test_all_errors_are_reported_together() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(raw(name="", layers=[*raw()["layers"], {"kind": "lstm", "units": -1}], extra=1))
    assert len(str(caught.value).splitlines()) == 4
