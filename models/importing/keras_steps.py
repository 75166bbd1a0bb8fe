"""Calls a Keras model on one event, with its states as arguments and results.

    step(values of one event, is it the first of its stream?, states) -> (outputs, states after it)

The model is traced as it is, whatever its layers and cells compute. Layers that read the axis of
events do one step of it during the trace:

    RNN               calls its cell once, on the state of the stream; an `initial_state` that
                      inputs of the stream give is the state before the first event
    causal Conv1D     reads the rows before the event from the state
    TimeDistributed   calls its layer on the event
    RepeatVector      of values of the stream: gives them to the event
    Reshape           of a fixed number of steps: of one step

On another axis, such as that of a decoder behind a `RepeatVector`, they are called as they are. No
other layer is known here: `models.importing.keras_export` compares the result with the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers as kl
from numpy.typing import NDArray

from models.importing.keras_calls import ArgumentInput, plain_name
from models.importing.keras_layers import UnsupportedLayerError
from models.importing.keras_values import owner_of

START = "is_first_event"
"""The argument of a step that is true at the first event of a stream."""


@dataclass(slots=True)
class _Trace:
    """One call of the model on an event.

    Attributes:
        inputs: the tensors of the model's inputs.
        events: which of them have values for each event.
        held: which of them are states.
        start: bool [B], whether it is the first event of its stream; None if no layer reads it.
        given: states before the event by name; without them, streams start.
        steps: the number of steps that the model fixes, or None.
        initial: initial values of the states by name.
        after: the states after the event by name.
        explicit: input that a layer starts from -> its state after the event.
        has_start: whether a layer reads `start`.
        is_inside: whether the layer being called is inside a `TimeDistributed`.
    """

    inputs: Sequence[Any]
    events: Sequence[int]
    held: Mapping[int, int]
    start: Any
    given: Mapping[str, Any]
    steps: int | None
    initial: dict[str, NDArray[Any]] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    explicit: dict[int, Any] = field(default_factory=dict)
    has_start: bool = False
    is_inside: bool = False

    def is_event(self, value: Any) -> bool:
        """Whether the second axis of a layer's input is that of the events."""
        return len(value.shape) > 1 and value.shape[1] == 1 and not self.is_inside

    def state(self, layer: Any, values: Sequence[Any]) -> dict[str, Any]:
        """The states of a layer before the event by name, from their initial values of one row."""
        own = stem = plain_name(layer.name)
        number = 1
        while any(name.rpartition(".")[0] == stem for name in self.initial):
            number += 1
            stem = f"{own}_{number}"
        names = [f"{stem}.state_{index + 1}" for index in range(len(values))]
        rows, states = tf.shape(self.inputs[0])[0], {}
        for name, value in zip(names, values, strict=True):
            self.initial[name] = first = np.asarray(value)[0]
            states[name] = self.given.get(name)
            if states[name] is None:
                states[name] = tf.tile(first[np.newaxis], [rows, *[1] * first.ndim])
        return states

    def index_of(self, tensor: Any) -> int | None:
        """Which of the model's inputs a tensor is."""
        while tensor.op.type == "Identity":
            tensor = tensor.op.inputs[0]
        return next((at for at, each in enumerate(self.inputs) if each is tensor), None)

    def reads_events(self, tensor: Any) -> bool:
        """Whether a tensor is computed from values of events or from states."""
        own = [at for at in range(len(self.inputs)) if at in self.events or at in self.held]
        sources = {*(self.inputs[at].op for at in own), *(v.op for v in self.given.values())}
        remaining, seen = [tensor.op], set()
        while remaining:
            operation = remaining.pop()
            if operation in sources:
                return True
            if operation not in seen:
                seen.add(operation)
                remaining += [each.op for each in operation.inputs]
        return False

    def call_recurrent(
        self,
        original: Any,
        layer: Any,
        sequences: Any,
        initial_state: Any = None,
        mask: Any = None,
        training: bool = False,
    ) -> Any:
        """Do one step of a recurrent layer; a mask of padding has no effect."""
        if not self.is_event(sequences):
            return original(layer, sequences, initial_state, mask, training)
        if layer.go_backwards:
            raise UnsupportedLayerError(f"{owner_of(layer)} reads the sequence from its end")
        with tf.init_scope():
            structure = layer.get_initial_state(batch_size=1)
            dtype = getattr(layer.cell, "compute_dtype", "float32")
            first = [keras.ops.cast(v, dtype) for v in keras.tree.flatten(structure)]
        given = [] if initial_state is None else keras.tree.flatten(initial_state)
        indices = [self.index_of(value) for value in given]
        names: list[str] = []
        if given and all(index in self.held for index in indices):
            states = given
        else:
            before = self.state(layer, first)
            names, states = list(before), list(before.values())
        if given and names:
            if any(map(self.reads_events, given)):
                raise UnsupportedLayerError(
                    f"{owner_of(layer)}: its initial_state depends on the events of the same call, "
                    "so it would be another one at each chunk"
                )
            self.has_start = True
            pairs = zip(given, states, strict=True)
            states = [tf.where(_like(self.start, new), new, old) for new, old in pairs]
        options = {"training": False} if getattr(layer.cell, "_call_has_training_arg", 0) else {}
        packed = keras.tree.pack_sequence_as(structure, states)
        output, after = layer.cell(sequences[:, 0], packed, **options)
        after = list(after) if isinstance(after, (list, tuple)) else [after]
        values = keras.tree.flatten(after)
        self.after.update(zip(names, values, strict=False))
        if layer.return_state:
            pairs = zip(indices, values, strict=False)
            self.explicit.update({at: new for at, new in pairs if at is not None})
        output = output[:, tf.newaxis] if layer.return_sequences else output
        return (output, *after) if layer.return_state else output

    def call_convolution(self, original: Any, layer: Any, inputs: Any) -> Any:
        """Do one step of a convolution that reads earlier rows."""
        size, dilation = layer.kernel_size[0], layer.dilation_rate[0]
        if not self.is_event(inputs) or size == 1:
            return original(layer, inputs)
        if layer.padding != "causal":
            raise UnsupportedLayerError(f"{owner_of(layer)} reads later rows than the event")
        zeros = np.zeros((1, (size - 1) * dilation, inputs.shape[2]), layer.compute_dtype)
        ((name, before),) = self.state(layer, [zeros]).items()
        rows = tf.concat([before, inputs], axis=1)
        self.after[name] = rows[:, 1:]
        with _replaced(layer, "padding", "valid"):
            return original(layer, rows)

    def call_distributed(
        self, original: Any, layer: Any, inputs: Any, training: Any = None, mask: Any = None
    ) -> Any:
        """Call the layer of a `TimeDistributed` on the event."""
        if not self.is_event(inputs):
            return original(layer, inputs, training, mask)
        with _replaced(self, "is_inside", True):
            return layer.layer(inputs[:, 0])[:, tf.newaxis]

    def call_repeat(self, original: Any, layer: Any, inputs: Any) -> Any:
        """Repeat values of the stream once."""
        return original(layer, inputs) if self.reads_events(inputs) else inputs[:, tf.newaxis]

    def call_reshape(self, original: Any, layer: Any, inputs: Any) -> Any:
        """Arrange the values of one step."""
        if not self.is_event(inputs) or self.steps is None or layer.target_shape[0] != self.steps:
            return original(layer, inputs)
        return tf.reshape(inputs, [-1, 1, *layer.target_shape[1:]])


