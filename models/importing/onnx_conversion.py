"""Conversion of an ONNX file with state pairs, verified by measurement, in this process."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from models.errors import ImportedModelError
from models.importing.isolation import Conversion, OnnxOptions
from models.importing.onnx_axes import Roles, find_network, possible_axes
from models.importing.onnx_edits import add_context
from models.importing.onnx_proof import Prover
from models.importing.onnx_signature import (
    Signature,
    Tensor,
    find_pairs,
    read_signature,
    require_one_input,
    signature_of,
)
from models.importing.triton_config import TritonConfig, TritonControl
from models.onnx.bounded_work import find_unbounded_work
from models.onnx.library import onnxruntime
from models.spec.layout import state_spec
from models.spec.model import ModelSpec
from models.spec.onnx_network import Axes, ControlInput, OnnxNetwork, StepsInput
from models.spec.state import StatePart, StateSpec

MAX_LONG_VALUES = 65_535
"""Most values of a state that are not float32 or float16; the store's header counts them in u16."""

Arrays = dict[str, NDArray[Any]]


def convert_onnx(
    path: Path,
    folder: Path,
    name: str,
    options: OnnxOptions,
    own_controls: Sequence[TritonControl] = (),
) -> tuple[Conversion, Arrays, bytes]:
    """Read an ONNX file, find its state pairs and axes, and verify what can be measured.

    Args:
        path: the file; no other process may write to it.
        folder: the folder of the original, where files with its weights may be.
        name: the packaged model's name, a lower-case slug.
        own_controls: inputs about the sequence, besides those of Triton's configuration.

    Returns:
        The conversion, the initial values by state part, and the graph with all its data.

    Raises:
        ImportedModelError: the file cannot be read or served; the message gives the reason and an
            alternative.
        MemoryError: the process reached its memory limit.
    """
    options, initial, controls = _with_triton(options)
    roles = _find_roles(
        read_signature(path, folder, options.constants), options, [*controls, *own_controls]
    )
    signature = roles.signature
    fed = {*roles.pairs, *(x.name for x in roles.features), *(x.name for x in roles.controls)}
    lengths = None if roles.steps is None else roles.steps.name
    if reason := find_unbounded_work(signature.model, fed, lengths):
        raise ImportedModelError(reason)
    try:
        network = _with_labels(find_network(roles, options.axes), options.labels)
        spec = ModelSpec(name=name, features=network.features, onnx=network, layers=(), heads=())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ImportedModelError(f"{place}: {first['msg']}{signature}") from error
    layout = state_spec(spec)
    if layout.int_size > MAX_LONG_VALUES:
        raise ImportedModelError(
            f"expected at most {MAX_LONG_VALUES} values of a state in float64 or integers, got "
            f"{layout.int_size}; export the model with states in float32"
        )
    axes = {pair.input: pair.batch_axis for pair in network.states if pair.batch_axis is not None}
    given = {**_defaults(signature, axes), **initial, **_initial_from_options(options)}
    values = _initial_values(layout, given)
    prover = Prover(network, replace(layout, initial_values=values), signature.session)
    spec = spec.model_copy(update={"onnx": prover.prove()})
    dtypes = {tensor.name: tensor.dtype for tensor in signature.outputs}
    rounded = [
        f"the output {output.name!r} is {dtypes[output.name]}; replies contain float32"
        for output in network.outputs
        if dtypes[output.name] not in ("float32", "float16", "bool", "int8", "uint8")
    ]
    conversion = Conversion(
        spec=spec.model_dump(mode="json"),
        notes=(*prover.notes, *rounded),
        verified={**prover.verified, "onnxruntime": onnxruntime.__version__},
    )
    return conversion, values, signature.graph


def _with_triton(options: OnnxOptions) -> tuple[OnnxOptions, Arrays, Sequence[TritonControl]]:
    """The options with what Triton's configuration says; the command line takes precedence.

    Returns:
        The options, the initial values and the control inputs.
    """
    if options.triton is None:
        return options, {}, ()
    folder = None if options.triton_folder is None else Path(options.triton_folder)
    config = TritonConfig(options.triton, folder)
    merged = options.model_copy(
        update={
            "states": {**config.pairs, **options.states},
            "inputs": options.inputs or config.inputs,
            "outputs": options.outputs or config.outputs,
        }
    )
    return merged, dict(config.initial_values()), config.controls


