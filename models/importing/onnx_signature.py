"""Reads what an ONNX file declares, and pairs its state inputs with its state outputs.

The file is parsed here and by ONNX Runtime, in the importing process only. Nothing is run.

Pairs are given (`--state`, Triton's configuration), or inferred where nothing else is possible: by
names that differ only in words such as `in` and `out`, else by shape and element type. What is not
certain is not guessed: the error lists inputs and outputs, and the options that decide it.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from models.artifact.files import inside, open_regular
from models.errors import ArtifactError, ImportedModelError
from models.importing.onnx_edits import fix_input
from models.onnx.library import open_session
from models.onnx.messages import (
    DecodingError,
    NodeProto,
    TensorProto,
    find_backward_layer,
    inner_messages,
    is_external,
    operator_name,
    parse_model,
    tensor_array,
)

MAX_GRAPH_BYTES = 2**31 - 1
"""Longest protobuf message, and so the largest graph with its weights."""

_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({name})": name for name in ("int8", "int16", "int32", "int64")},
    **{f"tensor({name})": name for name in ("uint8", "uint16", "uint32", "uint64")},
}
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Domains whose operators ONNX Runtime contains."""
_RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"}
_RANDOM.add("RandomUniformLike")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A declared input or output.

    Attributes:
        name: its name.
        shape: its dimensions: a size, a name, or None for an unknown one.
        dtype: NumPy's name of the element type, or ONNX's type if a service cannot use it.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str

    @property
    def is_usable(self) -> bool:
        """Whether it is a tensor of numbers or booleans."""
        return self.dtype in _TYPES.values()

    @property
    def window_hint(self) -> str:
        """How to serve a graph that reads a window of rows in this input; "" if it does not."""
        fixed = [size for size in self.shape[1:] if isinstance(size, int)]
        if not 1 < len(fixed) == len(self.shape) - 1 or fixed[0] < 2:
            return ""
        row = prod(fixed[1:])
        return (
            f"; or let {self.name} be a window of rows that each stream keeps: "
            f"`--features {row} --context {prod(fixed) - row}`"
        )

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.dtype} [{sizes}]"


