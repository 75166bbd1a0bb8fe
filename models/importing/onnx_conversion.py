"""Conversion of an ONNX file with state pairs, verified by measurement, in this process."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from models.errors import ImportedModelError
from models.importing.onnx_axes import Roles, find_network
from models.importing.onnx_proof import Prover
from models.importing.onnx_signature import Signature, Tensor, read_signature
from models.importing.results import Conversion, OnnxOptions
from models.importing.state_pairs import find_pairs, require_one_input
from models.importing.triton_config import TritonConfig, TritonControl
from models.onnx.bounded_work import find_unbounded_work
from models.onnx.library import onnxruntime
from models.spec.layout import state_spec
from models.spec.model import ModelSpec
from models.spec.onnx_network import ControlInput, StepsInput
from models.spec.state import Dtype, StatePart, StateSpec

MAX_LONG_VALUES = 65_535
"""Most values of a state that are not float32 or float16; the store's header counts them in u16."""


def convert_onnx(
    path: Path, folder: Path, name: str, options: OnnxOptions
) -> tuple[Conversion, dict[str, NDArray[Any]], bytes]:
    """Read an ONNX file, find its state pairs and axes, and verify what can be measured.

    Args:
        path: the file; no other process may write to it.
        folder: the folder of the original, where files with its weights may be.
        name: the packaged model's name, a lower-case slug.

    Returns:
        The conversion, the initial values by state part, and the graph with all its data.

    Raises:
        ImportedModelError: the file cannot be read or served; the message gives the reason and an
            alternative.
        MemoryError: the process reached its memory limit.
    """
    options, initial, control_inputs = _with_triton(options)
    signature = read_signature(path, folder)
    steps = _steps_input(signature, options)
    controls = [_control(signature, each) for each in control_inputs]
    others = [*options.inputs, *([steps.name] if steps else []), *(each.name for each in controls)]
    _check_names(signature, options)
    pairs = find_pairs(signature, options.states, others)
    features = _features(signature, options, pairs, others)
    fed = {*pairs, *(tensor.name for tensor in features), *(each.name for each in controls)}
    if reason := find_unbounded_work(signature.model, fed, steps.name if steps else None):
        raise ImportedModelError(reason)
    served = [each for each in options.outputs if each not in pairs.values()] or options.outputs
    try:
        roles = Roles(signature, pairs, features, steps, controls, served)
        network = find_network(roles, options.axes)
        spec = ModelSpec(name=name, features=network.features, onnx=network, layers=(), heads=())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ImportedModelError(f"{place}: {first['msg']}{signature}") from error
    layout = state_spec(spec)
    _check_size(layout)
    axes = {pair.input: pair.batch_axis for pair in network.states}
    initial = {**_defaults(signature, axes), **initial, **_initial_from_options(options)}
    layout = replace(layout, initial_values=_initial_values(layout, initial))
    proof = Prover(network, layout, signature.session).prove()
    spec = spec.model_copy(update={"onnx": proof.network})
    conversion = Conversion(
        spec=spec.model_dump(mode="json"),
        notes=(*proof.notes, *_notes(signature, network.outputs)),
        verified={**proof.verified, "onnxruntime": onnxruntime.__version__},
    )
    return conversion, dict(layout.initial_values), signature.graph


def _with_triton(
    options: OnnxOptions,
) -> tuple[OnnxOptions, dict[str, NDArray[Any]], tuple[TritonControl, ...]]:
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


def _control(signature: Signature, control: TritonControl) -> ControlInput:
    tensor = next((each for each in signature.inputs if each.name == control.name), None)
    if tensor is None or not tensor.is_usable or len(tensor.shape) not in (1, 2):
        got = "none" if tensor is None else str(tensor)
        raise ImportedModelError(
            f"config.pbtxt: control_input {control.name!r}: expected an input [B] or [B, 1] of "
            f"the graph, got {got}{signature}"
        )
    return ControlInput.model_validate(
        {**control._asdict(), "dtype": tensor.dtype, "rank": len(tensor.shape)}
    )


def _check_names(signature: Signature, options: OnnxOptions) -> None:
    known = {tensor.name for tensor in signature.inputs}
    for option, names in (("--input", options.inputs), ("--initial", tuple(options.initial))):
        for name in names:
            if name not in known:
                raise ImportedModelError(
                    f"{option} {name}: expected an input of the graph{signature}"
                )


