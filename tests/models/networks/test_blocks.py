"""Networks in blocks, window by window, against the definition, at any end of the stream.

Cuts are taken by the same pure function as in the service, whose own tests are in
`tests/models/spec/test_blocks.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import SpecError
from models.spec.blocks import cut_blocks
from models.spec.layout import network_state, state_spec
from models.spec.model import ModelSpec, parse_spec
from tests.models.networks.running import CLOSE, Floats, Run, check_batch, onnx_run
from tests.models.networks.specs import two_way
from tests.support.oracle import contracting_weights, oracle_in_blocks


def spec_of(layers: list[dict[str, Any]], size: int, lookahead: int, **more: Any) -> ModelSpec:
    heads = [{"kind": "sequence", "name": "output"}]
    blocks = {"size": size, "lookahead": lookahead}
    fields = {"features": 2, "layers": layers, "heads": heads, "blocks": blocks}
    return parse_spec({"name": "m", **fields, **more})


@st.composite
def networks(draw: st.DrawFn) -> ModelSpec:
    """Bidirectional and forward layers in any order, dense ones between them."""
    layers = [
        draw(
            st.sampled_from(
                [
                    two_way(),
                    two_way("gru"),
                    two_way("gru", reset_after=False, merge="mul"),
                    two_way(merge="sum", use_bias=False),
                    {"kind": "lstm", "units": 3},
                    {"kind": "gru", "units": 2},
                    {"kind": "dense", "units": 3, "activation": "tanh"},
                ]
            )
        )
        for _ in range(draw(st.integers(0, 3)))
    ]
    layers.insert(draw(st.integers(0, len(layers))), two_way(merge="ave"))
    return spec_of(layers, draw(st.integers(1, 4)), draw(st.integers(1, 4)))


def run_stream(spec: ModelSpec, rows: Floats, ran: Run) -> Floats:
    """A stream from beginning to end, one window after another, padded as the engine pads."""
    state = np.zeros((1, network_state(spec).float_size), np.float32)
    outputs = []
    for window in cut_blocks(spec.blocks, rows, final=True).windows:
        padded = np.zeros((1, spec.blocks.window, rows.shape[1]), np.float32)
        padded[0, : len(window)] = window
        values, state = ran(padded, [len(window)], state)
        assert values.shape[1] == spec.blocks.size
        outputs.append(values[0, : len(window)])
    return np.concatenate(outputs)


def rows_of(seed: int, length: int) -> Floats:
    return np.random.default_rng(seed).normal(size=(length, 2)).astype(np.float32)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.integers(1, 14), st.integers(0, 2**32 - 1))
def test_the_graph_equals_the_definition(spec: ModelSpec, length: int, seed: int) -> None:
    weights, rows = contracting_weights(spec, seed), rows_of(seed, length)
    outputs = run_stream(spec, rows, onnx_run(spec, weights))
    np.testing.assert_allclose(outputs, oracle_in_blocks(spec, weights, rows), **CLOSE)


STACK = [two_way(), {"kind": "gru", "units": 4}, two_way("gru", units=2)]


@pytest.mark.parametrize("kind", ["compiled", "onnx"])
def test_batched_windows_of_any_length_equal_the_oracle(kind: str) -> None:
    """Rows of a batch end anywhere: in the lookahead, with the block, within it; the states
    are not zero."""
    spec, random = spec_of(STACK, 3, 2), np.random.default_rng(5)
    for lengths in ([5, 4, 3, 2, 1], [3, 3, 2, 1, 1], [5] * 5):
        rows = random.normal(size=(5, 5, 2)).astype(np.float32)
        for row, length in zip(rows, lengths, strict=True):
            row[length:] = 0
        states = random.uniform(-1, 1, (5, network_state(spec).float_size)).astype(np.float32)
        check_batch(kind, spec, 4, rows, lengths, states)


def test_the_state_has_forward_parts_and_pending_rows() -> None:
    spec = spec_of([two_way(), {"kind": "gru", "units": 4}], 3, 2)
    parts = {part.name: (part.shape, part.dtype) for part in state_spec(spec).parts}
    assert parts == {
        "bidirectional_1.forward.hidden": ((4,), "float32"),
        "bidirectional_1.forward.carry": ((4,), "float32"),
        "gru_1.hidden": ((4,), "float32"),
        "blocks.waiting": ((4, 2), "float32"),
        "blocks.count": ((), "int64"),
        "blocks.closed": ((), "int64"),
    }
    assert (spec.chunking, spec.chunk_limit) == ("invisible", None)


@pytest.mark.parametrize(
    ("layers", "change", "message"),
    [
        ([{"kind": "lstm", "units": 3}], {}, "expected a bidirectional layer"),
        ([two_way(), two_way(starts_from="bidirectional_1")], {}, "no `starts_from`"),
        ([two_way()], {"blocks": {"size": 1, "lookahead": 0}}, "blocks of two events"),
        ([two_way()], {"blocks": {"size": 0, "lookahead": 3}}, "blocks.size"),
        ([two_way()], {"max_chunk_steps": 9}, "max_chunk_steps"),
    ],
)
def test_networks_without_support_for_blocks_are_rejected(
    layers: list[dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(layers, **{"size": 3, "lookahead": 2, **change})