def _find_roles(
    signature: Signature, options: OnnxOptions, controls: Sequence[TritonControl]
) -> Roles:
    """Find the roles of the tensors: from the options, or by name and shape."""
    by_name = {tensor.name: tensor for tensor in signature.inputs}
    steps = _steps_input(signature, by_name, options)
    control_inputs = [_control(signature, by_name.get(each.name), each) for each in controls]
    for option, names in (("--input", options.inputs), ("--initial", tuple(options.initial))):
        if unknown := [name for name in names if name not in by_name]:
            raise ImportedModelError(
                f"{option} {unknown[0]}: expected an input of the graph{signature}"
            )
    others = [*options.inputs, *([steps.name] if steps else []), *(c.name for c in control_inputs)]
    context = options.context or 0
    pairs = find_pairs(
        signature,
        options.states,
        others,
        has_context=context > 0,
        has_features=bool(options.inputs),
    )
    known = {*pairs, *others, *signature.defaults}
    remaining = [tensor for tensor in signature.inputs if tensor.name not in known]
    features = [by_name[name] for name in options.inputs]
    if not features or remaining:
        features += remaining
        require_one_input(signature, features, pairs)
    served = [each for each in options.outputs if each not in pairs.values()] or options.outputs
    roles = Roles(signature, pairs, features, steps, control_inputs, served)
    if context or options.features is not None:
        return _with_columns(roles, options.features, context, options.axes)
    return roles


def _with_columns(roles: Roles, columns: int | None, context: int, axes: Axes | None) -> Roles:
    """The roles, with an input of features that takes rows of that many columns.

    The graph is changed if it reads a context in front of each row, or a row in several axes.
    """
    signature = roles.signature
    options = "" if columns is None else f"--features {columns}"
    options += f" --context {context}" if context else ""
    if len(roles.features) > 1 or len(roles.features[0].shape) < 2:
        raise ImportedModelError(
            f"{options}: expected one input of features with an axis for them, got "
            f"{', '.join(map(str, roles.features))}{signature}"
        )
    (tensor,) = roles.features
    if columns is not None and not isinstance(tensor.shape[-1], int):
        tensor = replace(tensor, shape=(*tensor.shape[:-1], columns + context))
        roles = replace(roles, features=[tensor])
    own = [size for size in tensor.shape[1:] if isinstance(size, int)]
    possible = [axes] if axes else possible_axes(roles)
    is_fixed = len(own) == len(tensor.shape) - 1 and "unbatched" not in possible
    wanted = None if columns is None else columns + context
    is_step = is_fixed and (wanted == prod(own) if wanted else context > 0)
    if wanted is not None and not is_step and wanted != tensor.shape[-1]:
        raise ImportedModelError(
            f"{options}: the input {tensor.name} has {tensor.shape[-1]}{signature}"
        )
    if not context and (not is_step or len(own) == 1):
        return roles
    if not is_step and (len(possible) > 1 or not isinstance(tensor.shape[-1], int)):
        missing = "`--axes`" if len(possible) > 1 else "`--features F`, its columns"
        raise ImportedModelError(f"{options}: give {missing} for the input {tensor}{signature}")
    graph = signature.model.graph
    order: Axes = "step" if is_step else possible[0]
    pair = add_context(graph, tensor.name, tensor.shape, context, order)
    changed = signature_of(signature.model, signature.model.SerializeToString())
    taken = [each for each in changed.inputs if each.name == tensor.name]
    return replace(roles, signature=changed, pairs={**roles.pairs, **pair}, features=taken)


def _with_labels(network: OnnxNetwork, labels: Mapping[str, tuple[str, ...]]) -> OnnxNetwork:
    """The network with names along the last axis of outputs."""
    names = [each.name for each in network.outputs]
    if unknown := [name for name in labels if name not in names]:
        raise ImportedModelError(f"--labels {unknown[0]}: expected one of the outputs {names}")
    outputs = [
        each.model_copy(update={"labels": labels.get(each.name, ())}) for each in network.outputs
    ]
    return network.model_copy(update={"outputs": tuple(outputs)})


