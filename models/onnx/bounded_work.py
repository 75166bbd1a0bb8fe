"""Checks that the work of an imported graph depends on the shapes of its inputs, never on values.

A loop whose trip count is computed from the features, or a tensor of that size, would let one
request stop a worker. A call of a graph that passes takes the time and memory that any values of
the same shapes take, so that the import's trial runs are representative.

The check is a taint analysis: a tensor depends on values if it depends on features, states or
controls. `Shape` and `Size` remove the taint, because shapes cannot depend on values: an operator
is rejected if it takes a size, a trip count or a condition from such a tensor, or if it is not in
the table. The values of the input of lengths or of the mask are sizes too, of at most T: the
service makes them from the lengths of chunks. The analysis follows subgraphs, their outer scopes
and local functions; where it does not know, it assumes a dependence.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from models.onnx.node_graph import Node, NodeGraph, read_nodes

MAX_NAMES: Final = 1_000_000
"""Most names of tensors to analyse, which takes seconds; the names of a loop or function count once
for each set of dependent inputs."""
MAX_CALLS: Final = 64
"""Deepest calls of local functions."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SHAPES = frozenset({"Shape", "Size", "SequenceLength"})
"""Operators whose output depends on shapes alone."""

_ANY: Final = _names(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool
    BatchNormalization BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike
    CausalConvWithState Ceil Celu Clip Concat ConcatFromSequence Constant Conv ConvInteger
    ConvTranspose Cos Cosh CumProd CumSum DeformConv DepthToSpace DequantizeLinear Det Div Dropout
    DynamicQuantizeLinear Einsum Elu Equal Erf Exp EyeLike Flatten Floor GRU Gather GatherElements
    GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual
    GridSample GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf
    IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual LinearAttention Log LogSoftmax
    LpNormalization LpPool MatMul MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mish
    Mod Mul Neg Not Or PRelu Pow QLinearConv QLinearMatMul QuantizeLinear RMSNormalization RNN
    Reciprocal Relu ReverseSequence RotaryEmbedding Round Scatter ScatterElements ScatterND Selu
    SequenceConstruct SequenceEmpty Shrink Sigmoid Sign SimplifiedLayerNormalization Sin Sinh
    Softmax Softplus Softsign SpaceToDepth Sqrt Sub Sum SwiGLU Swish Tan Tanh TensorScatter
    ThresholdedRelu Transpose Trilu Where Xor
    ai.onnx.ml.ArrayFeatureExtractor ai.onnx.ml.Binarizer ai.onnx.ml.FeatureVectorizer
    ai.onnx.ml.Imputer ai.onnx.ml.LinearRegressor ai.onnx.ml.Normalizer ai.onnx.ml.Scaler
    com.microsoft.AttnLSTM com.microsoft.BiasGelu com.microsoft.BiasSoftmax
    com.microsoft.DequantizeLinear com.microsoft.DynamicQuantizeLSTM
    com.microsoft.DynamicQuantizeMatMul com.microsoft.FastGelu com.microsoft.FusedConv
    com.microsoft.FusedGemm com.microsoft.FusedMatMul com.microsoft.FusedMatMulActivation
    com.microsoft.Gelu com.microsoft.MatMulInteger16 com.microsoft.MatMulIntegerToFloat
    com.microsoft.MatMulNBits com.microsoft.QGemm
    com.microsoft.QLinearAdd com.microsoft.QLinearConcat com.microsoft.QLinearLeakyRelu
    com.microsoft.QLinearMul com.microsoft.QLinearSigmoid com.microsoft.QLinearSoftmax
    com.microsoft.QuantizeLinear com.microsoft.QuickGelu com.microsoft.SkipLayerNormalization
    com.microsoft.SkipSimplifiedLayerNormalization
    """
)
"""Operators whose work and output shapes depend on attributes and on the shapes of inputs."""

_FIRST: Final = _names(
    """
    AffineGrid CenterCropPad Col2Im Compress DFT Expand ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Reshape
    Resize SequenceAt SequenceErase Slice Split SplitToSequence Squeeze Tile TopK Unsqueeze Upsample
    """
)
_NONE: Final = _names(
    """
    BlackmanWindow ConstantOfShape HammingWindow HannWindow MelWeightMatrix NonMaxSuppression
    NonZero Range Unique
    """
)
_AT: Final[dict[str, tuple[int, ...]]] = {
    **dict.fromkeys(_FIRST, (0,)),
    **dict.fromkeys(_NONE, ()),
    **dict.fromkeys(("MaxUnpool", "SequenceInsert"), (0, 1)),
    **dict.fromkeys(("OneHot", "Pad", "RoiAlign", "STFT"), (0, 2)),
}
"""The inputs of further operators that determine no size: only these may depend on values."""


class _UnboundedError(Exception):
    """The work of the graph may depend on values; the message gives node and reason."""


Scope = ChainMap[str, bool]
"""Whether the tensor of a name depends on values."""


def find_unbounded_work(
    model: bytes, fed_inputs: Collection[str], lengths_input: str | None
) -> str | None:
    """Find a node whose work may depend on the values of the inputs.

    Args:
        model: an ONNX file that `decoding.walk` accepts.
        fed_inputs: inputs of the graph that the service feeds with features, states or controls.
        lengths_input: the input of lengths or of the mask, whose values may be sizes.

    Returns:
        The problem and a remedy, as one sentence without its subject "the graph"; None if the work
        depends on shapes alone.
    """
    try:
        graph, functions = read_nodes(memoryview(model))
        default = set(graph.constants) - {*fed_inputs}
        tainted = [name not in default and name != lengths_input for name in graph.inputs]
        _Analysis(functions).run(graph, ChainMap(), tainted)
    except _UnboundedError as error:
        return str(error)
    except (IndexError, ValueError) as error:  # also a node without its inputs or outputs
        return f"its nodes cannot be analysed: {error}"
    return None


class _Analysis:
    """Finds which tensors depend on values; raises `_UnboundedError` at the first invalid node."""

    def __init__(self, functions: dict[str, NodeGraph]):
        self._functions = functions
        self._results: dict[tuple[str, tuple[bool, ...]], list[bool]] = {}
        self._names = self._depth = 0

    def run(self, graph: NodeGraph, outer: Scope, tainted: Sequence[bool]) -> list[bool]:
        """Analyse a graph; returns which of its outputs depend on values.

        Args:
            outer: the tensors that a subgraph may capture.
            tainted: which of its inputs depend on values.
        """
        values = outer.new_child(dict.fromkeys(graph.constants, False))
        values.update(zip(graph.inputs, tainted, strict=True))
        self._names += len(values.maps[0])
        for node in graph.nodes:  # ONNX Runtime sorts them: one may come before those it reads
            values.update(dict.fromkeys(node.outputs, True))
            self._names += len(node.inputs) + len(node.outputs)
        if self._names > MAX_NAMES:
            raise _UnboundedError(f"expected at most {MAX_NAMES} names to analyse, got more")
        for node in graph.nodes:
            taints = [name != "" and values.get(name, True) for name in node.inputs]
            values.update(zip(node.outputs, self._visit(node, taints, values), strict=False))
        return [values.get(name, True) for name in graph.outputs]

    def _visit(self, node: Node, taints: list[bool], values: Scope) -> Iterable[bool]:
        """Check one node; returns which of its outputs depend on values."""
        operator = node.operator
        if operator in self._functions:
            return self._call(node, taints)
        if operator == "If":
            return self._if(node, taints, values)
        if operator == "Loop":
            return self._loop(node, taints, values)
        if operator == "Scan":
            return self._scan(node, taints, values)
        if operator in _SHAPES:
            return [False] * len(node.outputs)
        if operator not in _ANY:
            if operator not in _AT:
                raise _UnboundedError(
                    f"{node} is not one whose work is known to depend on shapes alone; export the "
                    "model with other operators"
                )
            for position, depends in enumerate(taints):
                if depends and position not in _AT[operator]:
                    raise _dependent(node, f"input {position}", node.inputs[position])
        return [any(taints)] * len(node.outputs)

    def _call(self, node: Node, taints: list[bool]) -> list[bool]:
        """Analyse a local function, once for each set of dependent inputs."""
        function = self._functions[node.operator]
        tainted = (*taints, *[False] * (len(function.inputs) - len(taints)))[: len(function.inputs)]
        if (node.operator, tainted) not in self._results:
            if self._depth >= MAX_CALLS:
                raise _UnboundedError(f"{node}: expected functions in at most {MAX_CALLS} levels")
            self._depth += 1
            self._results[node.operator, tainted] = self.run(function, ChainMap(), tainted)
            self._depth -= 1
        return self._results[node.operator, tainted]

    def _if(self, node: Node, taints: list[bool], values: Scope) -> list[bool]:
        if taints[0]:
            raise _dependent(node, "condition", node.inputs[0])
        branches = [self.run(node.graph(f"{name}_branch"), values, []) for name in ("then", "else")]
        return [any(each) for each in zip(*branches, strict=True)]

    def _loop(self, node: Node, taints: list[bool], values: Scope) -> list[bool]:
        for position, what in enumerate(("trip count", "condition")):
            if taints[position]:
                raise _dependent(node, what, node.inputs[position])
        body, carried = node.graph("body"), taints[2:]
        while True:
            condition, *after = self.run(body, values, [False, False, *carried])
            if condition:
                raise _dependent(node, "condition of the next iteration", body.outputs[0])
            before, carried = carried, _union(carried, after)
            if carried == before:
                return carried + after[len(carried) :]

    def _scan(self, node: Node, taints: list[bool], values: Scope) -> list[bool]:
        body = node.graph("body")
        tainted = taints[-len(body.inputs) :]  # opset 8 has the lengths of sequences in front
        count = len(body.inputs) - node.scan_inputs
        if not 0 <= count < len(body.inputs) <= len(node.inputs):
            raise _UnboundedError(f"{node} has no inputs to scan")
        while True:
            after = self.run(body, values, tainted)
            before, tainted = tainted, _union(tainted[:count], after) + tainted[count:]
            if tainted == before:
                return tainted[:count] + after[count:]


def _union(carried: Sequence[bool], after: Sequence[bool]) -> list[bool]:
    """Which values depend before or after an iteration."""
    return [a or b for a, b in zip(carried, after[: len(carried)], strict=True)]


def _dependent(node: Node, what: str, tensor: str) -> _UnboundedError:
    hint = "derive it from shapes or constants, and mask the excess with Where"
    if node.operator == "If":
        hint = "compute both branches, and choose with Where"
    return _UnboundedError(
        f"{node} takes its {what} ({tensor!r}) from the values of inputs or states, so that one "
        f"request could make a call endless, or exhaust the memory; {hint}"
    )
