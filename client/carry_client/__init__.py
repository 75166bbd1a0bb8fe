"""Client of Carry: sends streams of events to recurrent networks, each event applied once."""

from carry_client import errors
from carry_client.aio import AsyncCarry, AsyncModel
from carry_client.aio_stream import AsyncStream
from carry_client.description import Field, ModelDescription, Output, read_description
from carry_client.errors import (
    POSITION_CODES,
    CarryError,
    NoAnswer,
    Problem,
    StreamDiverged,
    StreamMoved,
    StreamRolledBack,
    read_problem,
)
from carry_client.producer import Producer
from carry_client.replies import (
    Alarm,
    Forecast,
    KeptChunk,
    Prediction,
    Reply,
    Series,
    ServedModel,
    StreamHistory,
    StreamInfo,
    StreamState,
)
from carry_client.retry import Retry
from carry_client.sync import Carry, Model
from carry_client.sync_stream import Stream
from carry_client.types import (
    AsyncSource,
    Columns,
    Encoding,
    Event,
    Events,
    Head,
    Json,
    Progress,
    Source,
)
from carry_client.wire import encode_body, model_path, read_response, stream_path

__all__ = [
    "POSITION_CODES",
    "Alarm",
    "AsyncCarry",
    "AsyncModel",
    "AsyncSource",
    "AsyncStream",
    "Carry",
    "CarryError",
    "Columns",
    "Encoding",
    "Event",
    "Events",
    "Field",
    "Forecast",
    "Head",
    "Json",
    "KeptChunk",
    "Model",
    "ModelDescription",
    "NoAnswer",
    "Output",
    "Prediction",
    "Problem",
    "Producer",
    "Progress",
    "Reply",
    "Retry",
    "Series",
    "ServedModel",
    "Source",
    "Stream",
    "StreamDiverged",
    "StreamHistory",
    "StreamInfo",
    "StreamMoved",
    "StreamRolledBack",
    "StreamState",
    "encode_body",
    "errors",
    "model_path",
    "read_description",
    "read_problem",
    "read_response",
    "stream_path",
]