_REPLACED: dict[Any, Any] = {
    kl.RNN: _Trace.call_recurrent,
    kl.Conv1D: _Trace.call_convolution,
    kl.TimeDistributed: _Trace.call_distributed,
    kl.RepeatVector: _Trace.call_repeat,
    kl.Reshape: _Trace.call_reshape,
}


class StepFunction:
    """A Keras model as a function of one event, and of the states that it finds in it.

    Args:
        model: the built model.
        structure: its inputs as `model` takes them, with any leaves.
        inputs: the same, flattened.
        steps: the number of steps that the model fixes, or None.
        pairs: input that is a state -> output that is its new value, by index; those of recurrent
            layers are found.

    Attributes:
        inputs: the inputs of the model.
        pairs: all state inputs, with their outputs.
        initial: initial values by state, without the axis of the batch.
        shapes: of each output of the model for one event, [B, ...].
        keys: the place of each output in their structure, such as its key in a dictionary.
        has_start: whether a step has the argument `START`.

    Raises:
        UnsupportedLayerError: a layer reads several events.
        Exception: whatever Keras raises for a model that cannot be called on one event.
    """

    def __init__(
        self,
        model: Any,
        structure: Any,
        inputs: Sequence[ArgumentInput],
        steps: int | None,
        pairs: Mapping[int, int],
    ):
        self._model, self._structure = model, structure
        self.inputs, self._steps, self.pairs = inputs, steps, dict(pairs)
        self.has_start, self.initial = True, dict[str, NDArray[Any]]()
        self.shapes: list[tuple[Any, ...]] = []
        self.keys: list[str] = []
        trace, outputs = self._explore()
        indices = {id(value): at for at, value in enumerate(outputs)}
        explicit = {at: indices.get(id(value)) for at, value in trace.explicit.items()}
        found = {at: index for at, index in explicit.items() if index is not None}
        if found and len(found) == len(explicit):
            self.pairs = {**found, **self.pairs}
            trace, outputs = self._explore()
        self.has_start, self.initial = trace.has_start, {**self._held(), **trace.initial}
        self.shapes = [tuple(each.shape) for each in outputs]

    @property
    def columns(self) -> list[ArgumentInput]:
        """The inputs that are columns of a row, side by side."""
        return [each for at, each in enumerate(self.inputs) if at not in self.pairs]

    @property
    def signature(self) -> list[Any]:
        """The arguments: columns [B, values], `START` if the model has one, and states."""
        specs = [tf.TensorSpec([None, each.width], each.dtype, each.name) for each in self.columns]
        start = [tf.TensorSpec([None], "bool", START)] if self.has_start else []
        states = self.initial.items()
        return specs + start + [tf.TensorSpec([None, *v.shape], v.dtype, n) for n, v in states]

    def __call__(self, *arguments: Any) -> tuple[list[Any], list[Any]]:
        """The outputs that are not states, and the states after the event; in a graph only."""
        names = [spec.name for spec in self.signature]
        trace, outputs = self._call(dict(zip(names, arguments, strict=True)))
        after = {self.inputs[at].name: outputs[index] for at, index in self.pairs.items()}
        after |= trace.after
        own = [value for at, value in enumerate(outputs) if at not in self.pairs.values()]
        return own, [after[name] for name in self.initial]

    def _held(self) -> dict[str, NDArray[Any]]:
        inputs = [self.inputs[at] for at in self.pairs]
        return {each.name: np.zeros(each.shape, each.dtype) for each in inputs}

    def _explore(self) -> tuple[_Trace, list[Any]]:
        """Call the model on the first event of a stream, in a graph that is not run."""
        results: list[Any] = []
        names = [*(each.name for each in self.inputs), START]

        def call(*tensors: Any) -> Any:
            results[:] = self._call(dict(zip(names, tensors, strict=True)))
            return results[1]

        specs = [tf.TensorSpec([None, each.width], each.dtype) for each in self.inputs]
        tf.function(call, autograph=False).get_concrete_function(
            *specs, tf.TensorSpec([None], "bool")
        )
        return results[0], results[1]

    def _call(self, given: Mapping[str, Any]) -> tuple[_Trace, list[Any]]:
        tensors = [
            tf.reshape(given[each.name], [-1, *([1] if each.has_steps else []), *each.shape])
            for each in self.inputs
        ]
        names = {each.name for each in self.inputs}
        trace = _Trace(
            inputs=tensors,
            events=[at for at, each in enumerate(self.inputs) if each.has_steps],
            held=self.pairs,
            start=given.get(START),
            given={name: value for name, value in given.items() if name not in {*names, START}},
            steps=self._steps,
        )
        with ExitStack() as stack:
            stack.enter_context(_replaced(kl.Layer, "_assert_input_compatibility", _accept))
            # which ONNX does not have
            stack.enter_context(_replaced(tf.math, "expm1", lambda x: tf.exp(x) - 1))
            for layer, method in _REPLACED.items():
                call = _method(partial(method, trace, layer.call))
                stack.enter_context(_replaced(layer, "call", call))
            inputs = keras.tree.pack_sequence_as(self._structure, tensors)
            outputs = self._model(*inputs, training=False)
        paths = [path for path, _ in keras.tree.flatten_with_path(outputs)]
        self.keys = ["_".join(map(str, path)) for path in paths]
        return trace, keras.tree.flatten(outputs)


def _method(function: Any) -> Any:
    return lambda layer, *args, **options: function(layer, *args, **options)


def _accept(layer: Any, value: Any) -> None:
    """In place of the check that an input has the number of steps that the model fixes."""


def _like(start: Any, value: Any) -> Any:
    return tf.reshape(start, [-1, *[1] * (len(value.shape) - 1)])


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
