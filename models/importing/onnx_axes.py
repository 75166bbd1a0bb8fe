"""Finds the axes of an ONNX graph's tensors: from what it declares, and by running it.

Declared dimensions are often missing or only names. So each order of axes that fits the declaration
is run at two sizes of batch and steps: an axis that follows the batch is the batch axis, one that
follows the steps is the axis of time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import ImportedModelError
from models.importing.onnx_signature import Signature, Tensor
from models.spec.onnx_network import (
    Axes,
    ControlInput,
    GraphInput,
    GraphOutput,
    OnnxNetwork,
    StatePair,
    StepsInput,
)

SIZES = ((2, 3), (3, 5))
"""Batch and steps of the two runs."""
MAX_BATCH = 64
_DYNAMIC = (
    "in PyTorch `torch.onnx.export(..., dynamic_shapes=...)` or `dynamic_axes` names the axes of "
    "batch and steps"
)


class _UnfitError(Exception):
    """These axes do not fit the graph; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """One order of axes, with the sizes that the graph fixes."""

    axes: Axes
    batch: int | None
    steps: int | None
    batch_axes: tuple[int, ...]


def find_network(
    signature: Signature,
    pairs: dict[str, str],
    features: Sequence[Tensor],
    steps: StepsInput | None,
    *,
    controls: Sequence[ControlInput] = (),
    axes: Axes | None = None,
    outputs: Sequence[str] = (),
) -> OnnxNetwork:
    """Find the axes of all tensors.

    Args:
        pairs: state output by state input.
        features: the inputs of features.
        controls: inputs about the sequence.
        axes: their order, if the user gives it.
        outputs: outputs that replies contain; by default all that are not states.

    Returns:
        The network; `batching` is not chosen yet, and works.

    Raises:
        ImportedModelError: no order of axes fits, or several do.
    """
    states = [tensor for tensor in signature.inputs if tensor.name in pairs]
    possible = [axes] if axes else _possible_axes(features[0], states)
    fitting: list[OnnxNetwork] = []
    reasons: list[str] = []
    for each in possible:
        try:
            reading = _read(each, signature, pairs, features)
            fitting.append(_probe(reading, signature, pairs, features, steps, controls, outputs))
        except _UnfitError as error:
            reasons.append(f"{each}: {error}")
    if not fitting:
        raise ImportedModelError(
            "expected features [B, T, F] (batch_major), [T, B, F] (time_major) or [B, F] (step), "
            f"with states of one batch axis; got {'; '.join(reasons)}{signature}"
        )
    if len(fitting) > 1 and features[0].shape[:2] != (1, 1):
        raise ImportedModelError(
            f"the graph runs as {' and as '.join(each.axes for each in fitting)}; say which with "
            f"`--axes {fitting[0].axes}`, or name the axes in the graph: {_DYNAMIC}{signature}"
        )
    return fitting[0]


def _possible_axes(feature: Tensor, states: Sequence[Tensor]) -> list[Axes]:
    """The orders of axes to try: the one whose batch has the name of the states' batch, or both."""
    shape = feature.shape
    if len(shape) == 1 or (len(shape) == 2 and isinstance(shape[1], int)):
        return ["step"]
    state_dimensions = {size for state in states for size in state.shape if isinstance(size, str)}
    has_name = [size in state_dimensions for size in shape[:2]]
    if has_name == [True, False]:
        return ["batch_major"]
    return ["time_major"] if has_name == [False, True] else ["batch_major", "time_major"]