@dataclass(frozen=True, slots=True)
class Signature:
    """What a graph declares.

    Attributes:
        inputs: in the graph's order; inputs with a default value behind the others.
        outputs: in the graph's order.
        defaults: values of the inputs that have one.
        session: a session of the graph.
        model: the graph as a ModelProto.
        graph: the ONNX file, with all its data.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    defaults: Mapping[str, NDArray[Any]]
    session: Any
    model: Any
    graph: bytes

    def __str__(self) -> str:
        return "".join(
            f"\n  {kind}: {'; '.join(str(tensor) for tensor in tensors)}"
            for kind, tensors in (("inputs", self.inputs), ("outputs", self.outputs))
        )


def read_signature(
    path: Path,
    folder: Path,
    constants: Mapping[str, float] = MappingProxyType({}),
    most_bytes: int = MAX_GRAPH_BYTES,
) -> Signature:
    """Read an ONNX file.

    Args:
        path: the file; no other process may write to it.
        folder: the folder of the original, where files with its weights may be.
        constants: values of inputs that are the same in every call; the graph then has them
            instead of the inputs.
        most_bytes: largest graph with its weights.

    Raises:
        ImportedModelError: it is no ONNX file, refers to a file that cannot be embedded, has
            operators that ONNX Runtime does not contain or that draw random numbers, or ONNX
            Runtime rejects it.
    """
    data = path.read_bytes()
    try:
        model = parse_model(data)
        tensors = [each for each in inner_messages(model, TensorProto) if is_external(each)]
        read = _external_reader(folder, most_bytes)
        for tensor in tensors:
            tensor.raw_data = read({entry.key: entry.value for entry in tensor.external_data})
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    except DecodingError as error:
        raise ImportedModelError(
            f"expected an ONNX file (a protobuf message ModelProto), got other bytes: {error}"
        ) from error
    if model.ByteSize() > most_bytes:
        raise ImportedModelError(
            f"expected a graph of at most {most_bytes} bytes with its weights, the longest "
            f"protobuf message, got {model.ByteSize()}; store the weights as float16"
        )
    for name, value in constants.items():
        fix_input(model.graph, name, value)
    if tensors or constants:
        data = model.SerializeToString()
    _check_operators(model)
    return signature_of(model, data)


def signature_of(model: Any, data: bytes) -> Signature:
    """What a ModelProto declares, and a session of it.

    Args:
        data: the ModelProto as an ONNX file, with all its data.

    Raises:
        ImportedModelError: ONNX Runtime rejects the graph.
    """
    try:
        session = open_session(data, 1, "graph")
    except ArtifactError as error:
        raise ImportedModelError(_rejection(str(error))) from error
    overridable = [_tensor(each) for each in session.get_overridable_initializers()]
    inputs = [_tensor(each) for each in session.get_inputs()]
    known = {each.name for each in inputs}
    inputs += [each for each in overridable if each.name not in known]
    return Signature(
        tuple(inputs),
        tuple(_tensor(each) for each in session.get_outputs()),
        {
            each.name: tensor_array(each)
            for each in model.graph.initializer
            if each.name in {tensor.name for tensor in overridable}
        },
        session,
        model,
        data,
    )


def _tensor(declared: Any) -> Tensor:
    shape = tuple(size if isinstance(size, int | str) else None for size in declared.shape)
    return Tensor(declared.name, shape, _TYPES.get(declared.type, declared.type))


def _check_operators(model: Any) -> None:
    local = {operator_name(each.domain, each.name) for each in model.functions}
    nodes = [(each.domain, each.op_type) for each in inner_messages(model, NodeProto)]
    custom = sorted(
        name
        for domain, kind in set(nodes)
        if (name := operator_name(domain, kind)) not in local and domain not in _DOMAINS
    )
    if custom:
        raise ImportedModelError(
            f"expected operators of ONNX (ai.onnx, ai.onnx.ml, com.microsoft), got {custom}; "
            "export the model with standard operators, in PyTorch without custom ones"
        )
    random = sorted(_RANDOM.intersection(operator_name(*each) for each in nodes))
    if random:
        raise ImportedModelError(
            f"expected a graph without random numbers, got the operators {random}; export the "
            "model for inference (in PyTorch after `model.eval()`)"
        )


def _rejection(message: str) -> str:
    """The message for a graph that ONNX Runtime rejects, with a remedy."""
    hint = "check the file with `python -m onnx.checker`, or export it again"
    if re.search(r"[Oo]pset|IR version|ir_version", message):
        hint = "export the model for an older opset, in PyTorch `opset_version=18`"
    elif "Could not find an implementation" in message or "not a registered" in message:
        hint = "export the model with other operators or in float32"
    first = message.partition(" rejects the graph: ")[2] or message
    return f"ONNX Runtime rejects the graph: {' '.join(first.split())[:500]}; {hint}"


def _external_reader(folder: Path, most_bytes: int) -> Callable[[dict[str, str]], bytes]:
    """Reads the data of a tensor from a file in the folder of the model, and nowhere else."""
    remaining = most_bytes

    def read(entries: dict[str, str]) -> bytes:
        nonlocal remaining
        location = entries.get("location", "")
        if not inside(location):
            raise ImportedModelError(
                f"expected weights inside the model or in a file beside it, got the file "
                f"{location!r}; export it as one file, in PyTorch `external_data=False`"
            )
        place = [entries.get("offset", "0"), entries.get("length", "-1")]
        try:
            offset, length = map(int, place)
            if not 0 <= offset <= sys.maxsize:
                raise ValueError(f"{offset} bytes")
        except ValueError as error:
            raise DecodingError(f"the place of its weights in {location!r}: {error}") from error
        most = remaining + 1
        try:
            with open_regular(folder / location, folder) as stream:
                stream.seek(offset)
                data = stream.read(min(length, most) if length >= 0 else most)
        except OSError as error:
            raise ImportedModelError(
                f"its weights are in the file {location!r}, which cannot be read: "
                f"{error.strerror}; put it beside the model, or export the model as one file"
            ) from error
        remaining -= len(data)
        if remaining < 0:
            raise ImportedModelError(
                f"expected weights of at most {most_bytes} bytes, the longest protobuf message; "
                "store them as float16, or serve fewer layers"
            )
        if length > len(data):
            raise ImportedModelError(
                f"its weights are in the file {location!r}: expected {length} bytes at {offset}, "
                f"got {len(data)}"
            )
        return data

    return read


_BEFORE = {"in", "input", "inputs", "prev", "previous", "past", "init", "initial", "old", "before"}
_AFTER = {"out", "output", "outputs", "new", "next", "present", "final", "updated", "after"}
_MARKERS = _BEFORE | _AFTER | {"current", "cur", "last"}
MAX_AFFIX = 4
"""Longest text, in characters, by which the names of a pair differ."""
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


def find_pairs(
    signature: Signature,
    known: Mapping[str, str],
    others: Collection[str],
    *,
    has_context: bool = False,
    has_features: bool = False,
) -> dict[str, str]:
    """State output by state input, in the order of the graph's inputs.

    Args:
        known: pairs that the user names.
        others: inputs that are not states.
        has_context: whether the input of features gets a state pair of its own.
        has_features: whether the others include the inputs of features.

    Raises:
        ImportedModelError: a known pair does not exist or cannot be one, or there is none.
    """
    pairs = dict(known)
    _check_known(signature, known)
    for key in (_marker_key, _step_key):
        groups: dict[tuple[str, ...], tuple[list[Tensor], list[Tensor]]]
        groups = defaultdict(lambda: ([], []))
        for side, tensors in enumerate(_find_unpaired(signature, pairs, others)):
            for tensor in tensors:
                groups[key(tensor.name)][side].append(tensor)
        for before, after in groups.values():
            if len(before) == len(after) == 1 and compatible(before[0], after[0]):
                pairs[before[0].name] = after[0].name
    pairs.update(_pairs_by_affix(*_find_unpaired(signature, pairs, others)))
    inputs, outputs = _find_unpaired(signature, pairs, others)
    if len(inputs) > 1 or has_features:
        pairs.update(_pairs_by_shape(inputs, outputs))
    if not pairs and not has_context and _candidates(inputs, outputs):
        raise ImportedModelError(
            "the state pairs are ambiguous: several outputs fit an input, and names do not tell "
            f"which; name the pairs, {_suggestion(inputs, outputs)}{signature}"
        )
    if not pairs and not has_context:
        if reason := find_backward_layer(signature.model):
            raise ImportedModelError(f"{reason}{signature}")
        raise ImportedModelError(
            "expected state inputs and state outputs, found no pair of them; a model whose state "
            "is inside the graph starts every chunk from the same state. Export it with its "
            "states as inputs and outputs, in PyTorch `forward(x, h0, c0) -> y, hn, cn`; or name "
            f"the pairs: {_suggestion(inputs, outputs)}"
            f"{''.join(each.window_hint for each in inputs[:1])}{signature}"
        )
    return {each.name: pairs[each.name] for each in signature.inputs if each.name in pairs}


def require_one_input(
    signature: Signature, remaining: Sequence[Tensor], pairs: Mapping[str, str]
) -> None:
    """Check that the inputs that are neither states nor lengths are one input of features.

    Raises:
        ImportedModelError: there is none, or several.
    """
    known = ", ".join(f"{before}={after}" for before, after in pairs.items())
    if not remaining:
        raise ImportedModelError(
            f"expected an input of features besides the states ({known}); name it, such as "
            f"`--input {next(iter(pairs))}`{signature}"
        )
    if len(remaining) > 1:
        names = [tensor.name for tensor in remaining]
        _, outputs = _find_unpaired(signature, pairs, ())
        missing = f"name the missing pairs, {_suggestion(remaining, outputs)}"
        ways = [missing] if _candidates(remaining, outputs) else []
        if scalars := [tensor.name for tensor in remaining if not tensor.shape]:
            given = " ".join(f"--constant {name}=VALUE" for name in scalars)
            ways.append(f"give the value of what is the same in every call (`{given}`)")
        else:
            ways.append(
                "if all of them take features, name all, and a row has their columns in this "
                f"order: `{' '.join(f'--input {name}' for name in names)}`"
            )
        raise ImportedModelError(
            f"expected one input of features, got {names} besides the states ({known}): "
            f"{'; or '.join(ways)}{signature}"
        )


def compatible(before: Tensor, after: Tensor) -> bool:
    """Whether an output can be the next value of an input."""
    return (
        before.is_usable
        and before.dtype == after.dtype
        and len(before.shape) == len(after.shape)
        and all(
            first == second or not (isinstance(first, int) and isinstance(second, int))
            for first, second in zip(before.shape, after.shape, strict=True)
        )
    )


def _check_known(signature: Signature, known: Mapping[str, str]) -> None:
    inputs = {tensor.name: tensor for tensor in signature.inputs}
    outputs = {tensor.name: tensor for tensor in signature.outputs}
    for before, after in known.items():
        pair = f"--state {before}={after}"
        if before not in inputs or after not in outputs:
            missing = "output" if before in inputs else "input"
            raise ImportedModelError(
                f"{pair}: expected NAME_OF_INPUT=NAME_OF_OUTPUT, the graph has no such "
                f"{missing}{signature}"
            )
        if not compatible(inputs[before], outputs[after]):
            raise ImportedModelError(
                f"{pair}: expected input and output of one element type and shape, got "
                f"{inputs[before]} and {outputs[after]}"
            )
    names = list(known.values())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ImportedModelError(
            f"expected one state input for each state output, got several for {twice}"
        )


def _find_unpaired(
    signature: Signature, pairs: Mapping[str, str], others: Collection[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs and outputs that are in no pair yet, and may be."""
    used_inputs, used_outputs = {*pairs, *others}, set(pairs.values())
    return (
        [tensor for tensor in signature.inputs if tensor.name not in used_inputs],
        [tensor for tensor in signature.outputs if tensor.name not in used_outputs],
    )


