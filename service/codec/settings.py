"""Limits of requests, for every transport: as settings, and as they apply to one model."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field

from service.core.errors import ChunkTooLong
from service.core.settings import KIB, MIB, settings_group


@settings_group
class RequestSettings:
    """Limits of requests."""

    max_body_bytes: Annotated[int, Field(ge=KIB)] = 2 * MIB
    """Largest body of a request, in bytes."""

    max_chunk_steps: Annotated[int, Field(ge=1)] = 10_000
    """Maximum events in one chunk. A long chunk is computed in slices between other streams, so
    this bounds memory and the wait for its reply."""

    max_items: Annotated[int, Field(ge=1)] = 1_000
    """Maximum items in one request for many streams."""

    max_predict_steps: Annotated[int, Field(ge=1)] = 100_000
    """Maximum events in one predict request, all its sequences together."""

    max_forecast_samples: Annotated[int, Field(ge=0)] = 1_000
    """Maximum sample paths of one forecast; 0 forbids them. Each is a row of the network's calls at
    every step of the horizon, between other streams' chunks."""

    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Deadline of a request without `Carry-Timeout`, in seconds. Work that has not started by then
    is not started. Not longer than the clients' own timeout, nor than `CARRY_MAX_TIMEOUT_S`."""

    max_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 300.0
    """Longest deadline of any request, in seconds; it caps `Carry-Timeout`."""

    def effective_timeout_s(self, requested_s: float | None) -> float:
        """The timeout of a request with this Carry-Timeout (None: without the header)."""
        return self.timeout_s if requested_s is None else min(requested_s, self.max_timeout_s)


class Limit(NamedTuple):
    """A limit on the steps of a chunk or of sequences."""

    steps: int
    name: str

    def exceeded(self, at: str, got: int | str) -> ChunkTooLong:
        """The error for more steps than the limit."""
        return ChunkTooLong(
            f"{at}: expected at most {self.steps} steps ({self.name}), got {got}",
            at=at,
            expected=self.steps,
            got=got,
        )


class ModelLimits(NamedTuple):
    """The limits of a model: on the steps of a chunk, of a sequence and of all sequences of a
    request, on the items of a request, and on the sample paths of a forecast."""

    chunk: Limit
    sequence: Limit
    predict: Limit
    items: int
    samples: int

    @classmethod
    def of(cls, settings: RequestSettings, chunk_limit: int | None) -> ModelLimits:
        """The limits of a model that computes chunks of at most `chunk_limit` steps (None: any)."""
        predict = Limit(settings.max_predict_steps, "max_predict_steps")
        longest = [] if chunk_limit is None else [Limit(chunk_limit, "max_chunk_steps")]
        chunk = Limit(settings.max_chunk_steps, "max_chunk_steps")
        return cls(
            min([chunk, *longest]),
            min([predict, *longest]),
            predict,
            settings.max_items,
            settings.max_forecast_samples,
        )
