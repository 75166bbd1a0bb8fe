"""How much one request may ask for; see the settings of the same names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """Caps on requests.

    Attributes:
        max_body_bytes: largest body.
        max_chunk_steps: most events in one chunk.
        max_predict_steps: most events in one predict request, all sequences together.
        max_items: most items in a request for many streams, most sequences to predict and
            most names on one page of a listing.
    """

    max_body_bytes: int = 16 * 2**20
    max_chunk_steps: int = 10_000
    max_predict_steps: int = 100_000
    max_items: int = 1_000
