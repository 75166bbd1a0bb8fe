"""Finds the axes of an ONNX graph's tensors: from what it declares, and by running it.

Declared dimensions are often missing or only names. So each order of axes that fits the declaration
is run at two sizes of batch and steps: an axis that follows the batch is the batch axis, one that
follows the steps is the axis of time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
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


@dataclass(frozen=True, slots=True)
class Roles:
    """What the tensors of a graph are for.

    Attributes:
        signature: what the graph declares.
        pairs: state output by state input.
        features: the inputs of features.
        steps: the input of lengths or of the mask.
        controls: inputs about the sequence.
        outputs: outputs that replies contain; if empty, all that are not states.
    """

    signature: Signature
    pairs: dict[str, str]
    features: Sequence[Tensor]
    steps: StepsInput | None = None
    controls: Sequence[ControlInput] = ()
    outputs: Sequence[str] = ()

    @property
    def states(self) -> list[Tensor]:
        """The state inputs."""
        return [tensor for tensor in self.signature.inputs if tensor.name in self.pairs]


class _UnfitError(Exception):
    """These axes do not fit the graph; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """One order of axes, with the sizes that the graph fixes."""

    axes: Axes
    batch: int | None
    steps: int | None
    batch_axes: tuple[int | None, ...]

    def leading(self, batch: int, steps: int) -> tuple[int, ...]:
        """The sizes of the axes in front."""
        lead: dict[Axes, tuple[int, ...]] = {
            "batch_major": (batch, steps),
            "time_major": (steps, batch),
            "step": (batch,),
            "unbatched": (steps,),
        }
        return lead[self.axes]

    def leading_once(self, batch: int) -> tuple[int, ...]:
        """The sizes of the axes in front of an output without an axis of time."""
        return () if self.axes == "unbatched" else (batch,)


def find_network(roles: Roles, axes: Axes | None = None) -> OnnxNetwork:
    """Find the axes of all tensors.

    Args:
        axes: their order, if the user gives it.

    Returns:
        The network; `batching` is not chosen yet, and works.

    Raises:
        ImportedModelError: no order of axes fits, or several do.
    """
    possible = [axes] if axes else possible_axes(roles)
    fitting, reasons = _fit(possible, roles)
    if not fitting:
        fitting, _ = _fit(possible, roles, batch=1)  # the export fixed the batch of some node
    if not fitting:
        raise ImportedModelError(
            "expected features [B, T, F] (batch_major), [T, B, F] (time_major), [B, F] (step) or "
            "[T, F] (unbatched), with states of one batch axis, or none if unbatched; an F that is "
            f"not declared is given by `--features F`; got {'; '.join(reasons)}{roles.signature}"
        )
    if len(fitting) > 1 and roles.features[0].shape[:2] != (1, 1):
        raise ImportedModelError(
            f"the graph runs as {' and as '.join(each.axes for each in fitting)}; say which with "
            f"`--axes {fitting[0].axes}`, or name the axes in the graph: {_DYNAMIC}"
            f"{roles.signature}"
        )
    return fitting[0]


def _fit(
    possible: Sequence[Axes], roles: Roles, batch: int | None = None
) -> tuple[list[OnnxNetwork], list[str]]:
    """The networks with orders of axes that fit, and the reasons of the others.

    Args:
        batch: the size of the batch, if the graph does not fix it.
    """
    fitting: list[OnnxNetwork] = []
    reasons: list[str] = []
    for axes in possible:
        try:
            reading = _read(axes, roles)
            fitting.append(_probe(replace(reading, batch=reading.batch or batch), roles))
        except _UnfitError as error:
            reasons.append(f"{axes}: {error}")
    return fitting, reasons


def possible_axes(roles: Roles) -> list[Axes]:
    """The orders of axes to try: the one whose batch has the name of the states' batch, or both."""
    shape = roles.features[0].shape
    if len(shape) == 1 or (len(shape) == 2 and isinstance(shape[1], int)):
        sizes = [size for state in roles.states for size in state.shape]
        is_one_row = bool(sizes) and not isinstance(shape[0], int) and all(map(_is_fixed, sizes))
        return ["unbatched"] if is_one_row else ["step"]
    names = {size for state in roles.states for size in state.shape if isinstance(size, str)}
    has_name = [size in names for size in shape[:2]]
    if has_name == [True, False]:
        return ["batch_major"]
    return ["time_major"] if has_name == [False, True] else ["batch_major", "time_major"]


