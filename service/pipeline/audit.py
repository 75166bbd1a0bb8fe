"""What the use cases report to the audit log: changes of streams other than by their chunks."""

from __future__ import annotations

from typing import Any, Protocol


class Audit(Protocol):
    """Writes one line about a change that was made; never raises."""

    def __call__(
        self, change: str, /, *, model: str, stream: str | None = None, **facts: Any
    ) -> None:
        """Record a change.

        Args:
            change: `stream_deleted`, `streams_deleted`, `state_written` or `stream_forked`.
            stream: the stream, or the prefix of several.
            facts: further members of the line.
        """


def no_audit(change: str, /, **facts: Any) -> None:
    """Record nothing."""
