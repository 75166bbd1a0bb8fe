"""The step of a network, on the runtime that a service prefers.

That is ONNX Runtime where it is installed and a graph can represent the network (it opens in
milliseconds, where TensorFlow traces every shape of a batch for a second), else TensorFlow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from models.artifact.graphs import ONNXRUNTIME
from models.errors import GraphUnsupportedError
from models.onnx.graph import write_graph
from models.onnx.messages import LENGTHS, OUTPUTS, ROWS, STATES, STATES_AFTER
from models.spec.layout import network_outputs, network_state
from models.spec.model import ModelSpec

FloatArray = NDArray[np.float32]
Step = Callable[[FloatArray, NDArray[np.int32], FloatArray], tuple[FloatArray, FloatArray]]
"""rows [B, T, F], lengths [B], states [B, N] -> outputs [B, T, O], states after [B, N].

As `StepNetwork.step`: in blocks the outputs are those of a window's block, [B, C, O]. Rows beyond a
row's length are not read, and one of length 0 keeps its state.
"""


def open_step(
    spec: ModelSpec,
    weights: Mapping[str, FloatArray],
    network: bytes | None = None,
    *,
    threads: int = 0,
) -> Step:
    """Open the step of a network.

    Args:
        network: the graph of an imported one.
        threads: of ONNX Runtime; 0: as many as there are cores.
    """
    if network is not None and spec.onnx is not None:
        from models.onnx.library import open_session
        from models.onnx.stateful_graph import StatefulGraph

        session = open_session(network, threads, f"model {spec.name!r}")
        return StatefulGraph(spec.onnx, network_state(spec), session).step
    if find_spec(ONNXRUNTIME) is not None:
        try:
            return _on_onnxruntime(write_graph(spec, weights), spec, threads)
        except GraphUnsupportedError:
            pass
    return open_keras_step(spec, weights)


def _on_onnxruntime(graph: bytes, spec: ModelSpec, threads: int) -> Step:
    from models.onnx.library import open_session

    session = open_session(graph, threads, f"model {spec.name!r}")
    width = network_outputs(spec).size

    def run(
        rows: FloatArray, lengths: NDArray[np.int32], states: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        # the graph accepts no padding other than zero
        if int(np.min(lengths)) < rows.shape[1]:
            valid = np.arange(rows.shape[1]) < lengths[:, np.newaxis]
            rows = np.where(valid[..., np.newaxis], rows, np.float32(0))
        feeds = {ROWS: rows, LENGTHS: lengths, STATES: states}
        outputs, after = session.run([OUTPUTS, STATES_AFTER], feeds)
        return outputs, after

    def step(
        rows: FloatArray, lengths: NDArray[np.int32], states: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        # the graph accepts no row of length 0; without any row it ends the process
        running = np.flatnonzero(lengths)
        if running.size == len(rows) > 0:
            return run(rows, lengths, states)
        output_steps = rows.shape[1] if spec.blocks is None else spec.blocks.size
        outputs = np.zeros((len(rows), output_steps, width), np.float32)
        after = states.copy()
        if running.size:
            arguments = rows[running], lengths[running], states[running]
            outputs[running], after[running] = run(*arguments)
        return outputs, after

    return step


def open_keras_step(spec: ModelSpec, weights: Mapping[str, FloatArray]) -> Step:
    """Open the step of a network's Keras layers. Imports TensorFlow."""
    # TensorFlow logs its start to stderr from C++; errors are still logged
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    from models.networks.build import StepNetwork

    network = StepNetwork(spec)
    network.set_weights(weights)
    signature = [
        tf.TensorSpec([None, None, spec.input_features], tf.float32),
        tf.TensorSpec([None], tf.int32),
        tf.TensorSpec([None, network.state_size], tf.float32),
    ]
    traced = tf.function(network.step, autograph=False, input_signature=signature)

    def step(
        rows: FloatArray, lengths: NDArray[np.int32], states: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        outputs, after = traced(rows, lengths, states)
        return outputs.numpy(), np.array(after)

    return step
