"""What calls return: outputs, forecasts and states as NumPy arrays, and as DataFrames if asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from carry_client.description import ModelDescription, Output
from carry_client.errors import Problem
from carry_client.types import FloatArray, Head

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

Column = NDArray[np.generic]


class Table(ABC):
    """Values that can be written as a table."""

    @abstractmethod
    def to_columns(self) -> dict[str, Column]:
        """The values as columns of one length.

        A value of several numbers has a column for each, `delay[0.5]` by its label or `x[1]`.
        """

    def to_pandas(self) -> pd.DataFrame:
        """The columns of `to_columns` as a pandas DataFrame; ImportError without pandas."""
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise _missing(error, "pandas") from error
        return pd.DataFrame(self.to_columns())

    def to_polars(self) -> pl.DataFrame:
        """The columns of `to_columns` as a Polars DataFrame; ImportError without Polars."""
        try:
            import polars as pl
        except ModuleNotFoundError as error:
            raise _missing(error, "polars") from error
        return pl.DataFrame(self.to_columns())


@dataclass(frozen=True, eq=False)
class Prediction(Table):
    """Outputs of a sequence of events.

    Attributes:
        outputs: by name, float32 [T, ...], one row an event; [...] of the last event alone with
            `return_sequences=False`, and of an output that the model has once for a whole chunk;
            strings for an output of categories.
        state: the state after the last event, with `return_state=True`.
        attention: with `return_attention=True`, by layer the weight of each step, float32 [T].
        first_position: the position of the first row's event.
        state_token: of a predicted sequence with `return_state_token=True`, its last state, signed.
    """

    outputs: dict[str, NDArray[Any]]
    state: dict[str, Column] | None
    attention: dict[str, FloatArray] | None
    first_position: int
    layout: tuple[Output, ...]
    state_token: bytes | None

    def __len__(self) -> int:
        """T, or 1 if all outputs are those of the last event."""
        for output in self.layout:
            if not output.is_per_chunk and self.outputs[output.name].ndim > len(output.shape):
                return len(self.outputs[output.name])
        return 1

    def to_columns(self) -> dict[str, Column]:
        """`position` int64 [T], the outputs float32 or strings [T]; one that holds once is
        repeated."""
        rows = len(self)
        columns: dict[str, Column] = {"position": self.first_position + np.arange(rows)}
        for output in self.layout:
            values = self.outputs[output.name]
            names = output.column_names()
            wide = np.broadcast_to(values, (rows, *output.shape)).reshape(rows, len(names))
            columns.update(zip(names, wide.T, strict=True))
        return columns


@dataclass(frozen=True, eq=False)
class Reply(Prediction):
    """The reply to a chunk.

    Attributes:
        stream: the stream's name.
        head: of the stream after the chunk.
        version: of the model that computed it.
        is_replayed: the chunk was applied before, and this is its stored reply.
        is_created: the chunk created the stream.
        warm: after a change of the model's version, how many events that one had seen before the
            chunk, and after how many its start is forgotten; None if it does not matter.
    """

    stream: str
    head: Head
    version: str
    is_replayed: bool
    is_created: bool
    warm: tuple[int, int] | None = None

    @property
    def position(self) -> int:
        """The stream's position after the chunk."""
        return self.head.position


@dataclass(frozen=True)
class Series:
    """The forecast of one field, H steps ahead.

    Attributes:
        point: medians, float32 [H], each fed back to decode the next.
        quantiles: float32 [H, Q].
        paths: S drawn paths, float32 [S, H].
    """

    point: FloatArray
    quantiles: FloatArray
    paths: FloatArray


@dataclass(frozen=True, eq=False)
class Forecast(Table):
    """A forecast, H steps ahead.

    Attributes:
        head: of the stream whose state it starts from.
        times_ms: int64 [H], epoch milliseconds; None if the model's steps have no time.
        levels: of the quantiles, Q numbers from 0 to 1.
        series: by field.
    """

    stream: str
    head: Head
    times_ms: NDArray[np.int64] | None
    levels: tuple[float, ...]
    series: dict[str, Series]

    def to_columns(self) -> dict[str, Column]:
        """`step` int64 [H] from 1, `time_ms`, and each field's medians and quantiles."""
        columns: dict[str, Column] = {}
        for name, series in self.series.items():
            columns.setdefault("step", np.arange(1, len(series.point) + 1))
            if self.times_ms is not None:
                columns.setdefault("time_ms", self.times_ms)
            columns[name] = series.point
            for at, level in enumerate(self.levels):
                columns[f"{name}[{level}]"] = series.quantiles[:, at]
        return columns


