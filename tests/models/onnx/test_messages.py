"""ONNX files are read as the library `onnx` reads them."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from models.onnx import messages
from models.onnx.messages import DecodingError, inner_messages, parse_model, tensor_array
from tests.support.onnx_graphs import EXAMPLE_GRAPHS

Operators = list[tuple[str, str]]


def all_nodes(graph: onnx.GraphProto) -> Operators:
    found = []
    for node in graph.node:
        found.append((node.domain, node.op_type))
        for attribute in node.attribute:
            found += all_nodes(attribute.g)
    return found


@pytest.mark.parametrize("name", EXAMPLE_GRAPHS)
def test_files_are_read_and_written_as_by_the_library(name: str) -> None:
    data = EXAMPLE_GRAPHS[name].path.read_bytes()
    model = parse_model(data)
    nodes = [(each.domain, each.op_type) for each in inner_messages(model, messages.NodeProto)]
    assert sorted(nodes) == sorted(all_nodes(onnx.load_from_string(data).graph))
    assert onnx.load_from_string(model.SerializeToString()) == onnx.load_from_string(data)


def external(where: str) -> onnx.ModelProto:
    """A model with a tensor in another file, as an initializer or deep inside a node."""
    tensor = TensorProto(name="w", dims=[2], data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    tensor.external_data.add(key="offset", value="4")
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    inner = helper.make_graph([constant], "inner", [], [])
    nodes = [] if where == "initializer" else [helper.make_node("If", ["c"], [], then_branch=inner)]
    constants = [tensor] if where == "initializer" else []
    graph = helper.make_graph(nodes, "outer", [], [], constants)
    if where == "function":
        function = helper.make_function(
            "own", "F", [], ["w"], [constant], [helper.make_opsetid("", 18)]
        )
        return helper.make_model(helper.make_graph([], "outer", [], []), functions=[function])
    return helper.make_model(graph)


@pytest.mark.parametrize("where", ["initializer", "subgraph", "function"])
def test_tensors_in_other_files_are_found_at_any_depth(where: str) -> None:
    model = parse_model(external(where).SerializeToString())
    found = [messages.is_external(each) for each in inner_messages(model, messages.TensorProto)]
    assert found == [True]


@pytest.mark.parametrize("part", ["data_location", "external_data"])
def test_either_sign_of_another_file_is_enough(part: str) -> None:
    tensor = external("initializer").graph.initializer[0]
    tensor.ClearField(part)
    assert messages.is_external(messages.TensorProto.FromString(tensor.SerializeToString()))


@pytest.mark.parametrize(
    "value",
    [
        np.array([[1.5, -2]], np.float32),
        np.array([1, -2], np.int64),
        np.array([1, -2], np.int32),
        np.array([1.5], np.float64),
        np.array([True, False]),
        np.array(3, np.int8),
        np.array([1.5, -2], np.float16),
    ],
)
def test_values_of_tensors_are_those_of_the_library(value: np.ndarray) -> None:
    raw = numpy_helper.from_array(value)
    flat = value.ravel()
    typed = helper.make_tensor("w", raw.data_type, value.shape, flat)
    for tensor in (raw, typed):
        actual = tensor_array(messages.TensorProto.FromString(tensor.SerializeToString()))
        assert actual.dtype == value.dtype
        np.testing.assert_array_equal(actual, value)


@settings(deadline=None)
@given(data=st.binary(max_size=64))
def test_arbitrary_bytes_are_decoded_or_rejected(data: bytes) -> None:
    with suppress(DecodingError):
        list(inner_messages(parse_model(data), messages.NodeProto))


def test_a_file_that_ends_inside_a_field_is_rejected() -> None:
    data = EXAMPLE_GRAPHS["min-gru"].path.read_bytes()
    with pytest.raises(DecodingError):
        parse_model(data[:-1])
    with pytest.raises(DecodingError, match="no graph"):
        parse_model(b"")
