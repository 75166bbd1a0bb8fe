"""Chunking semantics of networks, and validation of `starts_from`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.artifact.artifact import load_artifact
from models.artifact.fingerprint import compute_fingerprint
from models.artifact.writing import write_artifact
from models.errors import SpecError
from models.spec.chunking import DEFAULT_CHUNK_STEPS, chunk_constant_layers, non_causal_layers
from models.spec.layout import output_spec, state_spec
from models.spec.model import ModelSpec, parse_spec
from tests.support.oracle import contracting_weights

BELOW: dict[str, Any] = {"kind": "lstm", "name": "below", "units": 4}
ABOVE: dict[str, Any] = {"kind": "lstm", "name": "above", "units": 4, "starts_from": "below"}
LAST = {"kind": "sequence", "name": "last"}


def spec_of(*layers: dict[str, Any], **more: Any) -> ModelSpec:
    return parse_spec({"name": "m", "features": 2, "layers": layers, "heads": [LAST], **more})


def test_a_stateful_stack_is_chunk_invariant() -> None:
    spec = spec_of(BELOW, {"kind": "lstm", "units": 4})
    assert (spec.chunking, spec.chunk_limit) == ("invisible", None)
    assert non_causal_layers(spec.layers) == frozenset()
    assert [part.name for part in state_spec(spec).parts] == [
        "below.hidden",
        "below.carry",
        "lstm_2.hidden",
        "lstm_2.carry",
    ]


def test_a_layer_with_starts_from_has_no_state_and_depends_on_the_chunk() -> None:
    tail = {"kind": "dense", "name": "tail", "units": 2}
    aside = {"kind": "gru", "name": "aside", "units": 2, "inputs": ["below"]}
    spec = spec_of(BELOW, ABOVE, tail, aside)
    assert (spec.chunking, spec.chunk_limit) == ("per_chunk", DEFAULT_CHUNK_STEPS)
    assert non_causal_layers(spec.layers) == {"above", "tail"}
    names = [part.name for part in state_spec(spec).parts]
    assert names == ["below.hidden", "below.carry", "aside.hidden"]


def test_attention_over_the_chunk_is_constant_until_merged_with_a_sequence() -> None:
    spec = spec_of(
        BELOW,
        {"kind": "attention", "name": "here", "over": "chunk", "units": 3},
        {"kind": "dense", "name": "tail", "units": 4, "activation": "tanh"},
        {"kind": "add", "name": "both", "inputs": ["here", "tail"]},
        {"kind": "add", "name": "mixed", "inputs": ["here", "below"]},
        {"kind": "gru", "name": "over", "units": 2, "inputs": ["tail"]},
        {"kind": "attention", "name": "so_far", "over": "stream", "units": 3, "inputs": ["tail"]},
    )
    assert (spec.chunking, spec.chunk_limit) == ("per_chunk", DEFAULT_CHUNK_STEPS)
    assert chunk_constant_layers(spec.layers) == {"here", "tail", "both"}
    assert non_causal_layers(spec.layers) == {layer.name for layer in spec.layers} - {"below"}
    assert output_spec(spec).attention == ("here",)
    heads = [{"kind": "sequence", "name": f"of_{n.name}", "input": n.name} for n in spec.layers]
    outputs = output_spec(parse_spec({**spec.model_dump(), "heads": heads}))
    assert {output.name for output in outputs.outputs if output.per == "chunk"} == {
        "of_here",
        "of_tail",
        "of_both",
    }
    assert outputs.size == sum(output.size for output in outputs.outputs) + 1


def test_attention_over_the_stream_is_stateful() -> None:
    spec = spec_of(BELOW, {"kind": "attention", "name": "past", "over": "stream", "units": 3})
    assert (spec.chunking, non_causal_layers(spec.layers)) == ("invisible", frozenset())
    parts = {part.name: part.shape for part in state_spec(spec).parts}
    assert parts == {
        "below.hidden": (4,),
        "below.carry": (4,),
        "past.maximum": (),
        "past.normaliser": (2,),
        "past.sum": (2, 4),
    }
    assert output_spec(spec).attention == ()


def test_an_anomaly_head_requires_a_causal_layer() -> None:
    events = {"fields": [{"kind": "numeric", "name": "x", "mean": 0.0, "std": 1.0}]}
    heads = [{"kind": "anomaly", "name": "odd", "targets": ["x"], "input": "above"}]
    given = {"name": "m", "events": events, "heads": heads}
    with pytest.raises(SpecError, match=r"'odd' scores events by forecasts.*'above' depends"):
        parse_spec({**given, "layers": [BELOW, ABOVE]})
    parse_spec({**given, "layers": [BELOW, {**ABOVE, "starts_from": None}]})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([BELOW, {**ABOVE, "starts_from": "none"}], r"'above' starts from 'none'.*\['below'\]"),
        ([BELOW, {**ABOVE, "starts_from": "above"}], "'above' starts from 'above'"),
        ([BELOW, {**ABOVE, "starts_from": "features"}], "'above' starts from 'features'"),
        ([ABOVE, BELOW], r"'above' starts from 'below'.*before it: \[\]"),
        (
            [BELOW, {"kind": "dense", "units": 4}, {**ABOVE, "starts_from": "dense_1"}],
            "'above' starts from 'dense_1'",
        ),
        ([BELOW, {**ABOVE, "units": 5}], r"hidden \[4\] and carry \[4\]; expected hidden \[5\]"),
        (
            [BELOW, {**ABOVE, "kind": "gru"}],
            r"'below', which returns hidden \[4\] and carry \[4\]; expected hidden \[4\]",
        ),
    ],
)
def test_invalid_starts_from_is_rejected(layers: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(*layers)


def test_max_chunk_steps_requires_a_network_that_depends_on_the_chunk() -> None:
    assert spec_of(BELOW, ABOVE, max_chunk_steps=12).chunk_limit == 12
    with pytest.raises(SpecError, match=r"max_chunk_steps: expected none.*got 12"):
        spec_of(BELOW, max_chunk_steps=12)
    with pytest.raises(SpecError, match="max_chunk_steps"):
        spec_of(BELOW, ABOVE, max_chunk_steps=0)
    training = {"stream": "id", "window_steps": 64}
    with pytest.raises(SpecError, match=r"window_steps: .*at most max_chunk_steps \(12\), got 64"):
        spec_of(BELOW, ABOVE, max_chunk_steps=12, training=training)
    assert spec_of(BELOW, ABOVE, training=training).chunk_limit == DEFAULT_CHUNK_STEPS


def test_max_chunk_steps_is_in_the_manifest_and_not_in_the_fingerprint(tmp_path: Path) -> None:
    specs = [spec_of(BELOW, ABOVE, max_chunk_steps=most) for most in (12, 30)]
    weights = contracting_weights(specs[0], 2)
    assert len({compute_fingerprint(spec, weights) for spec in specs}) == 1
    plain = spec_of(BELOW, {"kind": "lstm", "name": "above", "units": 4})
    assert compute_fingerprint(plain, weights) != compute_fingerprint(specs[0], weights)
    manifest = write_artifact(tmp_path / "m", specs[0], weights).manifest
    assert (manifest["chunking"], manifest["max_chunk_steps"]) == ("per_chunk", 12)
    assert load_artifact(tmp_path / "m").spec == specs[0]
    manifest = write_artifact(tmp_path / "p", plain, weights).manifest
    assert (manifest["chunking"], manifest["max_chunk_steps"]) == ("invisible", None)