@dataclass(frozen=True, eq=False)
class StreamState:
    """The state of a stream, with everything that restores it.

    Attributes:
        fingerprint: of the model that wrote it.
        feed: `events` or `inputs`.
        values: by name: float32, or float64 for values that float32 does not hold; int64; bool.
        since: position since which the version has computed it; None if it has seen the start.
    """

    model: str
    stream: str
    head: Head
    fingerprint: str
    feed: str
    values: dict[str, Column]
    since: int | None = None


@dataclass(frozen=True)
class StreamInfo:
    """A stream.

    Attributes:
        version, fingerprint: of the model that wrote its state.
        feed: `events` or `inputs`.
        updated_ms: when the last chunk was applied, epoch milliseconds.
        state_bytes: size of the state.
    """

    model: str
    stream: str
    head: Head
    version: str
    fingerprint: str
    feed: str
    updated_ms: int
    state_bytes: int


@dataclass(frozen=True, eq=False)
class KeptChunk:
    """Events of one chunk as they were sent.

    Attributes:
        position: of the first event.
        events: a list of events, or float32 rows [T, F].
        resets: indexes of the events before which the client reset the state.
        is_final: whether it ended the stream.
    """

    position: int
    events: list[dict[str, Any]] | FloatArray
    resets: tuple[int, ...]
    is_final: bool


@dataclass(frozen=True, eq=False)
class StreamHistory:
    """What the service keeps of a stream's past.

    Attributes:
        available: ranges of the positions to which it can be rewound, first and last of each.
        snapshots: positions whose state is kept.
        start: position of the oldest event that is kept.
        chunks: the events that were asked for, oldest first.
        next: the position of the next events; None after the last.
    """

    model: str
    stream: str
    head: Head
    available: tuple[tuple[int, int], ...]
    snapshots: tuple[int, ...]
    start: int
    chunks: tuple[KeptChunk, ...]
    next: int | None


@dataclass(frozen=True)
class Alarm:
    """The open alarm of a stream. What may be None is so if the model keeps no record of alarms.

    Attributes:
        version: of the model, which wrote the state.
        opened_ms: when the chunk that opened it was stored, epoch milliseconds.
        opened: index of the event that opened it.
        events: events of the stream after that one.
        severity: nats of its most unusual event, as a multiple of those of the threshold.
        probability: of the stream's last event.
        target, channel: what was unusual in the event that opened it.
        cause: the same in words.
    """

    stream: str
    head: Head
    version: str
    opened_ms: int
    opened: int | None
    events: int | None
    severity: float | None
    probability: float | None
    target: str | None
    channel: str | None
    cause: str | None


@dataclass(frozen=True)
class ServedModel:
    """A model in the list of served models.

    Attributes:
        version: the first 12 digits of its fingerprint.
        input_features: F, values of one row of `inputs`.
        takes_events: whether it has an event schema.
        outputs: their names.
        runtime: the library that runs it, `onnxruntime` or `tensorflow`.
    """

    name: str
    version: str
    description: str
    input_features: int
    takes_events: bool
    outputs: tuple[str, ...]
    runtime: str = ""


def read_outputs(model: ModelDescription, document: Any, first_position: int) -> dict[str, Any]:
    """The members of a `Prediction`; ValueError, TypeError or KeyError if they cannot be read."""
    values = document["outputs"]
    if set(values) != {output.name for output in model.outputs}:
        raise ValueError(f"expected outputs of version {model.version}, got {sorted(values)}")
    attention = document.get("attention")
    return {
        "outputs": {each.name: _read_output(each, values[each.name]) for each in model.outputs},
        "state": _read_state(document["state"]) if "state" in document else None,
        "attention": None
        if attention is None
        else {name: np.asarray(weights, np.float32) for name, weights in attention.items()},
        "first_position": first_position,
        "layout": model.outputs,
        "state_token": _read_token(document.get("state_token")),
    }


def _read_token(token: Any) -> bytes | None:
    return b64decode(token) if isinstance(token, str) else token


