"""Pairs the state inputs of an ONNX graph with its state outputs.

Pairs are given (`--state`, Triton's configuration), or inferred where nothing else is possible:
by names that differ only in words such as `in` and `out`, else by shape and element type. What is
not certain is not guessed: the error lists inputs and outputs, and the options that settle it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from models.errors import ImportedModelError
from models.importing.onnx_signature import Signature, Tensor

_BEFORE = {"in", "input", "inputs", "prev", "previous", "past", "init", "initial", "old", "before"}
_AFTER = {"out", "output", "outputs", "new", "next", "present", "final", "updated", "after"}
_MARKERS = _BEFORE | _AFTER | {"current", "cur", "last"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


def find_pairs(
    signature: Signature, known: Mapping[str, str], others: Iterable[str]
) -> dict[str, str]:
    """State output by state input, in the order of the graph's inputs.

    Args:
        known: pairs that the user names.
        others: inputs that are not states.

    Raises:
        ImportedModelError: a known pair does not exist or cannot be one, or there is none.
    """
    inputs = {tensor.name: tensor for tensor in signature.inputs}
    outputs = {tensor.name: tensor for tensor in signature.outputs}
    for before, after in known.items():
        _check_known(signature, inputs.get(before), outputs.get(after), f"{before}={after}")
    twice = [name for name in set(known.values()) if list(known.values()).count(name) > 1]
    if twice:
        raise ImportedModelError(
            f"expected one state input for each state output, got several for {sorted(twice)}"
        )
    pairs = dict(known)
    free_inputs = [
        tensor
        for tensor in signature.inputs
        if tensor.name not in pairs and tensor.name not in set(others)
    ]
    free_outputs = [
        tensor for tensor in signature.outputs if tensor.name not in set(pairs.values())
    ]
    for match in (_marker_key, _step_key):
        _pair_by_name(pairs, free_inputs, free_outputs, match)
    if len([each for each in free_inputs if each.name not in pairs]) > 1:
        _pair_by_shape(pairs, free_inputs, free_outputs)
    if not pairs:
        raise ImportedModelError(
            "expected state inputs and state outputs, found no pair of them; a model whose state "
            "is inside the graph starts every chunk from the same state. Export it with its "
            "states as inputs and outputs, in PyTorch `forward(x, h0, c0) -> y, hn, cn`; or name "
            f"the pairs: {_suggestion(signature, free_inputs, free_outputs)}{signature}"
        )
    return {name: pairs[name] for name in inputs if name in pairs}


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
        used = set(pairs.values())
        outputs = [tensor for tensor in signature.outputs if tensor.name not in used]
        inputs = " ".join(f"--input {name}" for name in names)
        raise ImportedModelError(
            f"expected one input of features, got {names} besides the states ({known}). Name the "
            f"missing pairs ({_suggestion(signature, remaining, outputs)}), or if all of them take "
            f"features, name all, and a row has their columns in this order: {inputs}{signature}"
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


def _check_known(
    signature: Signature, before: Tensor | None, after: Tensor | None, pair: str
) -> None:
    if before is None or after is None:
        missing = "input" if before is None else "output"
        raise ImportedModelError(
            f"--state {pair}: expected NAME_OF_INPUT=NAME_OF_OUTPUT, the graph has no such "
            f"{missing}{signature}"
        )
    if not compatible(before, after):
        raise ImportedModelError(
            f"--state {pair}: expected input and output of one element type and shape, got "
            f"{before} and {after}"
        )


def _pair_by_name(
    pairs: dict[str, str],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    key: Callable[[str], tuple[str, ...]],
) -> None:
    """Pair inputs and outputs with the same key, where each is the only one with it."""
    by_key: dict[tuple[str, ...], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    used = set(pairs.values())
    for tensor in inputs:
        if tensor.name not in pairs:
            by_key[key(tensor.name)][0].append(tensor)
    for tensor in outputs:
        if tensor.name not in used:
            by_key[key(tensor.name)][1].append(tensor)
    for before, after in by_key.values():
        if len(before) == len(after) == 1 and compatible(before[0], after[0]):
            pairs[before[0].name] = after[0].name


def _pair_by_shape(
    pairs: dict[str, str], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> None:
    """Pair inputs and outputs that nothing else fits, unless the input has an axis of time too."""
    used = set(pairs.values())
    before = [tensor for tensor in inputs if tensor.name not in pairs]
    after = [tensor for tensor in outputs if tensor.name not in used]
    fitting = {
        first.name: [second.name for second in after if compatible(first, second)]
        for first in before
        if sum(not isinstance(size, int) for size in first.shape) < 2
    }
    for name, names in fitting.items():
        if len(names) == 1 and sum(names == others for others in fitting.values()) == 1:
            pairs[name] = names[0]


def _words(name: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in _WORD.findall(name))


def _marker_key(name: str) -> tuple[str, ...]:
    """The words of a name without those that tell before from after: `h_in`, `h_out`."""
    words = _words(name)
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


def _suggestion(signature: Signature, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    """The options to give, with pairs that fit as examples."""
    options, used = [], set[str]()
    for before in inputs:
        if sum(not isinstance(size, int) for size in before.shape) > 1:
            continue
        after = next(
            (o.name for o in outputs if o.name not in used and compatible(before, o)), None
        )
        if after is not None:
            used.add(after)
            options.append(f"--state {before.name}={after}")
    return f"such as `{' '.join(options)}`" if options else "`--state INPUT=OUTPUT`"
