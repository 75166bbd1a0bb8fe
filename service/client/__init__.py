"""HTTP client of a Carry service: one attempt a call, retries with backoff, streams by position.

Nothing of `service` or `models` is imported here; it will become a distribution of its own.
"""

from service.client.description import Field, ModelDescription, Output, read_description
from service.client.http import AsyncCarry, Carry, encode_body, model_path, stream_path
from service.client.problem import POSITION_CODES, Problem, read_problem, read_response
from service.client.retry import Retry
from service.client.stream import Stream

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
