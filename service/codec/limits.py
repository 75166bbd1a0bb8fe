"""The limits of a model, with what clients and operators know them as."""

from __future__ import annotations

from typing import NamedTuple

from service.codec.settings import RequestSettings
from service.core.errors import ChunkTooLong


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
        """Those of a model that computes chunks of at most `chunk_limit` steps (None: any)."""
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
