"""The ONNX graph of a model: the pure step of its specification, with its weights inside.

    rows [B,T,F], lengths [B], states [B,N]  ->  outputs [B,T,O], states_after [B,N]

In blocks T is C+R, the steps of a window, and the outputs are those of its block, [B,C,O].

The same step as `models.networks.build`, with the ONNX operators LSTM, GRU and RNN, which take
initial states and the length of each row. B and T are free: one graph serves every batch. Names and
dtypes are in `models.onnx.messages`, the packing in `models.spec.layout`.

Written from the specification alone, with neither TensorFlow nor ONNX Runtime; the same model gives
equal bytes. Models that a graph cannot represent are rejected: those with an activation that the
recurrent operators lack, or with more weights than fit in one file. Rows of length 0 are not
supported, and values beyond a row's length must be zero, as the engine pads them.

Attention over the stream sums all steps of a call at once, in float64, from the state before it:
memory grows with T squared. Calls are short if the engine may slice them; otherwise T is limited to
`MAX_STEPS`. The equations of convolution and attention are in `models.networks.layers`. Sequences
are [T, B, W], state parts [1, B, size].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models.artifact.fingerprint import compute_fingerprint
from models.errors import GraphUnsupportedError
from models.onnx.cells import Weights, WindowSteps, activation, bidirectional, forward
from models.onnx.heads import dense, head_output, last_observed
from models.onnx.messages import (
    GRAPH_FORMAT,
    LENGTHS,
    MARK_FINGERPRINT,
    MARK_FORMAT,
    MOST,
    OUTPUTS,
    ROWS,
    STATES,
    STATES_AFTER,
    DataType,
    ModelProto,
    Nodes,
    Value,
    tensor_value,
)
from models.onnx.normalization import (
    affine,
    batch_normalization,
    layer_normalization,
    rms_normalization,
    unit_normalization,
)
from models.spec.decoder import LAST
from models.spec.heads import scores_events
from models.spec.layers import (
    EMPTY_MAXIMUM,
    FEATURES,
    MASKED_SCORE,
    ActivationLayer,
    AffineLayer,
    AttentionLayer,
    BatchNormalizationLayer,
    BidirectionalLayer,
    Conv1dLayer,
    DenseLayer,
    DropoutLayer,
    GruLayer,
    Layer,
    LayerNormalizationLayer,
    LstmLayer,
    MergeLayer,
    PreluLayer,
    Recurrent,
    RmsNormalizationLayer,
    SimpleRnnLayer,
    SliceLayer,
    UnitNormalizationLayer,
)
from models.spec.layout import layer_widths, network_outputs, network_state
from models.spec.model import ModelSpec

MAX_STEPS = 2048
"""T of the longest call with attention over the stream. Each pair of its steps takes 24 bytes while
they are summed: 100 MB a row."""


def check_steps(layer: AttentionLayer, chunk_limit: int | None) -> None:
    """Reject attention over the stream in calls that would exhaust the memory.

    Args:
        chunk_limit: of the model.

    Raises:
        GraphUnsupportedError
    """
    if chunk_limit is not None and chunk_limit > MAX_STEPS:
        raise GraphUnsupportedError(
            f"layer {layer.name!r}: a graph holds attention over the stream for calls of at most "
            f"{MAX_STEPS} steps, got max_chunk_steps {chunk_limit}"
        )


def over_chunk(
    nodes: Nodes, layer: AttentionLayer, weights: Weights, x: Value, lengths: Value
) -> tuple[Value, Value]:
    """One layer over the valid steps of each row.

    Args:
        x: float32 [T, B, W].
        lengths: int32 [B].

    Returns:
        The value, the same at every step, [T, B, W], and the weights [T, B, 1], 0 beyond a
        row's length.
    """
    steps = nodes.add("Unsqueeze", nodes.steps(x), nodes.integers(1))
    valid = nodes.add("Less", steps, nodes.add("Cast", lengths, to=DataType.INT64))
    valid = nodes.add("Unsqueeze", valid, nodes.integers(2))
    scores = nodes.add(
        "Where", valid, _scores(nodes, layer, weights, x), nodes.number(MASKED_SCORE)
    )
    shares = nodes.add("Softmax", scores, axis=0)
    value = nodes.add("ReduceSum", nodes.add("Mul", shares, x), nodes.integers(0), keepdims=1)
    return nodes.add("Expand", value, nodes.add("Shape", x)), shares


def over_stream(
    nodes: Nodes,
    layer: AttentionLayer,
    weights: Weights,
    x: Value,
    lengths: Value,
    state: list[Value],
    width: int,
) -> tuple[Value, list[Value]]:
    """One layer over everything up to each step.

    Args:
        x: float32 [T, B, W].
        lengths: int32 [B], each 1..T.
        state: maximum [1, B, 1], normaliser [1, B, 2] and sum [1, B, 2 W].
        width: W.

    Returns:
        The values [T, B, W], and the state after each row's last valid step.
    """
    start, normaliser_before, total_before = _exact(nodes, state, width)
    exact = _double(nodes, nodes.add("Transpose", x, perm=[1, 0, 2]))
    scores = _double(
        nodes, nodes.add("Transpose", _scores(nodes, layer, weights, x), perm=[1, 2, 0])
    )
    steps = nodes.steps(x)
    causal = nodes.add("GreaterOrEqual", nodes.add("Unsqueeze", steps, nodes.integers(1)), steps)
    nothing = nodes.constant(np.array(EMPTY_MAXIMUM, np.float64))
    pairs = nodes.add("Where", causal, scores, nothing)
    maximum = nodes.add("ReduceMax", pairs, nodes.integers(2), keepdims=1)
    maximum = nodes.add("Max", maximum, start)
    shares = nodes.add("Exp", nodes.add("Sub", pairs, maximum))
    decay = nodes.add("Exp", nodes.add("Sub", start, maximum))
    normaliser = nodes.add(
        "Add",
        nodes.add("Mul", decay, normaliser_before),
        nodes.add("ReduceSum", shares, nodes.integers(2), keepdims=1),
    )
    total = nodes.add(
        "Add", nodes.add("Mul", decay, total_before), nodes.add("MatMul", shares, exact)
    )
    values = nodes.add("Cast", nodes.add("Div", total, normaliser), to=DataType.FLOAT32)
    sums = nodes.concat([maximum, normaliser, total], axis=2)
    last = nodes.add("Cast", lengths, to=DataType.INT64)
    last = nodes.add("Sub", last, nodes.integers(1))
    last = nodes.add("Unsqueeze", last, nodes.integers(1, 2))
    last = nodes.add("Expand", last, nodes.integers(1, 1, 2 + width))
    final = nodes.split(nodes.add("GatherElements", sums, last, axis=1), [1, 1, width], axis=2)
    after = [
        nodes.add("Cast", final[0], to=DataType.FLOAT32),
        *(_parts(nodes, value) for value in final[1:]),
    ]
    return nodes.add("Transpose", values, perm=[1, 0, 2]), [
        nodes.add("Transpose", part, perm=[1, 0, 2]) for part in after
    ]


def _scores(nodes: Nodes, layer: AttentionLayer, weights: Weights, x: Value) -> Value:
    """s_t: float32 [T, B, 1]."""
    hidden = nodes.add("Tanh", dense(nodes, weights, layer.name, x))
    context = weights[f"{layer.name}.context"][:, np.newaxis]
    return nodes.add("MatMul", hidden, nodes.constant(context))


def _exact(nodes: Nodes, state: list[Value], width: int) -> tuple[Value, Value, Value]:
    """Maximum, normaliser and sum, float64 [B, 1, size]."""
    maximum, normaliser, total = (
        _double(nodes, nodes.add("Transpose", part, perm=[1, 0, 2])) for part in state
    )
    high, low = nodes.split(normaliser, [1, 1], axis=2)
    started = nodes.add("Greater", high, nodes.constant(np.array(0, np.float64)))
    maximum = nodes.add(
        "Where", started, maximum, nodes.constant(np.array(EMPTY_MAXIMUM, np.float64))
    )
    highs, lows = nodes.split(total, [width, width], axis=2)
    return maximum, nodes.add("Add", high, low), nodes.add("Add", highs, lows)


def _parts(nodes: Nodes, value: Value) -> Value:
    """A float64 [..., n] as float32 [..., 2 n]: what float32 holds of it, and the rest."""
    high = nodes.add("Cast", value, to=DataType.FLOAT32)
    low = nodes.add("Sub", value, _double(nodes, high))
    return nodes.concat([high, nodes.add("Cast", low, to=DataType.FLOAT32)], axis=2)


def _double(nodes: Nodes, value: Value) -> Value:
    return nodes.add("Cast", value, to=DataType.FLOAT64)


def causal_convolution(
    nodes: Nodes,
    layer: Conv1dLayer,
    weights: Mapping[str, NDArray[np.float32]],
    x: Value,
    lengths: Value,
    past: Value,
) -> tuple[Value, Value]:
    """One layer over a chunk.

    Args:
        x: float32 [T, B, W].
        lengths: int32 [B], each 1..T.
        past: float32 [1, B, P W], the P rows before the chunk; "" if P is 0.

    Returns:
        The sequence [T, B, units], and the last P rows up to each row's length, [1, B, P W]; ""
        if P is 0.
    """
    kernel, count = weights[f"{layer.name}.kernel"], layer.past_steps
    width = kernel.shape[1]
    rows, after = x, ""
    if count:
        shape = nodes.integers(0, count, width)
        before = nodes.add("Reshape", nodes.add("Squeeze", past, nodes.integers(0)), shape)
        rows = nodes.concat([nodes.add("Transpose", before, perm=[1, 0, 2]), x], axis=0)
        after = _last_rows(nodes, rows, lengths, count, width)
    taps = [
        nodes.part(rows, start, start - count if start < count else MOST, axis=0)
        for start in range(0, count + 1, layer.dilation)
    ]
    matrix = nodes.constant(kernel.reshape(-1, layer.units))
    y = nodes.add("MatMul", nodes.concat(taps, axis=2), matrix)
    if layer.use_bias:
        y = nodes.add("Add", y, nodes.constant(weights[f"{layer.name}.bias"]))
    return activation(nodes, layer.activation, y), after


def _last_rows(nodes: Nodes, rows: Value, lengths: Value, count: int, width: int) -> Value:
    """Rows length .. length + count - 1 of each stream: [P + T, B, W] -> [1, B, P W]."""
    first = nodes.add("Cast", lengths, to=DataType.INT64)
    steps = nodes.constant(np.arange(count, dtype=np.int64)[:, np.newaxis])
    places = nodes.add("Unsqueeze", nodes.add("Add", steps, first), nodes.integers(2))
    places = nodes.add("Expand", places, nodes.integers(1, 1, width))
    last = nodes.add("Transpose", nodes.add("GatherElements", rows, places, axis=0), perm=[1, 0, 2])
    flat = nodes.add("Reshape", last, nodes.integers(0, count * width))
    return nodes.add("Unsqueeze", flat, nodes.integers(0))


_MERGE_OPERATORS = {
    "add": "Add",
    "average": "Add",
    "subtract": "Sub",
    "multiply": "Mul",
    "maximum": "Max",
    "minimum": "Min",
}
OPSET = 20
IR_VERSION = 9
MAX_CONSTANT_BYTES = 2**31 - 2**24
"""A protobuf message holds less than 2 GiB; the nodes need some of it."""


def write_graph(spec: ModelSpec, weights: Weights) -> bytes:
    """The serialised `ModelProto` of a model.

    Args:
        spec: a fitted spec.
        weights: every weight of `models.spec.layout.weight_shapes(spec)`, float32.

    Raises:
        GraphUnsupportedError: the model has what a graph cannot hold; the message names it.
    """
    model = ModelProto(ir_version=IR_VERSION, producer_name=b"carry")
    model.opset_import.add(domain="", version=OPSET)
    nodes = Nodes(model.graph)
    _Step(spec, weights, nodes)
    if nodes.constant_bytes > MAX_CONSTANT_BYTES:
        raise GraphUnsupportedError(
            f"model {spec.name!r}: expected at most {MAX_CONSTANT_BYTES} bytes of weights in one "
            f"graph, got {nodes.constant_bytes}"
        )
    model.graph.name = b"step"
    states: list[str | int] = ["B", network_state(spec).float_size]
    model.graph.input.extend(
        [
            tensor_value(ROWS, DataType.FLOAT32, ["B", "T", spec.input_features]),
            tensor_value(LENGTHS, DataType.INT32, ["B"]),
            tensor_value(STATES, DataType.FLOAT32, states),
        ]
    )
    model.graph.output.extend(
        [
            tensor_value(OUTPUTS, DataType.FLOAT32, ["B", "T", network_outputs(spec).size]),
            tensor_value(STATES_AFTER, DataType.FLOAT32, states),
        ]
    )
    fingerprint = compute_fingerprint(spec, weights).hex()
    for key, value in ((MARK_FORMAT, GRAPH_FORMAT), (MARK_FINGERPRINT, fingerprint)):
        model.metadata_props.add(key=key.encode(), value=value.encode())
    data: bytes = model.SerializeToString()
    return data


class _Step:
    """The nodes of one model, sequences as [T, B, width] and state parts as [1, B, size]."""

    def __init__(self, spec: ModelSpec, weights: Weights, nodes: Nodes):
        self.nodes = nodes
        self._spec = spec
        self._weights = weights
        parts = network_state(spec).parts
        states = nodes.add("Unsqueeze", STATES, nodes.integers(0))
        before = nodes.split(states, [part.size for part in parts], axis=2)
        self._before = {part.name: value for part, value in zip(parts, before, strict=True)}
        self._after: dict[str, Value] = {}
        self._attention: dict[str, Value] = {}
        self._steps = WindowSteps.of(nodes, LENGTHS, spec.blocks)

        rows = nodes.add("Transpose", ROWS, perm=[1, 0, 2])
        values = {FEATURES: self._features(rows)}
        for layer in spec.layers:
            values[layer.name] = self._layer(layer, [values[name] for name in layer.inputs])
        if spec.blocks is not None:
            size = spec.blocks.size
            values = {name: nodes.part(v, 0, size, axis=0) for name, v in values.items()}
            rows = nodes.part(rows, 0, size, axis=0)
        outputs = self._heads(values, rows)
        if spec.decoder is not None:
            self._after[LAST] = last_observed(nodes, spec, rows, LENGTHS, self._before[LAST])
        nodes.add("Transpose", outputs, name=OUTPUTS, perm=[1, 0, 2])
        after = nodes.concat([self._after[part.name] for part in parts], axis=2)
        nodes.add("Squeeze", after, nodes.integers(0), name=STATES_AFTER)

    def _features(self, rows: Value) -> Value:
        """The columns that layers read, in order, with every code replaced by its embedding."""
        nodes, columns, read = self.nodes, self._spec.columns, self._spec.read_features
        coded = [index for index, column in enumerate(columns) if column.codes is not None]
        if not coded:
            return rows if read == len(columns) else nodes.part(rows, 0, read, axis=2)
        codes = nodes.add("Gather", rows, nodes.integers(*coded), axis=2)
        codes = nodes.add("Cast", nodes.add("Round", codes), to=DataType.INT64)
        pieces: list[Value] = []
        plain = 0
        for place, index in enumerate(coded):
            if index > plain:
                pieces.append(nodes.part(rows, plain, index, axis=2))
            table = nodes.constant(self._weights[f"embedding.{columns[index].name}"])
            pieces.append(nodes.add("Gather", table, nodes.column(codes, place), axis=0))
            plain = index + 1
        if plain < read:
            pieces.append(nodes.part(rows, plain, read, axis=2))
        return nodes.concat(pieces, axis=2)

    def _layer(self, layer: Layer, sources: list[Value]) -> Value:
        nodes, weights, x = self.nodes, self._weights, sources[0]
        match layer:
            case LstmLayer() | GruLayer() | SimpleRnnLayer():
                x, after = forward(nodes, layer, weights, x, self._steps, self._initial(layer))
                self._keep(layer, after)
            case BidirectionalLayer():
                initial = self._initial(layer)
                x, after = bidirectional(nodes, layer, weights, x, self._steps, initial)
                self._keep(layer, after)
            case AttentionLayer(over="chunk"):
                x, self._attention[layer.name] = over_chunk(nodes, layer, weights, x, LENGTHS)
            case AttentionLayer():
                check_steps(layer, self._spec.chunk_limit)
                names = [f"{layer.name}.{part}" for part in ("maximum", "normaliser", "sum")]
                state = [self._before[name] for name in names]
                width = layer_widths(self._spec)[layer.name]
                x, since = over_stream(nodes, layer, weights, x, LENGTHS, state, width)
                self._after.update(zip(names, since, strict=True))
            case DenseLayer():
                x = activation(nodes, layer.activation, dense(nodes, weights, layer.name, x))
            case ActivationLayer():
                x = activation(nodes, layer.activation, x)
            case Conv1dLayer():
                name = f"{layer.name}.past"
                past = self._before.get(name, "")
                x, self._after[name] = causal_convolution(nodes, layer, weights, x, LENGTHS, past)
            case AffineLayer():
                x = affine(nodes, layer, weights, x)
            case PreluLayer():
                x = nodes.add("PRelu", x, nodes.constant(weights[f"{layer.name}.slope"]))
            case SliceLayer():
                x = nodes.part(x, layer.start, layer.stop, axis=2)
            case DropoutLayer():
                pass
            case LayerNormalizationLayer():
                x = layer_normalization(
                    nodes, layer, weights, x, layer_widths(self._spec)[layer.name]
                )
            case RmsNormalizationLayer():
                x = rms_normalization(nodes, layer, weights, x)
            case UnitNormalizationLayer():
                x = unit_normalization(nodes, x)
            case BatchNormalizationLayer():
                x = batch_normalization(nodes, layer, weights, x)
            case MergeLayer():
                x = self._merge(layer, sources)
        return x

    def _initial(self, layer: Recurrent) -> list[Value]:
        """Initial states of a recurrent layer: its own, or those that another returned."""
        source, states = layer.starts_from, self._before
        if source is not None:
            states = self._after
        names = [f"{source or layer.name}.{part}" for part in layer.returned_state]
        # In blocks a backward cell has no part: left out, the operator begins from zero.
        return [states.get(name, "") for name in names]

    def _keep(self, layer: Recurrent, after: list[Value]) -> None:
        names = [f"{layer.name}.{part}" for part in layer.returned_state]
        self._after.update(zip(names, after, strict=True))

    def _merge(self, layer: MergeLayer, sources: list[Value]) -> Value:
        if layer.kind == "concatenate":
            return self.nodes.concat(sources, axis=2)
        total = sources[0]
        for other in sources[1:]:
            total = self.nodes.add(_MERGE_OPERATORS[layer.kind], total, other)
        if layer.kind == "average":
            total = self.nodes.add("Div", total, self.nodes.number(len(sources)))
        return total

    def _heads(self, values: Mapping[str, Value], rows: Value) -> Value:
        nodes, outputs = self.nodes, []
        last = ""
        if any(map(scores_events, self._spec.heads)):
            step = nodes.add("Cast", LENGTHS, to=DataType.INT64)
            step = nodes.add("Sub", step, nodes.integers(1))
            last = nodes.add("Unsqueeze", step, nodes.integers(0, 2))
        for head in self._spec.heads:
            part = f"{head.name}.forecast"
            output, after = head_output(
                nodes,
                self._spec,
                head,
                self._weights,
                values[head.input],
                rows,
                (self._before.get(part, ""), last),
            )
            outputs.append(output)
            if after is not None:
                self._after[part] = after
        return nodes.concat([*outputs, *self._attention.values()], axis=2)
