"""Every model that is exported as a graph of one event gives what Keras gives, chunk by chunk."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers as kl

from models.artifact.artifact import load_artifact
from models.networks.build import StepNetwork
from models.onnx.library import open_session
from models.onnx.stateful_graph import StatefulGraph
from models.spec.layout import output_spec
from tests.models.importing.accepted_models import Floats, sequential
from tests.models.importing.exported_models import EXPORTED, recurrent
from tests.models.importing.own_layers import Leaky
from tests.models.importing.saving import import_error, import_here, import_model, write_model
from tests.models.importing.test_table import CLOSE, keras_outputs, random_rows


@pytest.mark.parametrize("name", EXPORTED)
def test_chunks_equal_keras_on_the_whole_sequence(name: str, tmp_path: Path) -> None:
    case, model = EXPORTED[name], EXPORTED[name].build()
    report = import_model(model, tmp_path)
    for words in case.notes:
        assert any(words in note for note in report.notes), report.notes
    artifact = load_artifact(tmp_path / "out")
    network, graph = artifact.spec.onnx, artifact.network
    assert network is not None
    assert graph is not None
    runner = StatefulGraph(network, artifact.state, open_session(graph, 1, "graph"))
    rows = random_rows(case, np.random.default_rng(len(name)))
    expected = keras_outputs(case, model, rows)
    sequences = [value for index, value in enumerate(expected) if index not in case.states]
    for steps in (1, 7, rows.shape[1]):
        layout = artifact.state
        states, parts = layout.pack(layout.initial())[np.newaxis], []
        for at in range(0, rows.shape[1], steps):
            chunk = rows[:, at : at + steps]
            lengths = np.full(1, chunk.shape[1], np.int32)
            outputs, states = runner.step(chunk, lengths, states)
            parts.append(outputs)
        values = output_spec(artifact.spec).by_name(np.concatenate(parts, axis=1))
        assert tuple(values) == case.heads
        for head, value in zip(case.heads, sequences, strict=True):
            is_sequence = values[head].ndim == value.ndim
            actual = values[head] if is_sequence else values[head][:, -1]
            np.testing.assert_allclose(actual, value, **CLOSE)
        state = layout.by_name(layout.unpack(states[0], np.zeros(0, np.int64)))
        for index, part in case.states.items():
            np.testing.assert_allclose(state[part], expected[index][0], **CLOSE)


def quantised(rows: Floats) -> tuple[keras.Model, Floats]:
    """A model of int8 weights, and what it gave before."""
    model = keras.Sequential(
        [kl.Input((None, 3)), kl.Dense(6), kl.LSTM(4, return_sequences=True), kl.Dense(2)]
    )
    before = np.asarray(model(rows))
    model.quantize("int8")
    return model, before


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of Keras' quantisation
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_int8_weights_become_float32(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(2, 6, 3)).astype(np.float32)
    model, before = quantised(rows)
    report = import_here(write_model(model, tmp_path / "m.keras"), tmp_path / "out")
    assert any("the int8 weights of ['dense" in note for note in report.notes), report.notes
    artifact = load_artifact(tmp_path / "out")
    assert artifact.spec.onnx is None
    network = StepNetwork(artifact.spec)
    network.set_weights(artifact.weights)
    state = np.zeros((2, network.state_size), np.float32)
    outputs, _ = network.step(rows, np.full(2, 6, np.int32), state)
    np.testing.assert_allclose(outputs, before, atol=0.02)
    assert not np.allclose(outputs, 0, atol=0.02)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sequential(lambda: recurrent(Leaky(4)))()
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    assert "pip install 'carry[import]'" in import_error(model, tmp_path)