def _read(axes: Axes, roles: Roles) -> _Reading:
    first, leading = roles.features[0], 1 if axes in ("step", "unbatched") else 2
    for tensor in roles.features:
        if not tensor.is_usable or len(tensor.shape) - leading not in (0, 1):
            values = prod(size for size in tensor.shape[1:] if isinstance(size, int))
            raise _UnfitError(f"the input {tensor}; if a row is all of it, `--features {values}`")
        if len(tensor.shape) > leading and not isinstance(tensor.shape[-1], int):
            raise _UnfitError(f"{tensor.name} has no fixed number of features")
    if axes == "unbatched":
        return _read_unbatched(first, roles)
    place = 1 if axes == "time_major" else 0
    batch_size, step_size = first.shape[place], 1 if axes == "step" else first.shape[1 - place]
    if isinstance(step_size, int) and step_size != 1:
        raise _UnfitError(
            f"{first.name} takes exactly {step_size} steps; export it for any number of steps, or "
            f"for one: {_DYNAMIC}{first.window_hint}"
        )
    if not isinstance(batch_size, int) and any(
        all(isinstance(size, int) for size in state.shape) for state in roles.states
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
        tuple(_batch_axis(state, batch_size) for state in roles.states),
    )


def _read_unbatched(first: Tensor, roles: Roles) -> _Reading:
    if isinstance(first.shape[0], int):
        raise _UnfitError(f"{first.name} takes exactly {first.shape[0]} steps")
    if dynamic := [state for state in roles.states if not all(map(_is_fixed, state.shape))]:
        raise _UnfitError(f"the state {dynamic[0]} has an axis without a fixed size")
    places = tuple(_batch_axis(state, 1) if 1 in state.shape else None for state in roles.states)
    return _Reading("unbatched", 1, None, places)


def _is_fixed(size: int | str | None) -> bool:
    return isinstance(size, int)


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


def _probe(reading: _Reading, roles: Roles) -> OnnxNetwork:
    """Run the graph at two sizes, and read the outputs' axes off their shapes."""
    signature = roles.signature
    names = [tensor.name for tensor in signature.outputs if tensor.is_usable]
    shapes: list[dict[str, tuple[int, ...]]] = []
    sizes = [(reading.batch or batch, reading.steps or steps) for batch, steps in SIZES]
    for batch, steps in sizes:
        feeds = dict(_feeds(reading, roles, batch, steps))
        try:
            values = signature.session.run(names, feeds)
        except Exception as error:  # its exceptions have no common base
            raise _UnfitError(
                f"ONNX Runtime fails on a batch of {batch} and {steps} steps: "
                f"{' '.join(str(error).split())[:300]}; {_failure_hint(signature)}"
            ) from error
        by_name = {name: np.shape(value) for name, value in zip(names, values, strict=True)}
        for before, after in roles.pairs.items():
            if by_name[after] != feeds[before].shape:
                raise _UnfitError(
                    f"the state {before} is {list(feeds[before].shape)} and {after} is "
                    f"{list(by_name[after])}"
                )
        shapes.append(by_name)
    outputs = tuple(_outputs(reading, roles, sizes, shapes))
    one_by_one = reading.steps == 1 or not all(output.has_time for output in outputs)
    leading = len(reading.leading(1, 1))
    inputs = [
        {"name": each.name, "width": next(iter(each.shape[leading:]), None), "dtype": each.dtype}
        for each in roles.features
    ]
    states = [
        {
            "input": state.name,
            "output": roles.pairs[state.name],
            "shape": _without(state.shape, axis),
            "dtype": state.dtype,
            "batch_axis": axis,
        }
        for state, axis in zip(roles.states, reading.batch_axes, strict=True)
    ]
    return OnnxNetwork(
        axes=reading.axes,
        inputs=tuple(map(GraphInput.model_validate, inputs)),
        outputs=outputs,
        states=tuple(map(StatePair.model_validate, states)),
        steps=roles.steps,
        controls=tuple(roles.controls),
        batching="step" if one_by_one else "equal",
        batch_size=reading.batch,
    )


