"""Pairs the state inputs of an ONNX graph with its state outputs.

Pairs are given (`--state`, Triton's configuration), or inferred where nothing else is possible:
by names that differ only in words such as `in` and `out`, else by shape and element type. What is
not certain is not guessed: the error lists inputs and outputs, and the options that settle it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from models.errors import ImportedModelError
from models.importing.onnx_signature import Signature, Tensor

_BEFORE = {"in", "input", "inputs", "prev", "previous", "past", "init", "initial", "old", "before"}
_AFTER = {"out", "output", "outputs", "new", "next", "present", "final", "updated", "after"}
_MARKERS = _BEFORE | _AFTER | {"current", "cur", "last"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


def find_pairs(
    signature: Signature, known: Mapping[str, str], others: Collection[str]
) -> dict[str, str]:
    """State output by state input, in the order of the graph's inputs.

    Args:
        known: pairs that the user names.
        others: inputs that are not states.

    Raises:
        ImportedModelError: a known pair does not exist or cannot be one, or there is none.
    """
    pairs = dict(known)
    _check_known(signature, known)
    for key in (_marker_key, _step_key):
        groups: dict[tuple[str, ...], tuple[list[Tensor], list[Tensor]]]
        groups = defaultdict(lambda: ([], []))
        for side, tensors in enumerate(_unpaired(signature, pairs, others)):
            for tensor in tensors:
                groups[key(tensor.name)][side].append(tensor)
        for before, after in groups.values():
            if len(before) == len(after) == 1 and compatible(before[0], after[0]):
                pairs[before[0].name] = after[0].name
    inputs, outputs = _unpaired(signature, pairs, others)
    if len(inputs) > 1:
        pairs.update(_pairs_by_shape(inputs, outputs))
    if not pairs:
        raise ImportedModelError(
            "expected state inputs and state outputs, found no pair of them; a model whose state "
            "is inside the graph starts every chunk from the same state. Export it with its "
            "states as inputs and outputs, in PyTorch `forward(x, h0, c0) -> y, hn, cn`; or name "
            f"the pairs: {_suggestion(inputs, outputs)}{signature}"
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
            f"expected an input of features besides the states ({known}); name it with "
            f"`--input NAME`, and the state pairs with `--state IN=OUT`{signature}"
        )
    if len(remaining) > 1:
        names = [tensor.name for tensor in remaining]
        _, outputs = _unpaired(signature, pairs, ())
        raise ImportedModelError(
            f"expected one input of features, got {names} besides the states ({known}). Name the "
            f"missing pairs ({_suggestion(remaining, outputs)}), or if all of them take features, "
            "name all, and a row has their columns in this order: "
            f"{' '.join(f'--input {name}' for name in names)}{signature}"
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


def _unpaired(
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
    fitting = {
        before.name: [after.name for after in outputs if compatible(before, after)]
        for before in inputs
        if not _has_time(before)
    }
    candidates = list(fitting.values())
    return {
        name: names[0]
        for name, names in fitting.items()
        if len(names) == 1 and candidates.count(names) == 1
    }


def _marker_key(name: str) -> tuple[str, ...]:
    """The words of a name without those that tell before from after: `h_in`, `h_out`."""
    words = tuple(word.lower() for word in _WORD.findall(name))
    return tuple(word for word in words if word not in _MARKERS) or words


def _step_key(name: str) -> tuple[str, ...]:
    """Likewise without the signs of first and last: `h0`, `hn`; `initial_h`, `Y_h`."""
    words = [word for word in _marker_key(name) if word != "y"] or [name]
    last = words[-1]
    if len(words) > 1 and last in ("0", "n", "t", "1"):
        words = words[:-1]
    elif len(last) == 2 and last.endswith("n"):
        words[-1] = last[0]
    return tuple(words)


def _suggestion(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    """The options to give, with pairs that fit as examples."""
    pairs: dict[str, str] = {}
    for before in inputs:
        fitting = [each.name for each in outputs if compatible(before, each)]
        free = [name for name in fitting if name not in pairs.values()]
        if free and not _has_time(before):
            pairs[before.name] = free[0]
    options = " ".join(f"--state {before}={after}" for before, after in pairs.items())
    return f"such as `{options}`" if options else "`--state INPUT=OUTPUT`"
