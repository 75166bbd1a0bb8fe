"""Limits of a request; see the settings of the same names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

LONG_BYTES: Final = 64 * 1024
"""Bodies of this length or more are read in blocks, so that other requests run in between."""


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """Caps on requests.

    Attributes:
        max_body_bytes: largest body.
        max_chunk_steps: most events in one chunk; `of_model` lowers it to the limit of a model.
        max_predict_steps: most events in one predict request, all sequences together.
        max_items: most items in a request for many streams, most sequences to predict and
            most names on one page of a listing.
        max_forecast_samples: most paths of one forecast.
        timeout_s: deadline of a request without Carry-Timeout.
        max_timeout_s: longest deadline that a request may ask for.
    """

    max_body_bytes: int = 16 * 2**20
    max_chunk_steps: int = 10_000
    max_predict_steps: int = 100_000
    max_items: int = 1_000
    max_forecast_samples: int = 1_000
    timeout_s: float = 30.0
    max_timeout_s: float = 300.0

    @property
    def max_waiting_bytes(self) -> int:
        """Maximum bytes of long bodies that wait for validation in one worker."""
        return 8 * self.max_body_bytes

    def effective_timeout_s(self, requested_s: float | None) -> float:
        """The timeout of a request with this Carry-Timeout (None: without the header)."""
        return self.timeout_s if requested_s is None else min(requested_s, self.max_timeout_s)

    def of_model(self, chunk_limit: int | None) -> ApiLimits:
        """The limits for a model that accepts chunks of at most `chunk_limit` steps (None: any)."""
        if chunk_limit is None or chunk_limit >= self.max_chunk_steps:
            return self
        return replace(self, max_chunk_steps=chunk_limit)
