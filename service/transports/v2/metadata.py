"""What V2 clients read about the server and its models, as JSON values.

The members are those of Triton's messages (`ModelMetadataResponse`, `ModelConfig`, ...), so that
`google.protobuf.json_format.ParseDict` makes the gRPC messages from them. 64-bit integers are
numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, Final

from models.spec.layout import Output
from service.pipeline.recorder import ModelStatistics
from service.pipeline.served_model import ServedModel
from service.transports.v2.inference import VERSION
from service.transports.v2.request import EVENTS, INPUTS, input_names, output_shape
from service.transports.v2.tensors import BYTES, FP32

NAME: Final = "carry"

EXTENSIONS: Final = (
    "sequence",
    "sequence(string_id)",
    "binary_tensor_data",
    "parameters",
    "model_configuration",
    "model_repository",
    "statistics",
)

_CONFIG_TYPES: Final = {FP32: "TYPE_FP32", BYTES: "TYPE_STRING"}
_NS: Final = 10**9


def server_metadata() -> dict[str, Any]:
    """Name, version and extensions of the server."""
    return {"name": NAME, "version": version("carry"), "extensions": [*EXTENSIONS]}


def model_metadata(served: ServedModel) -> dict[str, Any]:
    """The tensors of a model: `ModelMetadataResponse`. The first axis is that of the batch."""
    return {
        "name": served.name,
        "versions": [VERSION],
        "platform": NAME,
        "inputs": [
            {"name": name, "datatype": datatype, "shape": [-1, *dims]}
            for name, datatype, dims in _inputs(served)
        ],
        "outputs": [
            {"name": output.name, "datatype": FP32, "shape": [-1, *_output_dims(output)]}
            for output in served.outputs.outputs
        ],
    }


def model_config(served: ServedModel, max_batch_size: int) -> dict[str, Any]:
    """The configuration of a model: `ModelConfig`.

    `sequence_batching` makes clients send sequence ids; a model that takes whole sequences only has
    none.

    Args:
        max_batch_size: most sequences of one stateless prediction.
    """
    inputs = _inputs(served)
    config: dict[str, Any] = {
        "name": served.name,
        "platform": NAME,
        "backend": NAME,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": max_batch_size,
        "input": [
            {
                "name": name,
                "data_type": _CONFIG_TYPES[datatype],
                "dims": dims,
                "optional": len(inputs) > 1,
            }
            for name, datatype, dims in inputs
        ],
        "output": [
            {"name": output.name, "data_type": "TYPE_FP32", "dims": _output_dims(output)}
            for output in served.outputs.outputs
        ],
        "parameters": {
            "carry_version": {"string_value": served.version},
            "carry_fingerprint": {"string_value": served.fingerprint.hex()},
        },
    }
    if served.artifact.spec.chunking != "whole":
        config["sequence_batching"] = {"oldest": {}}
    return config


def model_statistics(
    models: Iterable[ServedModel], statistics: Mapping[str, ModelStatistics]
) -> dict[str, Any]:
    """Totals of models since the start: `ModelStatisticsResponse`."""
    return {
        "model_stats": [
            _statistics_of(served, statistics.get(served.name, ModelStatistics()))
            for served in models
        ]
    }


def repository_index(models: Iterable[ServedModel]) -> list[dict[str, Any]]:
    """The served models: the elements of `RepositoryIndexResponse`."""
    return [
        {"name": served.name, "version": VERSION, "state": "READY", "reason": ""}
        for served in models
    ]


def _inputs(served: ServedModel) -> list[tuple[str, str, list[int]]]:
    """Name, datatype and shape without the axis of the batch of each tensor."""
    known = {EVENTS: (BYTES, [-1]), INPUTS: (FP32, [-1, served.input_features])}
    return [(name, *known[name]) for name in input_names(served)]


def _output_dims(output: Output) -> list[int]:
    """The shape of an output without the axis of the batch."""
    steps = [] if output.per == "chunk" else [-1]
    return [*steps, *output_shape(output)]


def _statistics_of(served: ServedModel, totals: ModelStatistics) -> dict[str, Any]:
    stages = {
        "queue": totals.queue_s,
        "compute_input": totals.load_s,
        "compute_infer": totals.infer_s,
        "compute_output": totals.commit_s,
    }
    return {
        "name": served.name,
        "version": VERSION,
        "last_inference": 0,
        "inference_count": totals.chunks,
        "execution_count": totals.batches,
        "inference_stats": {
            "success": _duration(totals.chunks, sum(stages.values())),
            "fail": _duration(totals.errors, 0),
            **{name: _duration(totals.chunks, seconds) for name, seconds in stages.items()},
            "cache_hit": _duration(0, 0),
            "cache_miss": _duration(0, 0),
        },
        "batch_stats": [],
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * _NS)}
