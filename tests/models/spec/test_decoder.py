"""The section `decoder`: validation and derived layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.artifact.fingerprint import compute_fingerprint
from models.errors import SpecError
from models.networks.initial_weights import draw_weights
from models.spec.layout import state_spec, weight_shapes
from models.spec.model import ModelSpec, parse_spec
from tests.support.decoders import decoder_spec
from tests.support.models import random_weights, small_spec


def rejection(change: Any) -> str:
    data = decoder_spec().model_dump(mode="json")
    change(data)
    with pytest.raises(SpecError) as caught:
        parse_spec(data)
    return str(caught.value)


def test_a_decoder_section_round_trips() -> None:
    spec = decoder_spec()
    assert parse_spec(spec.model_dump(mode="json")) == spec
    assert spec.decoder is not None
    assert spec.decoder.starts_from == {"lstm_1": "lstm_1", "gru_1": "gru_1"}
    assert [layer.name for layer in spec.decoder.layers] == ["lstm_1", "gru_1", "dense_1"]


def test_the_step_network_reads_last_values_calendar_and_known_fields() -> None:
    spec = decoder_spec()
    parts = {part.name: part.shape for part in state_spec(spec).parts}
    assert parts["decoder.last"] == (2,)
    assert spec.decoder_network is not None
    assert [column.name for column in spec.decoder_network.columns] == [
        *("warmth", "rain", "hour_sin", "hour_cos", "weekday_sin", "weekday_cos"),
        *("holiday", "tariff", "wind", "wind.missing"),
    ]
    assert list(parts)[:3] == [part.name for part in state_spec(spec.decoder_network).parts]


def test_decoder_weights_have_a_prefix() -> None:
    shapes = weight_shapes(decoder_spec())
    assert shapes["decoder.lstm_1.kernel"] == (6 + 1 + 2 + 2, 16)
    assert shapes["decoder.embedding.tariff"] == (3, 2)
    assert shapes["decoder.heads.distribution.kernel"] == (5, 8)
    gaussian = weight_shapes(decoder_spec(head={"kind": "gaussian"}))
    assert gaussian["decoder.heads.distribution.kernel"] == (5, 4)
    fresh = draw_weights(decoder_spec(), 1)
    assert {name: array.shape for name, array in fresh.items()} == shapes
    assert fresh["decoder.lstm_1.bias"][4:8].tolist() == [1] * 4
    own, encoder = fresh["decoder.lstm_1.recurrent_kernel"], fresh["lstm_1.recurrent_kernel"]
    assert not np.array_equal(own, encoder)


def test_fingerprints_of_models_without_a_decoder_are_unchanged() -> None:
    spec = small_spec()
    before = "f39381739849b3585693511efb152f24"
    assert compute_fingerprint(spec, random_weights(spec)).hex() == before


def test_the_fingerprint_depends_on_the_decoder() -> None:
    spec = decoder_spec()
    weights = random_weights(spec)

    def mark(changed: ModelSpec) -> bytes:
        return compute_fingerprint(changed, weights)

    assert mark(decoder_spec(max_horizon=3)) == mark(spec)
    others = [
        decoder_spec(step_s=1800),
        decoder_spec(targets=["rain", "warmth"]),
        decoder_spec(head={"kind": "quantiles", "quantiles": [0.2, 0.5, 0.8, 0.95]}),
        decoder_spec(head={"kind": "gaussian", "quantiles": [0.1, 0.5, 0.8, 0.95]}),
        decoder_spec(starts_from={"lstm_1": "lstm_1"}, layers=_layers(gru=None)),
    ]
    assert len({mark(other) for other in [spec, *others]}) == 1 + len(others)


def _layers(**starts: str | None) -> list[dict[str, Any]]:
    return [
        {"kind": "lstm", "units": 4},
        {"kind": "gru", "units": 3},
        {"kind": "dense", "units": 5, "activation": "tanh"},
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["decoder"].update(targets=["holiday"]), "expected a numeric target"),
        (lambda d: d["decoder"].update(targets=["warm"]), "expected targets among"),
        (lambda d: d["decoder"].update(targets=["rain", "rain"]), "expected distinct targets"),
        (lambda d: d["decoder"].update(known=["rain"]), "expected a field that is not forecast"),
        (lambda d: d["decoder"].update(known=["at"]), "need not be named"),
        (lambda d: d["decoder"].update(known=["tarif"]), "expected known among"),
        (lambda d: d["decoder"].update(step_s=0), "decoder.step_s"),
        (lambda d: d["decoder"].update(max_horizon=0), "decoder.max_horizon"),
        (lambda d: d["decoder"].update(starts_from={}), "at least one layer with `starts_from`"),
        (
            lambda d: d["decoder"].update(starts_from={"lstm_1": "lstm_9"}),
            "layer 'lstm_1' starts from 'lstm_9', expected one of the encoder's",
        ),
        (
            lambda d: d["decoder"].update(starts_from={"lstm_1": "gru_1"}),
            "expected the same kind and units, got lstm of 4 and gru of 3",
        ),
        (
            lambda d: d["decoder"].update(starts_from={"dense_1": "lstm_1"}),
            "expected recurrent layers of the decoder, got 'dense_1'",
        ),
        (
            lambda d: d["decoder"].update(head={"kind": "quantiles", "quantiles": [0.1, 0.9]}),
            "with 0.5 among them",
        ),
        (lambda d: d["decoder"]["layers"][1].update(inputs=["nothing"]), "reads 'nothing'"),
        (lambda d: d["heads"][0].update(name="decoder"), "no layer or head of that name"),
        (lambda d: d["events"]["fields"].pop(1), "no field is a timestamp"),
        (lambda d: d.update(events=None, features=3, heads=[SEQUENCE]), "no `events`"),
        (
            lambda d: d["layers"].append({"kind": "bidirectional", "units": 2}),
            "which bidirectional ones do not",
        ),
        (
            lambda d: d["decoder"]["layers"].append({"kind": "bidirectional", "units": 2}),
            "expected a layer that works step by step",
        ),
    ],
)
def test_an_invalid_decoder_section_is_rejected(change: Any, message: str) -> None:
    assert message in rejection(change)


SEQUENCE = {"kind": "sequence", "name": "out"}