def _read(
    axes: Axes,
    signature: Signature,
    pairs: dict[str, str],
    features: Sequence[Tensor],
) -> _Reading:
    first = features[0]
    leading = 1 if axes == "step" else 2
    for tensor in features:
        if not tensor.is_usable or len(tensor.shape) - leading not in (0, 1):
            raise _UnfitError(f"the input {tensor}")
        if len(tensor.shape) > leading and not isinstance(tensor.shape[-1], int):
            raise _UnfitError(f"{tensor.name} has no fixed number of features")
    place = 1 if axes == "time_major" else 0
    batch_size, step_size = first.shape[place], 1 if axes == "step" else first.shape[1 - place]
    if isinstance(step_size, int) and step_size != 1:
        raise _UnfitError(
            f"{first.name} takes exactly {step_size} steps; export it for any number of steps, or "
            f"for one: {_DYNAMIC}"
        )
    states = [tensor for tensor in signature.inputs if tensor.name in pairs]
    if not isinstance(batch_size, int) and any(
        all(isinstance(size, int) for size in state.shape) for state in states
    ):
        if step_size == 1:
            raise _UnfitError(f"{first.name} would have one row and one step")
        batch_size = 1  # only the features were exported with a dynamic batch
    if isinstance(batch_size, int) and not 1 <= batch_size <= MAX_BATCH:
        raise _UnfitError(f"{first.name} has a fixed batch of {batch_size}, more than {MAX_BATCH}")
    return _Reading(
        axes,
        batch_size if isinstance(batch_size, int) else None,
        step_size if isinstance(step_size, int) else None,
        tuple(_batch_axis(state, batch_size) for state in states),
    )


def _batch_axis(state: Tensor, batch_size: int | str | None) -> int:
    """The batch axis of a state.

    Args:
        batch_size: the batch of the features: a size, a name, or None if it is unknown.
    """
    dynamic = {place for place, size in enumerate(state.shape) if not isinstance(size, int)}
    if isinstance(batch_size, str) and batch_size in state.shape:
        place = state.shape.index(batch_size)
    elif len(dynamic) == 1:
        place = min(dynamic)
    else:
        fixed = [place for place, size in enumerate(state.shape) if size == batch_size]
        if dynamic or not fixed or batch_size is None:
            raise _UnfitError(
                f"the state {state} has no axis that is certainly the batch; export it with one "
                f"dynamic axis: {_DYNAMIC}"
            )
        place = fixed[-1] if len(state.shape) == 3 and len(fixed) == 2 else fixed[0]
    if dynamic - {place}:
        raise _UnfitError(
            f"the state {state} has several axes without a fixed size; a state that grows with its "
            "stream has no bound, so keep a window of fixed size"
        )
    return place


def _probe(
    reading: _Reading,
    signature: Signature,
    pairs: dict[str, str],
    features: Sequence[Tensor],
    steps: StepsInput | None,
    controls: Sequence[ControlInput],
    output_names: Sequence[str],
) -> OnnxNetwork:
    """Run the graph at two sizes, and read the outputs' axes off their shapes."""
    states = [tensor for tensor in signature.inputs if tensor.name in pairs]
    names = [tensor.name for tensor in signature.outputs if tensor.is_usable]
    shapes: list[dict[str, tuple[int, ...]]] = []
    sizes = [(reading.batch or batch, reading.steps or count) for batch, count in SIZES]
    for batch, count in sizes:
        feeds = dict(_feeds(reading, states, features, steps, batch, count))
        feeds.update(
            {each.name: np.zeros((batch, 1)[: each.rank], each.dtype) for each in controls}
        )
        try:
            values = signature.session.run(names, feeds)
        except Exception as error:  # its exceptions have no common base
            raise _UnfitError(
                f"ONNX Runtime fails on a batch of {batch} and {count} steps: "
                f"{' '.join(str(error).split())[:300]}; {_failure_hint(signature)}"
            ) from error
        by_name = {name: np.shape(value) for name, value in zip(names, values, strict=True)}
        for state in states:
            expected = feeds[state.name].shape
            if by_name[pairs[state.name]] != expected:
                raise _UnfitError(
                    f"the state {state.name} is {list(expected)} and {pairs[state.name]} is "
                    f"{list(by_name[pairs[state.name]])}"
                )
        shapes.append(by_name)
    outputs = list(_outputs(reading, signature, pairs, output_names, sizes, shapes))
    one_by_one = reading.steps == 1 or not all(output.has_time for output in outputs)
    leading = 1 if reading.axes == "step" else 2
    return OnnxNetwork(
        axes=reading.axes,
        inputs=tuple(
            GraphInput.model_validate(
                {
                    "name": tensor.name,
                    "width": tensor.shape[-1] if len(tensor.shape) > leading else None,
                    "dtype": tensor.dtype,
                }
            )
            for tensor in features
        ),
        outputs=tuple(outputs),
        states=tuple(
            StatePair.model_validate(
                {
                    "input": state.name,
                    "output": pairs[state.name],
                    "shape": [size for at, size in enumerate(state.shape) if at != axis],
                    "dtype": state.dtype,
                    "batch_axis": axis,
                }
            )
            for state, axis in zip(states, reading.batch_axes, strict=True)
        ),
        steps=steps,
        controls=tuple(controls),
        batching="step" if one_by_one else "equal",
        batch_size=reading.batch,
    )


