"""A limit on the steps of a chunk or of sequences."""

from __future__ import annotations

from typing import NamedTuple

from service.core.errors import ChunkTooLong


class Limit(NamedTuple):
    """A limit on steps, and what clients and operators know it as."""

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