def _steps_input(signature: Signature, options: OnnxOptions) -> StepsInput | None:
    """The input of lengths or of a mask: as given, or by name and shape."""
    used = {*options.states, *options.inputs}
    for tensor in signature.inputs:
        if tensor.name in (options.lengths, options.mask):
            kind = "lengths" if tensor.name == options.lengths else "mask"
            rank = 1 if kind == "lengths" else 2
            if len(tensor.shape) != rank or not tensor.is_usable:
                expected = "[B]" if rank == 1 else "[B, T]"
                raise ImportedModelError(
                    f"--{kind} {tensor.name}: expected an input {expected}, got {tensor}"
                )
            return _steps(kind, tensor)
    for option, name in (("--lengths", options.lengths), ("--mask", options.mask)):
        if name is not None:
            raise ImportedModelError(f"{option} {name}: expected an input of the graph{signature}")
    for tensor in signature.inputs:
        if tensor.name in used or not tensor.is_usable:
            continue
        is_integer = tensor.dtype.startswith(("int", "uint"))
        if len(tensor.shape) == 1 and is_integer and re.search("len", tensor.name, re.I):
            return _steps("lengths", tensor)
        if len(tensor.shape) == 2 and re.search("mask", tensor.name, re.I):
            return _steps("mask", tensor)
    return None


def _steps(kind: str, tensor: Tensor) -> StepsInput:
    return StepsInput.model_validate({"kind": kind, "name": tensor.name, "dtype": tensor.dtype})


def _features(
    signature: Signature, options: OnnxOptions, pairs: Mapping[str, str], others: list[str]
) -> list[Tensor]:
    """The inputs of features, in the order of a row's columns."""
    by_name = {tensor.name: tensor for tensor in signature.inputs}
    remaining = [
        tensor
        for tensor in signature.inputs
        if tensor.name not in pairs
        and tensor.name not in others
        and tensor.name not in signature.defaults
    ]
    if not options.inputs:
        require_one_input(signature, remaining, pairs)
        return remaining
    if remaining:
        named = [by_name[name] for name in options.inputs]
        require_one_input(signature, [*named, *remaining], pairs)
    return [by_name[name] for name in options.inputs]


def _check_size(layout: StateSpec) -> None:
    if layout.int_size > MAX_LONG_VALUES:
        raise ImportedModelError(
            f"expected at most {MAX_LONG_VALUES} values of a state in float64 or integers, got "
            f"{layout.int_size}; export the model with states in float32"
        )


def _defaults(signature: Signature, axes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Default values of state inputs, without the batch axis: learned initial states."""
    values = {}
    for name, value in signature.defaults.items():
        if name in axes:
            if value.shape[axes[name]] != 1:
                raise ImportedModelError(
                    f"the state {name!r}: expected a default value for a batch of 1, got "
                    f"{list(value.shape)}; export it for one row, or give `--initial {name}=FILE`"
                )
            values[name] = np.take(value, 0, axis=axes[name])
    return values


def _initial_from_options(options: OnnxOptions) -> dict[str, NDArray[Any]]:
    values: dict[str, NDArray[Any]] = {}
    for name, value in options.initial.items():
        if isinstance(value, str):
            try:
                stream = io.BytesIO(base64.b64decode(value))
                values[name] = np.lib.format.read_array(stream, allow_pickle=False)
            except ValueError as error:
                raise ImportedModelError(
                    f"--initial {name}: expected a number or a .npy file, got {error}"
                ) from error
        else:
            values[name] = np.asarray(value)
    return values


def _initial_values(
    layout: StateSpec, initial: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """The values in shape and dtype of their parts, without those that are zero."""
    parts = {part.name: part for part in layout.parts}
    values = {}
    for name, value in initial.items():
        if name not in parts:
            raise ImportedModelError(
                f"--initial {name}: expected a state input, one of {sorted(parts)}"
            )
        values[name] = _initial_value(parts[name], value)
    return {name: value for name, value in values.items() if value.any()}


def _initial_value(part: StatePart, value: NDArray[Any]) -> NDArray[Any]:
    dtype: Dtype = part.dtype
    if value.ndim and value.size == part.size:
        value = value.reshape(part.shape)
    if value.ndim and value.shape != part.shape:
        raise ImportedModelError(
            f"--initial {part.name}: expected one value or shape {list(part.shape)} (a state "
            f"without its batch axis), got {list(value.shape)}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        cast = value.astype(dtype)
    if not np.isfinite(cast).all() or (
        not dtype.startswith("float") and not np.array_equal(cast, value)
    ):
        raise ImportedModelError(
            f"--initial {part.name}: expected finite values of {dtype}, got {value.dtype} "
            f"{value.ravel()[:3].tolist()}"
        )
    return np.ascontiguousarray(np.broadcast_to(cast, part.shape))


def _notes(signature: Signature, outputs: Any) -> list[str]:
    dtypes = {tensor.name: tensor.dtype for tensor in signature.outputs}
    return [
        f"the output {output.name!r} is {dtypes[output.name]}; replies contain float32"
        for output in outputs
        if dtypes[output.name] not in ("float32", "float16", "bool", "int8", "uint8")
    ]
