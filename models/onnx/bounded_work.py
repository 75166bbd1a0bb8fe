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
from typing import Any, Final

from models.errors import ArtifactError
from models.onnx.messages import (
    DecodingError,
    TensorProto,
    inner_messages,
    is_external,
    operator_name,
    parse_model,
)
from models.spec.onnx_network import OnnxNetwork

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


_OWN_DOMAINS: Final = ("ai.onnx", "com.microsoft", "com.ms.")
"""Domains whose operators are those of ONNX and ONNX Runtime, whatever function a model defines."""


class _UnboundedError(Exception):
    """The work of the graph may depend on values; the message gives node and reason."""


Scope = ChainMap[str, bool]
"""Whether the tensor of a name depends on values."""


def find_unbounded_work(
    model: Any, fed_inputs: Collection[str], lengths_input: str | None
) -> str | None:
    """Find a node whose work may depend on the values of the inputs.

    Args:
        model: a ModelProto, from `messages.parse_model`.
        fed_inputs: inputs of the graph that the service feeds with features, states or controls.
        lengths_input: the input of lengths or of the mask, whose values may be sizes.

    Returns:
        The problem and a remedy, as one sentence without its subject "the graph"; None if the work
        depends on shapes alone.
    """
    graph = model.graph
    default = set(_constants(graph)) - {*fed_inputs}
    tainted = [each.name not in default and each.name != lengths_input for each in graph.input]
    try:
        _Analysis(_local_functions(model)).run_graph(graph, ChainMap(), tainted)
    except _UnboundedError as error:
        return str(error)
    except (IndexError, ValueError) as error:  # also a node without its inputs or outputs
        return f"its nodes cannot be analysed: {error}"
    return None


def _local_functions(model: Any) -> dict[str, Any]:
    """The functions that a model defines itself, by domain and name."""
    functions: dict[str, Any] = {}
    for function in model.functions:
        name = operator_name(function.domain, function.name)
        if "." not in name or name.startswith(_OWN_DOMAINS) or name in functions:
            raise _UnboundedError(
                f"the local function {name!r} has a domain of ONNX Runtime, or the name of "
                "another one; export the model with functions inlined"
            )
        functions[name] = function
    return functions


def _constants(graph: Any) -> list[str]:
    constants = [*graph.initializer, *(each.values for each in graph.sparse_initializer)]
    return [each.name for each in constants]


def _attributes(node: Any) -> dict[str, Any]:
    attributes = {each.name: each for each in node.attribute}
    if len(attributes) < len(node.attribute):
        raise ValueError(f"expected different names of the attributes of {_describe(node)}")
    return attributes


def _subgraph(node: Any, name: str) -> Any:
    attribute = _attributes(node).get(name)
    if attribute is None or not attribute.HasField("g"):
        raise ValueError(f"{_describe(node)} has no subgraph {name!r}")
    return attribute.g


def _describe(node: Any) -> str:
    operator = operator_name(node.domain, node.op_type)
    return f"the operator {operator} (node {node.name or node.output[0]!r})"