def _has_time(tensor: Tensor) -> bool:
    """Whether it has more axes without a fixed size than that of the batch."""
    return sum(not isinstance(size, int) for size in tensor.shape) > 1


def _pairs_by_shape(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[str, str]:
    """Pairs of inputs and outputs that nothing else fits, unless the input has an axis of time."""
    fitting = _candidates(inputs, outputs)
    candidates = list(fitting.values())
    return {
        name: names[0]
        for name, names in fitting.items()
        if len(names) == 1 and candidates.count(names) == 1
    }


def _pairs_by_affix(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[str, str]:
    """Pairs whose names all differ by the same short text at one place, as `h0` and `ho0` do."""
    differences: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for before in inputs:
        for after in outputs:
            if not _has_time(before) and compatible(before, after):
                removed, added = _difference(before.name, after.name)
                has_common = len(removed) < len(before.name)
                if has_common and 0 < len(removed) + len(added) <= MAX_AFFIX:
                    differences[removed, added].setdefault(before.name, after.name)
    most = max(map(len, differences.values()), default=0)
    best = [pairs for pairs in differences.values() if len(pairs) == most]
    is_certain = len(best) == 1 and len(set(best[0].values())) == most
    return best[0] if is_certain else {}


def _difference(one: str, other: str) -> tuple[str, str]:
    """What is left of two names without their common prefix and suffix."""
    prefix = _equal_characters(one, other)
    one, other = one[prefix:], other[prefix:]
    suffix = _equal_characters(one[::-1], other[::-1])
    return one[: len(one) - suffix], other[: len(other) - suffix]


def _equal_characters(one: str, other: str) -> int:
    """How many characters two names have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _marker_key(name: str) -> tuple[str, ...]:
    """The words of a name without those for before and after: of `h_in` and `h_out`, `h`."""
    words = tuple(word.lower() for word in _WORD.findall(name))
    return tuple(word for word in words if word not in _MARKERS) or words


def _step_key(name: str) -> tuple[str, ...]:
    """The key of a name also without marks of first and last: `h0`, `hn`; `initial_h`, `Y_h`."""
    words = [word for word in _marker_key(name) if word != "y"] or [name]
    last = words[-1]
    if len(words) > 1 and last in ("0", "n", "t", "1"):
        words = words[:-1]
    elif len(last) == 2 and last.endswith("n"):
        words[-1] = last[0]
    return tuple(words)


def _candidates(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[str, list[str]]:
    """The outputs that can be the next value of each input, unless it has an axis of time."""
    fitting = {
        before.name: [after.name for after in outputs if compatible(before, after)]
        for before in inputs
        if not _has_time(before)
    }
    return {name: names for name, names in fitting.items() if names}


def _suggestion(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    """The options to give, with pairs that fit as examples."""
    pairs: dict[str, str] = {}
    for before, fitting in _candidates(inputs, outputs).items():
        if free := [name for name in fitting if name not in pairs.values()]:
            pairs[before] = free[0]
    options = " ".join(f"--state {before}={after}" for before, after in pairs.items())
    return f"such as `{options}`" if options else "`--state INPUT=OUTPUT`"