def _failure_hint(signature: Signature) -> str:
    dtypes = {tensor.dtype for tensor in (*signature.inputs, *signature.outputs)}
    if dtypes & {"float16", "float64"}:
        return "export it in float32, for which ONNX Runtime has every operator"
    return "its export may have fixed the sizes of its example: export it with dynamic axes"


def _feeds(
    reading: _Reading, roles: Roles, batch: int, count: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    leading = reading.leading(batch, count)
    for tensor in roles.features:
        yield tensor.name, np.zeros((*leading, *tensor.shape[len(leading) :]), tensor.dtype)
    for state, axis in zip(roles.states, reading.batch_axes, strict=True):
        shape = tuple(batch if at == axis else size for at, size in enumerate(state.shape))
        yield state.name, np.zeros(shape, state.dtype)
    for control in roles.controls:
        yield control.name, np.zeros((batch, 1)[: control.rank], control.dtype)
    if (steps := roles.steps) is not None:
        if steps.kind == "lengths":
            yield steps.name, np.full(batch, count, steps.dtype)
        else:
            yield steps.name, np.ones(leading, steps.dtype)


def _outputs(
    reading: _Reading,
    roles: Roles,
    sizes: Sequence[tuple[int, int]],
    shapes: Sequence[dict[str, tuple[int, ...]]],
) -> Iterator[GraphOutput]:
    """The outputs that replies contain; the states themselves, if there is no other."""
    signature = roles.signature
    tensors = {tensor.name: tensor for tensor in signature.outputs}
    states = dict(zip(roles.pairs.values(), reading.batch_axes, strict=True))
    names = list(roles.outputs) or [name for name in tensors if name not in states] or list(states)
    for name in names:
        if name not in tensors:
            raise ImportedModelError(f"--output {name}: expected an output of the graph{signature}")
        if name not in shapes[0]:
            raise ImportedModelError(
                f"expected outputs that are tensors of numbers, got {tensors[name]}; name those "
                f"to serve with `--output NAME`{signature}"
            )
        measured = [each[name] for each in shapes]
        if name in states:
            axis, shape = states[name], _without(measured[0], states[name])
            yield GraphOutput(name=name, shape=shape, has_time=False, state_axis=axis)
            continue
        for has_time in (True, False):
            own = _own_shape(reading, has_time, sizes, measured)
            if own is not None:
                yield GraphOutput(name=name, shape=own, has_time=has_time)
                break
        else:
            raise ImportedModelError(
                "expected outputs that begin with the axes of batch and steps, or of the batch "
                f"alone; {name} is {' and '.join(str(list(shape)) for shape in measured)} for "
                f"batches and steps of {list(sizes)}. Leave it out: name the outputs to serve with "
                f"`--output NAME`{signature}"
            )


def _without(shape: tuple[Any, ...], axis: int | None) -> tuple[Any, ...]:
    """A shape without its batch axis."""
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


def _own_shape(
    reading: _Reading,
    has_time: bool,
    sizes: Sequence[tuple[int, int]],
    shapes: Sequence[tuple[int, ...]],
) -> tuple[int, ...] | None:
    """The shape of an output behind the axes of batch and time; None if it does not have these."""
    if has_time and (reading.axes == "step" or (reading.steps == 1 and len(shapes[0]) < 3)):
        return None  # [B, 1] is one value for each row
    leads = [
        reading.leading(*size) if has_time else reading.leading_once(size[0]) for size in sizes
    ]
    rests = [shape[len(lead) :] for shape, lead in zip(shapes, leads, strict=True)]
    fits = all(shape[: len(lead)] == lead for shape, lead in zip(shapes, leads, strict=True))
    return rests[0] if fits and rests[0] == rests[1] else None
