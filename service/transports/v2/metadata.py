"""What V2 clients read about the server and its models, as JSON values, for HTTP and gRPC alike.

The members are those of Triton's messages (`ModelMetadataResponse`, `ModelConfig`, ...), so that
`google.protobuf.json_format.ParseDict` makes the gRPC messages from them. 64-bit integers are
numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import version as importlib_version
from typing import Any, Final

from models.spec.layout import Output
from service.access.caller import Caller, Verb
from service.pipeline.recorder import ModelStatistics
from service.pipeline.served_model import ServedModel
from service.transports.v2.inference import Inference
from service.transports.v2.replies import VERSION, output_shape
from service.transports.v2.request import EVENTS, INPUTS, input_names
from service.transports.v2.tensors import BYTES, FP32

Document = dict[str, Any]
Statistics = Callable[[], Mapping[str, ModelStatistics]]
"""Returns the totals of every model."""

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


class Metadata:
    """Documents about the server and its models; totals are those of all workers.

    Args:
        statistics: returns the totals of every model; called in a thread.

    Raises:
        Forbidden, ModelNotFound: each method that takes a caller.
    """

    def __init__(self, inference: Inference, statistics: Statistics):
        self._served = partial(inference.served, verbs=(Verb.MODELS,))
        self._pipeline = inference.api.pipeline
        self._max_items = inference.api.limits.max_items
        self._statistics = statistics

    async def live(self) -> Document:
        """Whether the process answers: always."""
        return {"live": True}

    async def ready(self) -> Document:
        """Whether requests should be sent here."""
        return {"ready": all(check.ok for check in await self._pipeline.readiness())}

    async def server(self, caller: Caller) -> Document:
        """Name, version and extensions of the server."""
        self._pipeline.describe(caller)
        return {"name": NAME, "version": importlib_version("carry"), "extensions": [*EXTENSIONS]}

    async def model(self, caller: Caller, model: str, version: str = "") -> Document:
        """The tensors of a model: `ModelMetadataResponse`. The first axis is that of the batch."""
        served = self._served(caller, model=model, version=version)
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

    async def model_ready(self, caller: Caller, model: str, version: str = "") -> Document:
        """Whether a model can be used."""
        served = self._served(caller, model=model, version=version)
        return {"name": served.name, **await self.ready()}

    async def config(self, caller: Caller, model: str, version: str = "") -> Document:
        """The configuration of a model: `ModelConfigResponse`.

        `sequence_batching` makes clients send sequence ids; a model that takes whole sequences
        only has none. `max_batch_size` is the most sequences of one stateless prediction.
        """
        served = self._served(caller, model=model, version=version)
        inputs = _inputs(served)
        config: Document = {
            "name": served.name,
            "platform": NAME,
            "backend": NAME,
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": self._max_items,
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
        return {"config": config}

    async def statistics(self, caller: Caller, model: str = "", version: str = "") -> Document:
        """Totals of a model, or of every model, since the start: `ModelStatisticsResponse`."""
        models: Iterable[ServedModel] = self._pipeline.describe(caller).values()
        if model:
            models = [self._served(caller, model=model, version=version)]
        totals = await asyncio.to_thread(self._statistics)
        none = ModelStatistics()
        return {
            "model_stats": [_statistics_of(each, totals.get(each.name, none)) for each in models]
        }

    async def index(self, caller: Caller) -> Document:
        """The served models, all of them ready: `RepositoryIndexResponse`."""
        return {
            "models": [
                {"name": name, "version": VERSION, "state": "READY", "reason": ""}
                for name in self._pipeline.describe(caller)
            ]
        }


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
