"""Layouts derived from a spec: state parts, outputs and weight shapes."""

from __future__ import annotations

import numpy as np

from models.spec.layout import (
    output_spec,
    state_spec,
    weight_shapes,
)
from tests.support.models import small_spec

SPEC = small_spec()
WIDTH = 22
"""11 plain columns and embeddings of 3 and 8."""


def test_state_parts_are_those_of_layers_heads_and_clock() -> None:
    assert [(part.name, part.shape, part.dtype) for part in state_spec(SPEC).parts] == [
        ("lstm_1.hidden", (3,), "float32"),
        ("lstm_1.carry", (3,), "float32"),
        ("gru_1.hidden", (4,), "float32"),
        ("surprise.forecast", (2 + 5 + 1,), "float32"),
        ("clock.last_ms", (), "int64"),
        ("clock.seen", (), "int64"),
        ("clock.out_of_order", (), "int64"),
    ]


def test_outputs_have_the_shapes_and_labels_of_their_heads() -> None:
    outputs = output_spec(SPEC)

    assert [(output.name, output.shape, output.labels) for output in outputs.outputs] == [
        ("hidden", (3,), ()),
        ("next", (1,), ("load",)),
        ("range", (2, 3), ("0.1", "0.5", "0.9")),
        ("late_load", (), ()),
        ("carrier", (5,), ("<unknown>", "UA", "B6", "Österreich", "航空")),
        ("surprise", (), ()),
    ]
    assert outputs.size == 3 + 1 + 6 + 1 + 5 + 1
    assert {output.per for output in outputs.outputs} == {"step"}


def test_point_forecasts_are_labelled_by_target() -> None:
    spec = SPEC.model_copy(
        update={"heads": [{"kind": "forecast", "name": "f", "targets": ["delay"], "quantiles": []}]}
    )
    [output] = output_spec(spec).outputs

    assert (output.shape, output.labels) == ((1,), ("delay",))


def test_packed_rows_are_split_into_outputs() -> None:
    outputs = output_spec(SPEC)
    rows = np.arange(2 * outputs.size, dtype=np.float32).reshape(2, outputs.size)

    named = outputs.by_name(rows)

    assert named["late_load"].tolist() == [10, 27]
    assert named["range"][1].tolist() == [[21, 22, 23], [24, 25, 26]]
    assert named["carrier"].shape == (2, 5)
    assert np.concatenate([part.reshape(2, -1) for part in named.values()], 1).tolist() == (
        rows.tolist()
    )


def test_every_layer_and_head_has_its_weights() -> None:
    assert weight_shapes(SPEC) == {
        "embedding.carrier": (5, 3),
        "embedding.gate": (4, 8),
        "lstm_1.kernel": (WIDTH, 12),
        "lstm_1.recurrent_kernel": (3, 12),
        "lstm_1.bias": (12,),
        "layer_normalization_1.gamma": (3,),
        "layer_normalization_1.beta": (3,),
        "gru_1.kernel": (WIDTH, 12),
        "gru_1.recurrent_kernel": (4, 12),
        "gru_1.bias": (2, 12),
        "dense_1.kernel": (7, 5),
        "dense_1.bias": (5,),
        "heads.next.kernel": (5, 1),
        "heads.next.bias": (1,),
        "heads.range.kernel": (5, 6),
        "heads.range.bias": (6,),
        "heads.late_load.kernel": (5, 1),
        "heads.late_load.bias": (1,),
        "heads.carrier.kernel": (5, 5),
        "heads.carrier.bias": (5,),
        "heads.surprise.kernel": (5, 8),
        "heads.surprise.bias": (8,),
    }
