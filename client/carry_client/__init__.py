"""Client of Carry: sends streams of events to recurrent networks, each event applied once."""

from carry_client.description import Field, ModelDescription, Output, read_description
from carry_client.http import AsyncCarry, Carry, encode_body, model_path, stream_path
from carry_client.problem import POSITION_CODES, Problem, read_problem, read_response
from carry_client.retry import Retry
from carry_client.stream import Stream

__all__ = [
    "POSITION_CODES",
    "AsyncCarry",
    "Carry",
    "Field",
    "ModelDescription",
    "Output",
    "Problem",
    "Retry",
    "Stream",
    "encode_body",
    "model_path",
    "read_description",
    "read_problem",
    "read_response",
    "stream_path",
]
