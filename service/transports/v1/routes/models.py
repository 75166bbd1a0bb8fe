"""The served models: inputs, outputs, state and limits."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from models.events.parse import event_json_schema
from models.events.schema import CategoricalField, Column
from models.spec.decoder import DecoderSpec
from models.spec.detection import DetectionSpec
from models.spec.layout import Output
from service.codec.settings import ModelLimits, RequestSettings
from service.pipeline.served_model import ServedModel
from service.transports.v1.call import Call, query, reply_media
from service.transports.v1.context import api_of, caller_of
from service.transports.v1.replies import reply
from service.transports.v1.reply_types import (
    AlarmsInfo,
    BlocksInfo,
    ColumnInfo,
    ForecastInfo,
    ModelDetail,
    ModelList,
    ModelSummary,
    OutputInfo,
)


async def get_models(request: Request) -> Response:
    """List the models.

    A summary of every served model.
    """
    models = api_of(request).pipeline.describe(caller_of(request))
    query(request)
    answer = reply_media(request)
    document: ModelList = {"models": [_summary(served) for served in models.values()]}
    return reply(answer, document)


async def get_model(call: Call) -> Response:
    """Inputs, outputs, state and limits of a model.

    Event schema, columns of `inputs`, outputs, layout of the state, version and limits.
    """
    return call.reply(detail(call.served, call.api.limits))


def _summary(served: ServedModel) -> ModelSummary:
    return {
        "name": served.name,
        "version": served.version,
        "description": served.artifact.spec.description,
        "input_features": served.input_features,
        "events": served.events is not None,
        "outputs": [output.name for output in served.outputs.outputs],
        "runtime": served.runtime.name,
    }


def detail(served: ServedModel, limits: RequestSettings) -> ModelDetail:
    """All that a client needs to know of a model."""
    schema = served.events
    return {
        "name": served.name,
        "version": served.version,
        "fingerprint": served.fingerprint.hex(),
        "description": served.artifact.spec.description,
        "input_features": served.input_features,
        "columns": [_column(served, column) for column in served.artifact.spec.columns],
        "events": None if schema is None else event_json_schema(schema),
        "outputs": {output.name: _output(output) for output in served.outputs.outputs},
        "state": {
            part.name: {"shape": list(part.shape), "dtype": part.dtype}
            for part in served.state.parts
        },
        "attention": list(served.outputs.attention),
        "chunking": served.artifact.spec.chunking,
        "blocks": _blocks(served),
        "max_chunk_steps": served.chunk_limit,
        "reset_every": served.artifact.spec.reset_every,
        "session_gap_s": served.artifact.spec.session_gap_s,
        "runtimes": [served.runtime.name],
        "forecast": _forecast(served.artifact.spec.decoder),
        "alarms": _alarms(served.artifact.spec.detection),
        "limits": {
            "max_body_bytes": limits.max_body_bytes,
            "max_chunk_steps": ModelLimits.of(limits, served.chunk_limit).chunk.steps,
            "max_predict_steps": limits.max_predict_steps,
            "max_items": limits.max_items,
            "max_forecast_samples": limits.max_forecast_samples,
        },
        "metrics": dict(served.artifact.manifest.get("metrics") or {}),
    }


def _output(output: Output) -> OutputInfo:
    document: OutputInfo = {
        "shape": list(output.shape),
        "per": output.per,
        "labels": list(output.labels),
    }
    if output.categories_of:
        document["categories_of"] = output.categories_of
    return document


def _blocks(served: ServedModel) -> BlocksInfo | None:
    blocks = served.artifact.spec.blocks
    return None if blocks is None else {"size": blocks.size, "lookahead": blocks.lookahead}


def _alarms(detection: DetectionSpec | None) -> AlarmsInfo | None:
    if detection is None or detection.fit is None:
        return None
    return {
        "output": f"{detection.head}.alarm",
        "false_alarms_per_day": detection.alarm.false_alarms_per_day,
        "max_false_alarms_per_day": detection.fit.rates[-1],
    }


def _forecast(decoder: DecoderSpec | None) -> ForecastInfo | None:
    if decoder is None:
        return None
    return {
        "targets": list(decoder.targets),
        "known": list(decoder.known),
        "step_s": decoder.step_s,
        "levels": list(decoder.head.quantiles),
        "max_horizon": decoder.max_horizon,
    }


def _column(served: ServedModel, column: Column) -> ColumnInfo:
    document: ColumnInfo = {"name": column.name, "field": column.field}
    if column.codes is not None:
        document["codes"] = column.codes
    if column.field is not None and served.events is not None:
        field = served.events.field(column.field)
        if isinstance(field, CategoricalField):
            document["labels"] = list(field.labels)
    return document
