"""Layouts derived from a specification: state parts, output slices, weight shapes.

Pure arithmetic without a runtime. The artifact validates its weights against these layouts, the
store packs states and the service splits outputs by them, and every runtime implements them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.errors import SpecError
from models.events.schema import (
    BooleanField,
    CategoricalField,
    EventField,
    EventSchema,
    NumericField,
)
from models.events.statistics import statistic_parts
from models.spec.blocks import block_parts
from models.spec.chunking import chunk_constant_layers
from models.spec.decoder import LAST, add_decoder_prefix
from models.spec.detection import OF_THE_ALARM, DetectionSpec, detection_parts
from models.spec.heads import (
    AnomalyHead,
    ClassificationHead,
    DenseHead,
    ForecastHead,
    Head,
    LabelHead,
    SequenceHead,
    has_surprise,
    scores_events,
)
from models.spec.layers import (
    FEATURES,
    AttentionLayer,
)
from models.spec.model import ModelSpec
from models.spec.onnx_network import STARTED
from models.spec.state import StatePart, StateSpec

CLOCK_LAST_MS = "clock.last_ms"
CLOCK_SEEN = "clock.seen"
CLOCK_OUT_OF_ORDER = "clock.out_of_order"
"""int64 parts of a model with a timestamp field: the latest timestamp in epoch milliseconds
(valid once `clock.seen`, the number of events with a timestamp, is not 0), and the number of
events with an earlier timestamp than the latest one."""


@dataclass(frozen=True, slots=True)
class Output:
    """One named output.

    Attributes:
        name: the head's name.
        shape: shape of one step, for example () for a probability, (8,) for 8 units.
        labels: names along the last axis, if it has any (classes, quantiles).
        per: `step` (one value per event) or `chunk` (one for the whole chunk, repeated in the
            packed row of every step).
        categories_of: the categorical field whose codes the values are, if they are codes.
    """

    name: str
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    per: Literal["step", "chunk", "block"] = "step"
    categories_of: str = ""

    @property
    def size(self) -> int:
        """Values per step."""
        return prod(self.shape)

    def column_names(self) -> list[str]:
        """A name for each number of a step: `delay[0.5]` by its label, `x[1]` by its place.

        Axes of length one are left out.
        """
        axes = [[str(at) if size > 1 else "" for at in range(size)] for size in self.shape]
        if axes and len(self.labels) == len(axes[-1]):
            axes[-1] = list(self.labels)
        places = [", ".join(filter(None, index)) for index in product(*axes)]
        return [f"{self.name}[{place}]" if place else self.name for place in places]


@dataclass(frozen=True)
class OutputSpec:
    """The model's outputs, packed into one float32 row of O values per step.

    Attributes:
        outputs: one per head, or one per output of an imported graph.
        attention: layers that attend over the chunk; their attention weights of the step follow
            the outputs.
    """

    outputs: tuple[Output, ...]
    attention: tuple[str, ...] = ()

    @cached_property
    def size(self) -> int:
        """O, the length of the packed row of one step."""
        return sum(output.size for output in self.outputs) + len(self.attention)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The slice of each output in the packed row."""
        slices: dict[str, slice] = {}
        start = 0
        for output in self.outputs:
            slices[output.name] = slice(start, start + output.size)
            start += output.size
        return slices

    def by_name(self, rows: NDArray[np.float32]) -> Mapping[str, NDArray[np.float32]]:
        """Split packed rows [..., O] into named arrays [..., *shape] (views if possible)."""
        lead = rows.shape[:-1]
        return {
            name: rows[..., at].reshape((*lead, *shape)) if len(shape) > 1 else rows[..., at]
            for name, at, shape in self._columns
        }

    @cached_property
    def _columns(self) -> list[tuple[str, int | slice, tuple[int, ...]]]:
        """The name of each output, its columns (of a single number its index), and its shape."""
        places = zip(self.outputs, self.slices.values(), strict=True)
        return [(each.name, at if each.shape else at.start, each.shape) for each, at in places]

    def attention_by_name(self, rows: NDArray[np.float32]) -> Mapping[str, NDArray[np.float32]]:
        """The attention weight of each step [...] by layer, from packed rows [..., O]."""
        first = self.size - len(self.attention)
        return {name: rows[..., first + index] for index, name in enumerate(self.attention)}


def state_spec(spec: ModelSpec) -> StateSpec:
    """The layout of the complete state: parts of the network, of the encoder (the clock and the
    statistics of fields) and of the blocks."""
    parts = list(runtime_state(spec).parts)
    if spec.events is not None and spec.events.timestamp is not None:
        clock = (CLOCK_LAST_MS, CLOCK_SEEN, CLOCK_OUT_OF_ORDER)
        parts.extend(StatePart(name, (), "int64") for name in clock)
    if spec.events is not None:
        for field in spec.events.fields:
            if isinstance(field, NumericField):
                parts.extend(statistic_parts(field))
    if spec.blocks is not None:
        parts.extend(block_parts(spec.blocks, spec.input_features))
    return StateSpec(tuple(parts))


