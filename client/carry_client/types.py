"""Types of the public signatures: JSON values, inputs, and the head of a stream."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing import TypeAlias

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
"""A value of JSON."""

Encoding = Literal["json", "msgpack"]
"""How bodies are encoded."""

FloatArray: TypeAlias = NDArray[np.float32]

Event: TypeAlias = Mapping[str, object]
"""One event: values by field. A timestamp is epoch milliseconds, an RFC 3339 string with an offset,
or an aware `datetime`; None stands for an absent value."""


class PolarsFrame(Protocol):
    """A Polars DataFrame."""

    def to_dicts(self) -> list[dict[str, Any]]: ...

    def __len__(self) -> int: ...


class PandasFrame(Protocol):
    """A pandas DataFrame."""

    @property
    def iloc(self) -> Any: ...

    def __len__(self) -> int: ...


Columns: TypeAlias = Mapping[str, Sequence[object] | NDArray[np.generic]]
"""T values of each field: lists or arrays. NaN stands for an absent value."""

Events: TypeAlias = Sequence[Event] | Columns | PolarsFrame | PandasFrame | NDArray[np.generic]
"""T events: a list of events, a dict of columns, or a DataFrame with a column for each field; or
rows of encoded values for the model's `inputs`, an array [T, F]."""

Source: TypeAlias = Events | Iterable[Event] | Iterable[Events]
"""Events in order: all at once, or an iterable of events or of blocks of events."""

AsyncSource: TypeAlias = Source | AsyncIterable[Event] | AsyncIterable[Events]
"""The same, or an asynchronous iterable."""

ReplayFrom: TypeAlias = Callable[[int], Source]
AsyncReplayFrom: TypeAlias = Callable[[int], AsyncSource]
"""Given a position, the stream's events from there on."""


class Head(NamedTuple):
    """The head of a stream.

    Attributes:
        position: how many events the stream has consumed.
        epoch: 16 hex digits of the stream's incarnation; empty if the stream does not exist.
        tag: 32 hex digits of its history.
    """

    position: int = 0
    epoch: str = ""
    tag: str = ""

    @property
    def etag(self) -> str:
        """The value that `If-Match` takes."""
        return f'"{self.epoch}-{self.tag}"'


@dataclass(frozen=True)
class Progress:
    """How far `send_all` is.

    Attributes:
        position: of the stream.
        total: the position at the end of the source; None if its length is unknown.
        chunks: applied chunks.
        retries: failed attempts.
        rollbacks: how often the service had lost events, which were sent again.
        skipped: events whose outputs are lost, because their reply was lost and no longer stored.
        elapsed_s: since the first chunk.
    """

    position: int
    total: int | None
    chunks: int = 0
    retries: int = 0
    rollbacks: int = 0
    skipped: int = 0
    elapsed_s: float = 0.0
