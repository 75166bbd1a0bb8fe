"""Which runtime is chosen, and the errors if it cannot be opened."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from structlog.testing import capture_logs

import models
from models.artifact.artifact import Artifact, load_artifact
from models.artifact.fingerprint import compute_fingerprint
from models.artifact.writing import write_artifact
from models.onnx.graph import write_graph
from models.spec.model import parse_spec
from service.engine.runtimes import loading
from service.engine.runtimes.loading import (
    RuntimeMissingError,
    RuntimeUnsupportedError,
    open_runtime,
    open_runtimes,
)
from tests.models.artifact.artifacts import manifest_of, seal
from tests.support.oracle import contracting_weights, oracle_step
from tests.support.stepping import step


def artifact(folder: Path, activation: str = "tanh") -> Artifact:
    layers = [{"kind": "lstm", "units": 2, "activation": activation}]
    heads = [{"kind": "sequence", "name": "h"}]
    spec = parse_spec({"name": "m", "features": 1, "layers": layers, "heads": heads})
    return write_artifact(folder, spec, contracting_weights(spec, 1))


@pytest.fixture
def with_graph(tmp_path: Path) -> Artifact:
    """An artifact with a graph."""
    return artifact(tmp_path / "with_graph")


BOTH, ONNX, TENSORFLOW = ("onnxruntime", "tensorflow"), ("onnxruntime",), ("tensorflow",)


@pytest.mark.parametrize(
    ("wanted", "installed", "has_graph", "chosen", "reason"),
    [
        ("auto", BOTH, True, "onnxruntime", "the model has a graph"),
        ("auto", BOTH, False, "tensorflow", r"'selu'"),
        ("auto", ONNX, True, "onnxruntime", "the model has a graph"),
        ("auto", TENSORFLOW, True, "tensorflow", "onnxruntime is not installed"),
        ("tensorflow", BOTH, True, "tensorflow", "as configured"),
        ("auto", ONNX, False, RuntimeMissingError, r"no_graph: .*'selu'.*carry\[tensorflow\]"),
        ("auto", (), True, RuntimeMissingError, "pip install onnxruntime"),
        ("torch", BOTH, True, ValueError, r"'onnxruntime', 'tensorflow'\], got 'torch'"),
    ],
)
def test_a_runtime_is_chosen_for_each_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    installed: Sequence[str],
    has_graph: bool,
    chosen: str | type[Exception],
    reason: str,
) -> None:
    model = artifact(tmp_path / "m") if has_graph else artifact(tmp_path / "no_graph", "selu")
    monkeypatch.setattr(loading, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(loading, "open_runtime", lambda name, *_: name)
    with capture_logs() as logs:
        if not isinstance(chosen, str):
            with pytest.raises(chosen, match=reason):
                open_runtimes(wanted, [model], 1)
            return
        assert open_runtimes(wanted, [model], 1) == [chosen]
    [line] = [entry for entry in logs if entry["event"] == "runtime"]
    assert (line["model"], line["runtime"]) == ("m", chosen)
    assert re.search(reason, line["reason"])


def test_a_model_without_a_graph_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnsupportedError, match=r"^runtime_unsupported: .*'selu'"):
        open_runtimes("onnxruntime", [artifact(tmp_path / "m", "selu")], 1)


def test_tensorflow_is_not_imported_unless_a_model_needs_it(
    with_graph: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: name)
    monkeypatch.delitem(sys.modules, "service.engine.runtimes.tensorflow", raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (runtime,) = open_runtimes("auto", [with_graph], 1)
    assert runtime.name == "onnxruntime"


def test_a_missing_library_is_named_with_what_to_install(
    with_graph: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, wanted in (("onnxruntime", "onnxruntime"), ("tensorflow", r"'carry\[tensorflow\]'")):
        module = f"service.engine.runtimes.{'onnx' if name == 'onnxruntime' else name}"
        for loaded in (module, "models.onnx.library"):
            monkeypatch.delitem(sys.modules, loaded, raising=False)
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(RuntimeMissingError, match=rf"'{name}' needs .*pip install {wanted}"):
            open_runtime(name, with_graph, 1)


def endless(model: Artifact, _: Any) -> bytes:
    """A loop that does not terminate."""
    number, truth = onnx.TensorProto.INT64, onnx.TensorProto.BOOL
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["x", "x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("i", number, []),
            helper.make_tensor_value_info("go", truth, []),
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("on", truth, []),
            helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, []),
        ],
    )
    loop = helper.make_node("Loop", ["trips", "true", "start"], ["end"], body=body)
    constants = [
        helper.make_tensor("trips", number, [], [2**62]),
        helper.make_tensor("true", truth, [], [True]),
        helper.make_tensor("start", onnx.TensorProto.FLOAT, [], [1.0]),
    ]
    return with_this_first(model, [loop], constants)


def external(model: Artifact, _: Any) -> bytes:
    """A constant whose elements are in a file of the working directory."""
    constant = onnx.TensorProto(name="secret", data_type=onnx.TensorProto.FLOAT, dims=[1])
    constant.data_location = onnx.TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="secret.bin")
    return with_this_first(model, [helper.make_node("Neg", ["secret"], ["end"])], [constant])


def with_this_first(source: Artifact, nodes: list[Any], constants: list[Any]) -> bytes:
    """The graph of the weights, the heads included, and nodes before it whose output is `end`."""
    model = onnx.load_from_string(write_graph(source.spec, source.weights))
    kept = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *kept])
    model.graph.initializer.extend(constants)
    model.graph.output.append(helper.make_tensor_value_info("end", onnx.TensorProto.FLOAT, None))
    return bytes(model.SerializeToString())


EXCHANGED = {
    "endless loop": endless,
    "external data": external,
    "other weights": lambda model, other: write_graph(model.spec, other).replace(
        compute_fingerprint(model.spec, other).hex().encode(), model.fingerprint.hex().encode()
    ),
    "no graph": lambda model, other: b"junk",
}


@pytest.mark.parametrize("exchanged", EXCHANGED.values(), ids=EXCHANGED.keys())
def test_a_replaced_graph_file_is_not_run(with_graph: Artifact, exchanged: Any) -> None:
    """It has the model's fingerprint in it, and the manifest its checksum."""
    other = contracting_weights(with_graph.spec, 2)
    (with_graph.path / "graph.onnx").write_bytes(exchanged(with_graph, other))
    seal(with_graph.path, manifest_of(with_graph.path))

    with capture_logs() as logs:
        (runtime,) = open_runtimes("onnxruntime", [load_artifact(with_graph.path)], 1)

    (line,) = [entry for entry in logs if entry["event"] == "graph_differs"]
    assert line["files"] == ["graph.onnx"]
    assert f"carry graph {with_graph.path}" in line["hint"]
    rows = np.random.default_rng(1).normal(size=(3, 1)).astype(np.float32)
    state = np.zeros(with_graph.state.float_size, np.float32)
    (outputs,), _ = step(runtime, [rows], state[np.newaxis])
    np.testing.assert_allclose(
        outputs,
        oracle_step(with_graph.spec, with_graph.weights, rows, state)[0],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("name", "version"), [("flights", "cbb88d978926"), ("rivers", "5bb9f1d002d0")]
)
def test_a_pretrained_model_has_its_graph(name: str, version: str) -> None:
    artifact = load_artifact(Path(models.__file__).parent / "pretrained" / name)
    runtime = open_runtime("onnxruntime", artifact, 1)
    runtime.warm()
    assert (runtime.name, artifact.version) == ("onnxruntime", version)
    assert artifact.differing_graphs == []