def read_reply(model: ModelDescription, document: Any, first_position: int) -> Reply:
    """The reply to a chunk out of its document.

    Args:
        first_position: of the event that the first output belongs to.

    Raises:
        Problem: `unreadable_reply`.
    """
    try:
        return Reply(
            **read_outputs(model, document, int(document.get("output_position", first_position))),
            stream=str(document["stream"]),
            head=_head(document),
            version=str(document["version"]),
            is_replayed=bool(document["replayed"]),
            is_created=bool(document.get("created")),
            warm=_read_warmth(document.get("warm")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(error, document) from error


def _read_warmth(warm: Any) -> tuple[int, int] | None:
    return None if warm is None else (int(warm["events"]), int(warm["of"]))


def read_forecast(document: Any) -> Forecast:
    """A forecast out of its document; Problem if it cannot be read."""
    try:
        times = document.get("times_ms")
        return Forecast(
            stream=str(document["stream"]),
            head=_head(document),
            times_ms=None if times is None else np.asarray(times, np.int64),
            levels=tuple(document["levels"]),
            series={
                name: Series(
                    np.asarray(each["point"], np.float32),
                    np.asarray(each["quantiles"], np.float32),
                    np.asarray(each.get("paths", ()), np.float32).reshape(-1, len(each["point"])),
                )
                for name, each in document["forecast"].items()
            },
        )
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(error, document) from error


def read_state(document: Any) -> StreamState:
    """A state out of its document; Problem if it cannot be read."""
    try:
        return StreamState(
            model=str(document["model"]),
            stream=str(document["stream"]),
            head=_head(document),
            fingerprint=str(document["fingerprint"]),
            feed=str(document["feed"]),
            values=_read_state(document["state"]),
            since=document.get("since"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(error, document) from error


def read_info(document: Any) -> StreamInfo:
    """A stream out of its document; Problem if it cannot be read."""
    try:
        return StreamInfo(
            model=str(document["model"]),
            stream=str(document["stream"]),
            head=_head(document),
            version=str(document["version"]),
            fingerprint=str(document["fingerprint"]),
            feed=str(document["feed"]),
            updated_ms=int(document["updated_ms"]),
            state_bytes=int(document["state_bytes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(error, document) from error


def read_history(document: Any) -> StreamHistory:
    """A history out of its document; Problem if it cannot be read."""
    try:
        return StreamHistory(
            model=str(document["model"]),
            stream=str(document["stream"]),
            head=_head(document),
            available=tuple((int(first), int(last)) for first, last in document["available"]),
            snapshots=tuple(map(int, document["snapshots"])),
            start=int(document["start"]),
            chunks=tuple(map(_read_kept_chunk, document["chunks"])),
            next=None if document["next"] is None else int(document["next"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(error, document) from error


def read_alarm(document: Any) -> Alarm:
    """An open alarm out of its document; Problem if it cannot be read."""
    try:
        known = {name: document[name] for name in Alarm.__dataclass_fields__ if name != "head"}
        return Alarm(head=_head(document), **known)
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(error, document) from error


def read_head(document: Any) -> Head:
    """The stream head in a document; Problem if it cannot be read."""
    try:
        return _head(document)
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(error, document) from error


def _missing(error: ModuleNotFoundError, library: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"to_{library}() needs {error.name}: pip install {library}", name=error.name
    )


def _head(document: Mapping[str, Any]) -> Head:
    # epoch and tag are null in a dry run of a stream that does not exist
    epoch, tag = document["epoch"] or "", document["tag"] or ""
    return Head(int(document["position"]), str(epoch), str(tag))


def unreadable(error: Exception, document: object) -> Problem:
    """The problem of a successful response that is not what the API describes."""
    detail = f"{type(error).__name__}: {error}: {str(document)[:200]}"
    return Problem(200, "unreadable_reply", detail)


def _read_output(output: Output, values: Any) -> NDArray[Any]:
    """float32 or names [T, ...], or [...] without a time axis; None stands for no step at all."""
    kind = np.str_ if output.categories else np.float32
    array = np.asarray([] if values is None else values, kind)
    if array.size == 0:
        return array.reshape(0, *output.shape)
    axes = array.ndim - len(output.shape)
    if axes not in (0, 1) or array.shape[axes:] != output.shape:
        shapes = f"expected {list(output.shape)} for each step, got {list(array.shape)}"
        raise ValueError(f"output {output.name!r}: {shapes}")
    return array


def _read_state(values: Mapping[str, Any]) -> dict[str, Column]:
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return {name: _exact(array) for name, array in arrays.items()}


def _exact(array: Column) -> Column:
    """Floats as float32 if it holds them all, else as float64; integers as int64."""
    if array.dtype.kind != "f":
        return array if array.dtype.kind == "b" else array.astype(np.int64)
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    return narrow if np.array_equal(narrow, array) else array


def _read_kept_chunk(document: Mapping[str, Any]) -> KeptChunk:
    events = document.get("events")
    if events is None:
        events = np.asarray(document["inputs"], np.float32)
    return KeptChunk(
        int(document["position"]),
        events,
        tuple(map(int, document.get("resets", ()))),
        bool(document.get("final", False)),
    )