def runtime_state(spec: ModelSpec) -> StateSpec:
    """The parts that a runtime reads and writes: the network's, and behind them detection's."""
    network = network_state(spec)
    if spec.detection is None:
        return network
    own = detection_state(spec)
    return StateSpec((*network.parts, *own.parts))


def detection_state(spec: ModelSpec) -> StateSpec:
    """The parts of detection, all zero for a new stream."""
    return StateSpec(detection_parts(*detection_of(spec)))


def detection_columns(spec: ModelSpec) -> dict[str, slice]:
    """The columns of each part of detection's state, by its name without the head's."""
    slices = detection_state(spec).slices
    return {name.rpartition(".")[2]: columns for name, columns in slices.items()}


def detection_of(spec: ModelSpec) -> tuple[DetectionSpec, AnomalyHead, EventSchema]:
    """A model's detection, its head and the events.

    Raises:
        SpecError: it has none.
    """
    if spec.detection is not None and spec.events is not None:
        for head in spec.heads:
            if isinstance(head, AnomalyHead) and head.name == spec.detection.head:
                return spec.detection, head, spec.events
    raise SpecError(f"model {spec.name!r}: expected `detection` of an anomaly head")


def network_state(spec: ModelSpec) -> StateSpec:
    """The parts that the network reads and writes: of stateful layers, heads and the decoder, or
    the state pairs of an imported graph."""
    if spec.onnx is not None:
        parts = [StatePart(pair.input, pair.shape, pair.dtype) for pair in spec.onnx.states]
        if spec.onnx.has_start:
            parts.append(StatePart(STARTED, (), "bool"))
        return StateSpec(tuple(parts))
    widths = layer_widths(spec)
    parts = [
        StatePart(f"{layer.name}.{part}", shape, "float32")
        for layer in spec.layers
        for part, shape in layer.state_shapes(widths[layer.inputs[0]]).items()
        # in blocks a backward cell starts from zero at the end of each window
        if not (spec.blocks is not None and part.startswith("backward."))
    ]
    parts.extend(
        StatePart(f"{head.name}.forecast", (_forecast_size(spec, head, widths),), "float32")
        for head in spec.heads
        if scores_events(head)
    )
    if spec.decoder is not None:
        parts.append(StatePart(LAST, (len(spec.decoder.targets),), "float32"))
    return StateSpec(tuple(parts))


def output_spec(spec: ModelSpec) -> OutputSpec:
    """The outputs, one per head, in the order of the heads; or those of an imported graph."""
    if spec.onnx is not None:
        own = spec.onnx.outputs
        return OutputSpec(tuple(Output(each.name, each.shape, each.labels) for each in own))
    found = network_outputs(spec)
    if spec.detection is None:
        return found
    detection, head, events = detection_of(spec)
    outputs = [output for output in found.outputs if output.name != _parameters_of(head)]
    outputs += [Output(f"{head.name}.probability", ()), Output(f"{head.name}.alarm", ())]
    for name in detection.outputs:
        labels = () if name in OF_THE_ALARM else detection.labels(name, head.targets, events)
        shape = (len(labels),) if labels else ()
        outputs.append(Output(f"{head.name}.{name}", shape, labels))
    return OutputSpec(tuple(outputs), found.attention)


def network_outputs(spec: ModelSpec) -> OutputSpec:
    """What the network itself computes: with detection also the forecast of each event."""
    widths = layer_widths(spec)
    constant = chunk_constant_layers(spec.layers)
    outputs = []
    for head in spec.heads:
        output = _output(spec, head, widths)
        if head.input in constant and not scores_events(head):
            output = replace(output, per="chunk")
        outputs.append(output)
        if has_surprise(head):
            name = f"{head.name}.category"
            outputs.append(Output(name, output.shape, categories_of=head.target))
            outputs.append(Output(f"{head.name}.surprise", ()))
        if isinstance(head, AnomalyHead) and gives_parameters(spec, head):
            outputs.append(Output(_parameters_of(head), (anomaly_size(spec, head),)))
    return OutputSpec(
        tuple(outputs),
        tuple(
            layer.name
            for layer in spec.layers
            if isinstance(layer, AttentionLayer) and layer.over == "chunk"
        ),
    )


def gives_parameters(spec: ModelSpec, head: Head) -> bool:
    """Whether the network's output of a head has the forecast of each event behind it, for
    detection."""
    return spec.detection is not None and spec.detection.head == head.name


def _parameters_of(head: Head) -> str:
    return f"{head.name}.parameters"


