"""How much of the history of its streams a model keeps in the store."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from models.events.schema import Frozen

MAX_HISTORY_EVENTS: Final = 65_536
DEFAULT_SNAPSHOTS: Final = 8
MIN_SNAPSHOTS: Final = 2
MAX_SNAPSHOTS: Final = 64


class HistorySpec(Frozen):
    """The history of each stream; no part of the fingerprint.

    Attributes:
        events: how many of the last events are kept as they came; a chunk is kept as a whole.
        snapshots: most states that are kept, each at an earlier position: dense near the end, and
            sparse behind.
    """

    events: Annotated[int, Field(ge=1, le=MAX_HISTORY_EVENTS)]
    snapshots: Annotated[int, Field(ge=MIN_SNAPSHOTS, le=MAX_SNAPSHOTS)] = DEFAULT_SNAPSHOTS


def parse_history_events(value: str) -> dict[str | None, int]:
    """Parse the numbers of events to keep: `N` for all models, or `MODEL=N,MODEL=N`.

    Returns:
        The number by model; of all models by None.

    Raises:
        ValueError: a part has another form, or names a model again.
    """
    events: dict[str | None, int] = {}
    for part in value.split(",") if value.strip() else []:
        name, equals, text = part.strip().rpartition("=")
        model = name if equals else None
        if model == "" or model in events or not text.isdecimal() or int(text) > MAX_HISTORY_EVENTS:
            raise ValueError(
                f"expected N or MODEL=N, each model once, with a whole number up to "
                f"{MAX_HISTORY_EVENTS:,} (at {part.strip()!r})"
            )
        events[model] = int(text)
    return events
