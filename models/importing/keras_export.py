"""Exports a Keras model that a specification cannot describe, as an ONNX graph of one event.

The graph of the model's step (`models.importing.keras_steps`) is imported as every other ONNX graph
(`models.importing.onnx_conversion`), and compared with the model on random sequences, in chunks of
one event, of several and of all.
"""

from __future__ import annotations

import base64
import io
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers as kl
from numpy.typing import NDArray

from models.errors import ImportedModelError
from models.importing import verification
from models.importing.isolation import Conversion, OnnxOptions
from models.importing.keras_calls import (
    ArgumentInput,
    CalledSequence,
    call_model,
    inputs_of,
    layers_of,
)
from models.importing.keras_graph import window_notes
from models.importing.keras_inputs import output_names, unique_output_name
from models.importing.keras_layers import LAST_STEP
from models.importing.keras_steps import START, StepFunction
from models.importing.keras_values import owner_of
from models.importing.onnx_conversion import Arrays, convert_onnx
from models.importing.onnx_signature import Signature, Tensor, find_pairs
from models.importing.triton_config import TritonControl
from models.onnx.library import open_session
from models.onnx.stateful_graph import StatefulGraph
from models.spec.layout import output_spec, state_spec
from models.spec.model import parse_spec

OPSET = 18
CHUNKS_STEPS = (1, 7, 2**20)
"""Steps of the chunks in which the graph is compared with the model."""
NEXT = ".next"
"""What the name of a state ends with after the event."""
MISSING = (
    "the model can be exported to ONNX, which needs more packages; install them with `pip install "
    "'carry[import]'` and import it again"
)

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Export:
    """A model as a step, and what it is compared on.

    Attributes:
        step: the step.
        names: of the outputs that are not states, in the model's order.
        sequences: calls of the model.
        has_steps: for each of these outputs, whether the model gives one for every event.
    """

    step: StepFunction
    names: Sequence[str]
    sequences: Sequence[CalledSequence]
    has_steps: Sequence[bool]

    @property
    def own(self) -> list[int]:
        """The outputs of the model that are not states."""
        states = set(self.step.pairs.values())
        return [at for at in range(len(self.step.shapes)) if at not in states]

    def check(self, sequence: CalledSequence, outputs: Sequence[NDArray[Any]]) -> float:
        """The largest difference of outputs [B, T, ...] from the model's.

        Raises:
            ImportedModelError: it is too large.
        """
        largest = 0.0
        for at, output, has_steps in zip(self.own, outputs, self.has_steps, strict=True):
            actual = output if has_steps else output[:, -1]
            steps = sequence.rows.shape[1]
            gap = verification.difference(actual, sequence.outputs[at].astype(np.float32), steps)
            largest = max(largest, gap)
        return largest


def export_keras(
    model: Any, name: str, states: Mapping[str, str]
) -> tuple[Conversion, Arrays, bytes]:
    """Export a built model as an ONNX graph, and verify it.

    Args:
        name: the packaged model's name, a lower-case slug.
        states: state output by state input, where names do not decide it.

    Returns:
        The conversion, the initial values by state part, and the graph.

    Raises:
        ImportedModelError: the step is another one than the model's, or cannot be exported.
    """
    structure, inputs, steps = inputs_of(model)
    step = StepFunction(model, structure, inputs, steps, {})
    names = _output_names(model, step)
    if (pairs := _find_pairs(step, inputs, names, states)) != step.pairs:
        step = StepFunction(model, structure, inputs, steps, pairs)
        names = _output_names(model, step)
    if not step.initial:
        raise ImportedModelError(
            "it keeps no state of a stream; expected at least one recurrent layer, or inputs of "
            "the model that are states, with outputs that are their new values"
        )
    lengths = [steps] * 2 if steps else verification.LENGTHS_STEPS
    calls = list(call_model(model, structure, inputs, lengths, step.pairs))
    own = [at for at in range(len(step.shapes)) if at not in step.pairs.values()]
    length = calls[-1].rows.shape[1]
    has_steps = [
        step.shapes[at][1:2] == (1,)
        and calls[-1].outputs[at].shape[1:2] == (length,)
        and (length > 1 or len(step.shapes[at]) > 2)
        for at in own
    ]
    exported = _Export(step, [names[at] for at in own], calls, has_steps)
    conversion, values, graph = _convert(exported, name)
    verified = _check_graph(exported, conversion.spec, values, graph)
    notes = (*_notes(model, exported, steps), *conversion.notes)
    changes = {"keras": keras.__version__, "notes": notes}
    return (
        conversion.model_copy(update={**changes, "verified": {**conversion.verified, **verified}}),
        values,
        graph,
    )


def _output_names(model: Any, step: StepFunction) -> list[str]:
    """A name for each output that differs from those of inputs and states."""
    used = {each.name for each in step.columns} | {*step.initial, START}
    count = len(step.shapes)
    keys = [f"output_{key}" if key.isdigit() else key or "output" for key in step.keys]
    if hasattr(model, "_nodes_by_depth"):
        keys = output_names(model, count - len(step.pairs))
    return [unique_output_name(used, key) for key in keys]


