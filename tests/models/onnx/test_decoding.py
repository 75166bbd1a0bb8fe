"""The decoder of ONNX files, against the library `onnx`."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from models.errors import ArtifactError
from models.importing.onnx_signature import tensor_value
from models.onnx.decoding import (
    DecodingError,
    check_self_contained,
    embed_external_data,
    local_functions,
    operators,
)
from tests.support.onnx_graphs import EXAMPLE_GRAPHS


def all_nodes(graph: onnx.GraphProto) -> set[tuple[str, str]]:
    found = set()
    for node in graph.node:
        found.add((node.domain, node.op_type))
        for attribute in node.attribute:
            found |= all_nodes(attribute.g)
    return found


@pytest.mark.parametrize("name", EXAMPLE_GRAPHS)
def test_operators_are_those_of_the_library(name: str) -> None:
    data = EXAMPLE_GRAPHS[name].path.read_bytes()
    assert operators(data) == all_nodes(onnx.load_from_string(data).graph)
    assert local_functions(data) == set()
    check_self_contained(data, name)


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
def test_external_data_is_embedded_at_any_depth(where: str) -> None:
    data = external(where).SerializeToString()
    with pytest.raises(ArtifactError, match=r"m: .*refers to the file 'w\.bin'"):
        check_self_contained(data, "m")
    asked = []

    def read(entries: dict[str, str]) -> bytes:
        asked.append(entries)
        return np.array([1.5, -2], "<f4").tobytes()

    embedded = embed_external_data(data, read)
    assert asked == [{"location": "w.bin", "offset": "4"}]
    check_self_contained(embedded, "m")
    model = onnx.load_from_string(embedded)
    tensor = {
        "initializer": lambda: model.graph.initializer[0],
        "subgraph": lambda: model.graph.node[0].attribute[0].g.node[0].attribute[0].t,
        "function": lambda: model.functions[0].node[0].attribute[0].t,
    }[where]()
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), [1.5, -2])


def test_a_model_without_external_data_is_unchanged() -> None:
    data = EXAMPLE_GRAPHS["slstm"].path.read_bytes()
    assert embed_external_data(data, lambda entries: b"") == data


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
    plain = flat.view(np.uint16) if value.dtype == np.float16 else flat
    typed = helper.make_tensor("w", raw.data_type, value.shape, flat)
    assert plain.size == value.size
    for tensor in (raw, typed):
        actual = tensor_value(memoryview(tensor.SerializeToString()))
        assert actual.dtype == value.dtype
        np.testing.assert_array_equal(actual, value)


@settings(deadline=None)
@given(data=st.binary(max_size=64))
def test_arbitrary_bytes_are_decoded_or_rejected(data: bytes) -> None:
    try:
        operators(data)
        check_self_contained(data, "m")
    except (DecodingError, ArtifactError):
        pass


def test_a_file_that_ends_inside_a_field_is_rejected() -> None:
    data = EXAMPLE_GRAPHS["min-gru"].path.read_bytes()
    with pytest.raises(DecodingError, match="expected a complete protobuf message"):
        operators(data[:-1])
