"""Pairs of state inputs and outputs: inferred from names and shapes, or Triton's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import ImportedModelError
from models.importing.onnx_signature import Signature, Tensor, find_pairs
from models.importing.triton_config import TritonConfig
from models.onnx.messages import ModelProto
from tests.support.onnx_graphs import EXAMPLES

X = Tensor("x", ("b", "t", 3), "float32")
Y = Tensor("y", ("b", "t", 2), "float32")


def state(name: str, *shape: Any, dtype: str = "float32") -> Tensor:
    return Tensor(name, shape or ("b", 5), dtype)


def signature(inputs: list[Tensor], outputs: list[Tensor]) -> Signature:
    return Signature((X, *inputs), (Y, *outputs), {}, None, ModelProto(), b"")


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (["h_in"], ["h_out"]),
        (["h0", "c0"], ["hn", "cn"]),
        (["h_0", "c_0"], ["h_n", "c_n"]),
        (["initial_h", "initial_c"], ["Y_h", "Y_c"]),
        (["state"], ["new_state"]),
        (["prev_state"], ["next_state"]),
        (["hiddenIn", "cellIn"], ["hiddenOut", "cellOut"]),
        (["past_key.0", "past_key.1"], ["present_key.0", "present_key.1"]),
        (["h1_in", "h2_in"], ["h1_out", "h2_out"]),
        (["lstm/h:0"], ["lstm/h_next:0"]),
        (["h0", "c0"], ["ho0", "co0"]),
        (["hi", "ci"], ["ho", "co"]),
    ],
)
def test_names_pair_states(inputs: list[str], outputs: list[str]) -> None:
    given = signature([state(name) for name in inputs], [state(name) for name in outputs[::-1]])
    assert find_pairs(given, {}, ()) == dict(zip(inputs, outputs, strict=True))


def test_shapes_pair_states_whose_names_say_nothing() -> None:
    inputs = [state("a", "b", 5), state("c", "b", 7), state("e", "b", 7, dtype="int64")]
    outputs = [state("p", "b", 7, dtype="int64"), state("q", "b", 5), state("r", "b", 7)]
    assert find_pairs(signature(inputs, outputs), {}, ()) == {"a": "q", "c": "r", "e": "p"}


def test_ambiguous_state_pairs_are_rejected() -> None:
    twins = signature([state("a"), state("c")], [state("p"), state("q")])
    with pytest.raises(ImportedModelError, match=r"--state a=p --state c=q"):
        find_pairs(twins, {}, ())
    assert find_pairs(twins, {"a": "q", "c": "p"}, ()) == {"a": "q", "c": "p"}
    with pytest.raises(ImportedModelError, match=r"ambiguous.*`--state a=p`"):
        find_pairs(signature([state("a"), state("c")], [state("p")]), {}, ())
    with pytest.raises(ImportedModelError, match=r"found no pair.*`--state INPUT=OUTPUT`"):
        find_pairs(signature([state("a")], [state("p", "b", 6)]), {}, ())
    with pytest.raises(ImportedModelError, match=r"one state input for each .*\['p'\]"):
        find_pairs(twins, {"a": "p", "c": "p"}, ())


def test_an_output_of_the_features_own_name_and_shape_is_no_state() -> None:
    twin = Tensor("x_out", ("b", "t", 3), "float32")
    given = Signature((X, state("h_in")), (twin, state("h_out")), {}, None, None, b"")
    assert find_pairs(given, {}, ("x",)) == {"h_in": "h_out"}


def test_shape_pairs_the_one_state_besides_named_inputs_of_features() -> None:
    x, y = Tensor("x", (1, 1, 5), "float32"), Tensor("y", (1, 1, 5), "float32")
    given = Signature((x, state("a", 1, 2, 5)), (y, state("p", 1, 2, 5)), {}, None, None, b"")
    assert find_pairs(given, {}, ("x",), has_features=True) == {"a": "p"}


CONFIG = EXAMPLES / "triton" / "counting_gru" / "config.pbtxt"


def test_triton_configuration_gives_pairs_and_initial_values() -> None:
    config = TritonConfig(CONFIG.read_text(), CONFIG.parent)
    assert config.pairs == {"STATE": "MEMORY", "SEEN": "COUNT"}
    assert (config.inputs, config.outputs) == (("INPUT",), ("OUTPUT",))
    ((name, values),) = config.initial_values()
    assert name == "STATE"
    assert values.dtype == np.float32
    assert values.shape == (8,)


STATE = 'input_name: "a" output_name: "b"'


@pytest.mark.parametrize(
    "text",
    [
        f"sequence_batching {{ state [ {{ {STATE} }} ] }}",
        f"sequence_batching: < state < {STATE} > >;",
        f"sequence_batching {{ state {{ input_name: 'of which the last counts' {STATE} }} }}",
        "# no comma, single quotes\nsequence_batching{state{input_name:'a',output_name:'b'}}",
        f"platform: 'x' a {{ b: -1 }} sequence_batching {{ state {{ {STATE} }} }}",
    ],
)
def test_every_form_of_the_text_format_is_read(text: str) -> None:
    assert TritonConfig(text).pairs == {"a": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: 'm'", r"expected `sequence_batching \{ state \[...\] \}`.*--state IN=OUT"),
        ("name @ 3", r"config\.pbtxt:1: expected protobuf's text format, got '@ 3'"),
        ("a {", r"'\}' before the end"),
        ("a: [ 1, 2", r"before the end"),
        ("a: }", r"expected a value, got '\}'"),
        ("a { b } c", r"expected a value, got '\}'"),
        ("a " + "{ a " * 5000, r"nested too deeply"),
        (
            f"sequence_batching {{ state {{ {STATE} }} control_input {{ name: 'ID' "
            "control { kind: CONTROL_SEQUENCE_CORRID } } }",
            r"control_input 'ID': expected one of .*SEQUENCE_START.*export the model without it",
        ),
        (
            f"sequence_batching {{ state {{ {STATE} }} control_input {{ name: 'S' "
            "control { kind: CONTROL_SEQUENCE_START int32_false_true: 1 } } }",
            r"control_input 'S': expected the values of false and true, got \['1'\]",
        ),
    ],
)
def test_an_unusable_triton_configuration_is_rejected(text: str, message: str) -> None:
    with pytest.raises(ImportedModelError, match=message):
        TritonConfig(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../config.pbtxt", r"expected a file in `initial_state/`"),
        ("gone.bin", r"initial_state/gone\.bin: cannot be read"),
        ("short.bin", r"short\.bin: expected \[8\] values of TYPE_FP32, got 4 bytes"),
    ],
)
def test_files_of_initial_values_are_checked(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "initial_state").mkdir()
    (tmp_path / "initial_state" / "short.bin").write_bytes(bytes(4))
    config = TritonConfig(CONFIG.read_text().replace("memory.bin", name), tmp_path)
    with pytest.raises(ImportedModelError, match=message):
        list(config.initial_values())