def _find_pairs(
    step: StepFunction,
    inputs: Sequence[ArgumentInput],
    names: Sequence[str],
    states: Mapping[str, str],
) -> dict[int, int]:
    """State inputs of layers without a cell, with their outputs, as those of an ONNX graph."""
    tensors = [Tensor(each.name, ("batch", *each.shape), each.dtype) for each in inputs]
    results = [
        Tensor(name, ("batch", *shape[1:]), "float32")
        for name, shape in zip(names, step.shapes, strict=True)
    ]
    signature = Signature(tuple(tensors), tuple(results), {}, None, None, b"")
    known = {inputs[at].name: names[index] for at, index in step.pairs.items()}
    others = [each.name for each in inputs if each.has_steps]
    own = [each for each in inputs if not each.has_steps and each.name not in known]
    if not own or (step.initial and not states):
        return step.pairs
    pairs = find_pairs(signature, {**known, **states}, others, has_features=True)
    index = {each.name: at for at, each in enumerate(inputs)}
    return {index[before]: names.index(after) for before, after in pairs.items()}


def _convert(exported: _Export, name: str) -> tuple[Conversion, Arrays, bytes]:
    """Write the step as an ONNX file, and import that."""
    try:
        import tf2onnx  # type: ignore[import-untyped]  # of the extra `import`
    except ImportError as error:
        raise ImportedModelError(MISSING) from error
    step = exported.step

    def named(*arguments: Any) -> dict[str, Any]:
        outputs, states = step(*arguments)
        own = {
            key: tf.squeeze(value, 1) if has_steps else value
            for key, value, has_steps in zip(
                exported.names, outputs, exported.has_steps, strict=True
            )
        }
        after = zip(step.initial, states, strict=True)
        return {**own, **{f"{state}{NEXT}": tf.identity(value) for state, value in after}}

    function = tf.function(named, step.signature, autograph=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the converter, about NumPy
            model, _ = tf2onnx.convert.from_function(function, step.signature, opset=OPSET)
    except Exception as error:  # the converter's exceptions have no common base
        raise ImportedModelError(
            f"tf2onnx cannot convert its operations: {' '.join(str(error).split())[:500]}"
        ) from error
    options = OnnxOptions(
        states={state: f"{state}{NEXT}" for state in step.initial},
        inputs=tuple(each.name for each in step.columns),
        outputs=tuple(exported.names),
        initial={key: _npy(value) for key, value in step.initial.items() if value.any()},
        axes="step",
    )
    controls = [TritonControl(START, "start", (0, 1))] if step.has_start else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        path.write_bytes(model.SerializeToString())
        return convert_onnx(path, path.parent, name, options, controls)


def _npy(value: NDArray[Any]) -> str:
    stream = io.BytesIO()
    np.save(stream, value)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _check_graph(
    exported: _Export, spec_data: dict[str, Any], initial: Arrays, graph: bytes
) -> dict[str, Any]:
    """Compare the graph in chunks with the model."""
    spec = parse_spec(spec_data, "the exported model")
    network, largest = spec.onnx, 0.0
    if network is None:
        raise ImportedModelError("expected the exported model to be a graph")
    layout = replace(state_spec(spec), initial_values=initial)
    runner = StatefulGraph(network, layout, open_session(graph, 1, "graph"))
    for sequence in exported.sequences:
        batch, length = sequence.rows.shape[:2]
        for steps in CHUNKS_STEPS:
            states = np.tile(layout.pack(layout.initial()), (batch, 1))
            parts = []
            for at in range(0, length, steps):
                chunk = sequence.rows[:, at : at + steps]
                lengths = np.full(batch, chunk.shape[1], np.int32)
                outputs, states = runner.step(chunk, lengths, states)
                parts.append(outputs)
            values = output_spec(spec).by_name(np.concatenate(parts, axis=1))
            largest = max(largest, exported.check(sequence, [values[n] for n in exported.names]))
    return {
        "lengths_steps": [each.rows.shape[1] for each in exported.sequences],
        "sequences": len(exported.sequences[0].rows),
        "largest_difference": largest,
    }


def _notes(model: Any, exported: _Export, steps: int | None) -> list[str]:
    """What the user should know about rows, states and outputs."""
    step, start, listed, notes = exported.step, 0, [], []
    for each in step.columns:
        end = start + each.width - 1
        listed.append(f"{each.name!r} [{start}" + (f" to {end}]" if end > start else "]"))
        start = end + 1
    if len(listed) > 1:
        notes.append(f"the inputs are columns of one row of {start}: {', '.join(listed)}")
    if constant := [each.name for each in step.columns if not each.has_steps]:
        notes.append(
            f"{constant} belong to the stream: every row repeats their values"
            + ("; states start from those of the first event" if step.has_start else "")
        )
    if step.pairs:
        held = ", ".join(repr(step.inputs[at].name) for at in step.pairs)
        notes.append(
            f"the inputs that hold states are the stream's state, zero for a new stream: {held}"
        )
    last = [n for n, each in zip(exported.names, exported.has_steps, strict=True) if not each]
    notes += [f"output {output!r}: {LAST_STEP}" for output in last]
    for layer in layers_of(model):
        if isinstance(layer, kl.Masking) or getattr(layer, "mask_zero", False):
            value = layer.mask_value if isinstance(layer, kl.Masking) else 0
            notes.append(
                f"{owner_of(layer)} marks padding of training sequences with {value:g}; a stream "
                "has no padding and such an event counts like any other: do not send it"
            )
    if steps is not None and steps > 1 and not step.pairs:
        notes += window_notes(model, steps)
    return notes