def _control(signature: Signature, tensor: Tensor | None, control: TritonControl) -> ControlInput:
    if tensor is None or not tensor.is_usable or len(tensor.shape) not in (1, 2):
        got = "none" if tensor is None else str(tensor)
        raise ImportedModelError(
            f"config.pbtxt: control_input {control.name!r}: expected an input [B] or [B, 1] of "
            f"the graph, got {got}{signature}"
        )
    return ControlInput.model_validate(
        {**control._asdict(), "dtype": tensor.dtype, "rank": len(tensor.shape)}
    )


def _steps_input(
    signature: Signature, by_name: Mapping[str, Tensor], options: OnnxOptions
) -> StepsInput | None:
    """The input of lengths or of a mask."""
    for kind, name, rank in (("lengths", options.lengths, 1), ("mask", options.mask, 2)):
        if name is None:
            continue
        if name not in by_name:
            raise ImportedModelError(f"--{kind} {name}: expected an input of the graph{signature}")
        tensor = by_name[name]
        if len(tensor.shape) != rank or not tensor.is_usable:
            shape = "[B]" if rank == 1 else "[B, T]"
            raise ImportedModelError(f"--{kind} {name}: expected an input {shape}, got {tensor}")
        return _steps(kind, tensor)
    for name, tensor in by_name.items():
        if name in options.states or name in options.inputs:
            continue
        rank = len(tensor.shape)
        is_integer = tensor.dtype.startswith(("int", "uint"))
        if rank == 1 and is_integer and re.search("len", name, re.I):
            return _steps("lengths", tensor)
        if rank == 2 and tensor.is_usable and re.search("mask", name, re.I):
            return _steps("mask", tensor)
    return None


def _steps(kind: str, tensor: Tensor) -> StepsInput:
    return StepsInput.model_validate({"kind": kind, "name": tensor.name, "dtype": tensor.dtype})


def _defaults(signature: Signature, axes: Mapping[str, int]) -> Arrays:
    """Default values of state inputs, without the batch axis: learned initial states."""
    values = {}
    for name in signature.defaults.keys() & axes.keys():
        value = signature.defaults[name]
        if value.shape[axes[name]] != 1:
            raise ImportedModelError(
                f"the state {name!r}: expected a default value for a batch of 1, got "
                f"{list(value.shape)}; export it for one row, or give `--initial {name}=FILE`"
            )
        values[name] = np.take(value, 0, axis=axes[name])
    return values


def _initial_from_options(options: OnnxOptions) -> Arrays:
    values: Arrays = {}
    for name, value in options.initial.items():
        try:
            if isinstance(value, str):
                stream = io.BytesIO(base64.b64decode(value))
                values[name] = np.lib.format.read_array(stream, allow_pickle=False)
            else:
                values[name] = np.asarray(value)
        except ValueError as error:
            raise ImportedModelError(
                f"--initial {name}: expected a number or a .npy file, got {error}"
            ) from error
    return values


def _initial_values(layout: StateSpec, initial: Arrays) -> Arrays:
    """The values in shape and dtype of their parts, without those that are zero."""
    parts = {part.name: part for part in layout.parts}
    if unknown := [name for name in initial if name not in parts]:
        raise ImportedModelError(
            f"--initial {unknown[0]}: expected a state input, one of {sorted(parts)}"
        )
    values = {name: _initial_value(parts[name], value) for name, value in initial.items()}
    return {name: value for name, value in values.items() if value.any()}


def _initial_value(part: StatePart, value: NDArray[Any]) -> NDArray[Any]:
    if value.ndim and value.size == part.size:
        value = value.reshape(part.shape)
    if value.ndim and value.shape != part.shape:
        raise ImportedModelError(
            f"--initial {part.name}: expected one value or shape {list(part.shape)} (a state "
            f"without its batch axis), got {list(value.shape)}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        cast = value.astype(part.dtype)
    is_exact = part.dtype.startswith("float") or np.array_equal(cast, value)
    if not np.isfinite(cast).all() or not is_exact:
        raise ImportedModelError(
            f"--initial {part.name}: expected finite values of {part.dtype}, got {value.dtype} "
            f"{value.ravel()[:3].tolist()}"
        )
    return np.ascontiguousarray(np.broadcast_to(cast, part.shape))