def _output(spec: ModelSpec, head: Head, widths: Mapping[str, int]) -> Output:
    match head:
        case SequenceHead():
            return Output(head.name, head.shape or (widths[head.input],))
        case DenseHead():
            return Output(head.name, (head.units,), head.targets)
        case ForecastHead() if head.quantiles:
            labels = tuple(str(quantile) for quantile in head.quantiles)
            return Output(head.name, (len(head.targets), len(head.quantiles)), labels)
        case ForecastHead():
            return Output(head.name, (len(head.targets),), head.targets)
        case ClassificationHead() if head.top is not None:
            return Output(head.name, (min(head.top, target_categories(spec, head).codes),))
        case ClassificationHead():
            field = event_field(spec, head.target)
            if isinstance(field, CategoricalField):
                return Output(head.name, (field.codes,), field.labels)
            return Output(head.name, ())
        case LabelHead() if head.classes:
            return Output(head.name, (len(head.classes),), head.classes)
        case LabelHead() | AnomalyHead():
            return Output(head.name, ())


def event_field(spec: ModelSpec, name: str) -> EventField:
    """The event field with a name; validation of the spec ensures that it exists."""
    if spec.events is None:
        raise KeyError(name)
    return spec.events.field(name)


def _forecast_size(spec: ModelSpec, head: Head, widths: Mapping[str, int]) -> int:
    """Values that a head's forecast of the next event is computed from: its parameters, or what the
    head reads, of which there is less if the categories are many."""
    return anomaly_size(spec, head) if isinstance(head, AnomalyHead) else widths[head.input]


def target_categories(spec: ModelSpec, head: ClassificationHead) -> CategoricalField:
    """The categorical target of a head.

    Raises:
        SpecError: it is of another kind.
    """
    field = event_field(spec, head.target)
    if not isinstance(field, CategoricalField):
        raise SpecError(f"head {head.name!r}: expected a categorical target, got {field.name!r}")
    return field


def category_names(spec: ModelSpec, output: Output) -> NDArray[np.str_]:
    """The names by code of an output whose values are codes."""
    field = event_field(spec, output.categories_of)
    if not isinstance(field, CategoricalField):
        raise SpecError(f"output {output.name!r}: expected codes of a categorical field")
    return np.array(field.labels)


def anomaly_size(spec: ModelSpec, head: AnomalyHead) -> int:
    """P, the number of distribution parameters of one event's forecast."""
    return sum(anomaly_width(event_field(spec, name)) for name in head.targets)


def anomaly_width(field: EventField) -> int:
    """Parameters per target: mean and log deviation, or one logit per code, or one logit."""
    match field:
        case NumericField():
            return 2
        case CategoricalField():
            return field.codes
        case BooleanField():
            return 1
        case _:
            raise KeyError(field.name)


def head_units(spec: ModelSpec, head: Head) -> int:
    """Number of columns of a head's kernel; 0 for a head without weights."""
    match head:
        case SequenceHead():
            return 0
        case DenseHead():
            return head.units
        case ForecastHead():
            return len(head.targets) * max(1, len(head.quantiles))
        case ClassificationHead():
            field = event_field(spec, head.target)
            return field.codes if isinstance(field, CategoricalField) else 1
        case LabelHead():
            return len(head.classes) or 1
        case AnomalyHead():
            return anomaly_size(spec, head)


def layer_widths(spec: ModelSpec) -> dict[str, int]:
    """Output width per step of each layer, including `features`."""
    widths = {FEATURES: sum(column.width for column in spec.columns)}
    for layer in spec.layers:
        widths[layer.name] = layer.width_of([widths[name] for name in layer.inputs])
    return widths


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, in Keras' layouts, all float32.

    `embedding.<field>`, `<layer>.kernel`, `<layer>.recurrent_kernel`, `<layer>.bias`,
    `<layer>.gamma|beta|moving_mean|moving_variance`, `heads.<head>.kernel`, `heads.<head>.bias`,
    `<layer>.shift|scale|offset` of an affine layer, `<layer>.slope` of a prelu layer,
    `<layer>.context` of an attention layer, and for options of an LSTM `<layer>.peepholes` (gates
    i, f, o concatenated), `<layer>.kernel_gamma|recurrent_gamma|carry_gamma|carry_beta`,
    `<layer>.projection`. A bidirectional layer has the weights of two cells, `<layer>.forward` and
    `<layer>.backward`. Weights of a decoder's step network have the prefix `decoder.`.
    """
    widths = layer_widths(spec)
    shapes: dict[str, tuple[int, ...]] = {}
    for column in spec.columns:
        if column.codes is not None and column.embedding is not None:
            shapes[f"embedding.{column.name}"] = (column.codes, column.embedding)
    for layer in spec.layers:
        own = layer.weight_shapes(widths[layer.inputs[0]])
        shapes.update((f"{layer.name}.{kind}", shape) for kind, shape in own.items())
    for head in spec.heads:
        units = head_units(spec, head)
        if units:
            shapes[f"heads.{head.name}.kernel"] = (widths[head.input], units)
            if not isinstance(head, DenseHead) or head.use_bias:
                shapes[f"heads.{head.name}.bias"] = (units,)
    if spec.decoder_network is not None:
        shapes.update(add_decoder_prefix(weight_shapes(spec.decoder_network)))
    return shapes