def _failure_hint(signature: Signature) -> str:
    dtypes = {tensor.dtype for tensor in (*signature.inputs, *signature.outputs)}
    if dtypes & {"float16", "float64"}:
        return "export it in float32, for which ONNX Runtime has every operator"
    return "its export may have fixed the sizes of its example: export it with dynamic axes"


def _feeds(
    reading: _Reading,
    states: Sequence[Tensor],
    features: Sequence[Tensor],
    steps: StepsInput | None,
    batch: int,
    count: int,
) -> Iterator[tuple[str, NDArray[Any]]]:
    lead = {"batch_major": (batch, count), "time_major": (count, batch), "step": (batch,)}
    leading = lead[reading.axes]
    for tensor in features:
        shape = leading if len(tensor.shape) == len(leading) else (*leading, tensor.shape[-1])
        yield tensor.name, np.zeros(shape, tensor.dtype)
    for state, axis in zip(states, reading.batch_axes, strict=True):
        shape = tuple(batch if at == axis else size for at, size in enumerate(state.shape))
        yield state.name, np.zeros(shape, state.dtype)
    if steps is not None:
        if steps.kind == "lengths":
            yield steps.name, np.full(batch, count, steps.dtype)
        else:
            yield steps.name, np.ones(leading, steps.dtype)


def _outputs(
    reading: _Reading,
    signature: Signature,
    pairs: dict[str, str],
    output_names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    shapes: Sequence[dict[str, tuple[int, ...]]],
) -> Iterator[GraphOutput]:
    """The outputs that replies contain; the states themselves, if there is no other."""
    tensors = {tensor.name: tensor for tensor in signature.outputs}
    states = {after: place for place, after in enumerate(pairs.values())}
    names = list(output_names) or [name for name in tensors if name not in states] or list(states)
    for name in names:
        if name not in tensors:
            raise ImportedModelError(f"--output {name}: expected an output of the graph{signature}")
        if name not in shapes[0]:
            raise ImportedModelError(
                f"expected outputs that are tensors of numbers, got {tensors[name]}; name those "
                f"to serve with `--output NAME`{signature}"
            )
        if name in states:
            axis = reading.batch_axes[states[name]]
            shape = shapes[0][name]
            own = tuple(size for at, size in enumerate(shape) if at != axis)
            yield GraphOutput(name=name, shape=own, has_time=False, state_axis=axis)
            continue
        yield _output(reading, tensors[name], sizes, [each[name] for each in shapes], signature)


def _output(
    reading: _Reading,
    tensor: Tensor,
    sizes: Sequence[tuple[int, int]],
    shapes: Sequence[tuple[int, ...]],
    signature: Signature,
) -> GraphOutput:
    for has_time in (False,) if reading.axes == "step" else (True, False):
        if has_time and reading.steps == 1 and len(shapes[0]) < 3:
            continue  # [B, 1] is one value for each row
        leads = [
            ((count, batch) if reading.axes == "time_major" else (batch, count))
            if has_time
            else (batch,)
            for batch, count in sizes
        ]
        rests = [shape[len(lead) :] for shape, lead in zip(shapes, leads, strict=True)]
        fits = all(shape[: len(lead)] == lead for shape, lead in zip(shapes, leads, strict=True))
        if fits and rests[0] == rests[1]:
            return GraphOutput(name=tensor.name, shape=rests[0], has_time=has_time)
    measured = " and ".join(str(list(shape)) for shape in shapes)
    raise ImportedModelError(
        f"expected outputs that begin with the axes of batch and steps, or of the batch alone; "
        f"{tensor.name} is {measured} for batches and steps of {list(sizes)}. Leave it out: name "
        f"the outputs to serve with `--output NAME`{signature}"
    )