class _Analysis:
    """Finds which tensors depend on values; raises `_UnboundedError` at the first invalid node."""

    def __init__(self, functions: dict[str, Any]):
        self._functions = functions
        self._results: dict[tuple[str, tuple[bool, ...]], list[bool]] = {}
        self._names = self._depth = 0

    def run_graph(self, graph: Any, outer: Scope, tainted: Sequence[bool]) -> list[bool]:
        """Analyse a GraphProto; returns which of its outputs depend on values.

        Args:
            outer: the tensors that a subgraph may capture.
            tainted: which of its inputs depend on values.
        """
        values = outer.new_child(dict.fromkeys(_constants(graph), False))
        inputs, outputs = ([each.name for each in side] for side in (graph.input, graph.output))
        return self._run(graph.node, values, inputs, outputs, tainted)

    def _run(
        self,
        nodes: Sequence[Any],
        values: Scope,
        inputs: Sequence[str],
        outputs: Sequence[str],
        tainted: Sequence[bool],
    ) -> list[bool]:
        """Analyse the nodes of a graph or function, with the constants of `values`."""
        values.update(zip(inputs, tainted, strict=True))
        self._names += len(values.maps[0])
        for node in nodes:  # ONNX Runtime sorts them: one may come before those it reads
            values.update(dict.fromkeys(node.output, True))
            self._names += len(node.input) + len(node.output)
        if self._names > MAX_NAMES:
            raise _UnboundedError(f"expected at most {MAX_NAMES} names to analyse, got more")
        for node in nodes:
            taints = [name != "" and values.get(name, True) for name in node.input]
            values.update(zip(node.output, self._visit(node, taints, values), strict=False))
        return [values.get(name, True) for name in outputs]

    def _visit(self, node: Any, taints: list[bool], values: Scope) -> Iterable[bool]:
        """Check one node; returns which of its outputs depend on values."""
        operator = operator_name(node.domain, node.op_type)
        _attributes(node)
        if operator in self._functions:
            return self._call(operator, node, taints)
        if operator == "If":
            return self._if(node, taints, values)
        if operator == "Loop":
            return self._loop(node, taints, values)
        if operator == "Scan":
            return self._scan(node, taints, values)
        if operator in _SHAPES:
            return [False] * len(node.output)
        if operator not in _ANY:
            if operator not in _AT:
                raise _UnboundedError(
                    f"{_describe(node)} is not one whose work is known to depend on shapes alone; "
                    "export the model with other operators"
                )
            for position, depends in enumerate(taints):
                if depends and position not in _AT[operator]:
                    raise _dependent(node, f"input {position}", node.input[position])
        return [any(taints)] * len(node.output)

    def _call(self, operator: str, node: Any, taints: list[bool]) -> list[bool]:
        """Analyse a local function, once for each set of dependent inputs."""
        function = self._functions[operator]
        count = len(function.input)
        tainted = (*taints, *[False] * (count - len(taints)))[:count]
        if (operator, tainted) not in self._results:
            if self._depth >= MAX_CALLS:
                raise _UnboundedError(
                    f"{_describe(node)}: expected functions in at most {MAX_CALLS} levels"
                )
            self._depth += 1
            self._results[operator, tainted] = self._run(
                function.node, ChainMap(), function.input, function.output, tainted
            )
            self._depth -= 1
        return self._results[operator, tainted]

    def _if(self, node: Any, taints: list[bool], values: Scope) -> list[bool]:
        if taints[0]:
            raise _dependent(node, "condition", node.input[0])
        branches = [
            self.run_graph(_subgraph(node, f"{name}_branch"), values, [])
            for name in ("then", "else")
        ]
        return [any(each) for each in zip(*branches, strict=True)]

    def _loop(self, node: Any, taints: list[bool], values: Scope) -> list[bool]:
        for position, what in enumerate(("trip count", "condition")):
            if taints[position]:
                raise _dependent(node, what, node.input[position])
        body, carried = _subgraph(node, "body"), taints[2:]
        while True:
            condition, *after = self.run_graph(body, values, [False, False, *carried])
            if condition:
                raise _dependent(node, "condition of the next iteration", body.output[0].name)
            before, carried = carried, _union(carried, after)
            if carried == before:
                return carried + after[len(carried) :]

    def _scan(self, node: Any, taints: list[bool], values: Scope) -> list[bool]:
        body = _subgraph(node, "body")
        tainted = taints[-len(body.input) :]  # opset 8 has the lengths of sequences in front
        scanned = _attributes(node).get("num_scan_inputs")
        count = len(body.input) - (0 if scanned is None else scanned.i)
        if not 0 <= count < len(body.input) <= len(node.input):
            raise _UnboundedError(f"{_describe(node)} has no inputs to scan")
        while True:
            after = self.run_graph(body, values, tainted)
            before, tainted = tainted, _union(tainted[:count], after) + tainted[count:]
            if tainted == before:
                return tainted[:count] + after[count:]


def _union(carried: Sequence[bool], after: Sequence[bool]) -> list[bool]:
    """Whether each value depends before or after an iteration."""
    return [a or b for a, b in zip(carried, after[: len(carried)], strict=True)]


def _dependent(node: Any, what: str, tensor: str) -> _UnboundedError:
    hint = "derive it from shapes or constants, and mask the excess with Where"
    if node.op_type == "If":
        hint = "compute both branches, and choose with Where"
    return _UnboundedError(
        f"{_describe(node)} takes its {what} ({tensor!r}) from the values of inputs or states, so "
        f"that one request could make a call endless, or exhaust the memory; {hint}"
    )


def check_imported_graph(data: bytes, network: OnnxNetwork, where: str) -> None:
    """Reject a graph that refers to other files, or whose work depends on values.

    Raises:
        ArtifactError: it does, or it is no ONNX file.
    """
    try:
        model = parse_model(data)
    except DecodingError as error:
        raise ArtifactError(f"{where}: expected an ONNX file, got other bytes: {error}") from error
    for tensor in inner_messages(model, TensorProto):
        if is_external(tensor):
            file = next((each.value for each in tensor.external_data if each.key == "location"), "")
            raise ArtifactError(
                f"{where}: expected a graph that contains its weights, got one that refers to the "
                f"file {file!r}; `carry import` packages both"
            )
    sizes = None if network.steps is None else network.steps.name
    if reason := find_unbounded_work(model, network.value_inputs, sizes):
        raise ArtifactError(f"{where}: {reason}")
