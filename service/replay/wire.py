"""Bodies and answers of the service, as a client sees them.

A client's own reading of the protocol: nothing is shared with the service but the codes of
its problems. An answer is a `Reply` or a `Problem`; a request that got no answer at all is
the problem `no_answer`, which may be sent again like any other retryable one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import ormsgpack
from numpy.typing import NDArray

from models.spec.layout import OutputSpec
from service.replay.options import Format, ReplayError

FloatRows = NDArray[np.float32]

CONTENT_TYPES: Mapping[Format, str] = {"json": "application/json", "msgpack": "application/msgpack"}
NO_ANSWER = "no_answer"
AHEAD = "position_ahead"
BEHIND = "position_behind"
APPLIED = "already_applied"
STANDING = (AHEAD, BEHIND, APPLIED)
"""Codes that say where the stream stands instead: go on from there."""

_BUSY_STATUSES = (429, 502, 503, 504)


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """One chunk's answer.

    Attributes:
        position: of the stream after the chunk.
        outputs: float32 [T, O], packed by the model's output layout.
    """

    stream: str
    epoch: str
    tag: str
    position: int
    replayed: bool
    outputs: FloatRows


@dataclass(frozen=True, slots=True)
class Problem:
    """A refusal, a failure, or no answer.

    Attributes:
        status: the HTTP status; 0 where none came.
        position: where the stream stands, if the problem says so.
        retry_after_s: how long the service asks to be left alone.
    """

    status: int
    code: str
    detail: str
    retryable: bool
    position: int | None = None
    retry_after_s: float = 0.0


Answer = Reply | Problem


def dumps(encoding: Format, value: Any) -> bytes:
    """The bytes of a body."""
    return orjson.dumps(value) if encoding == "json" else ormsgpack.packb(value)


def loads(content_type: str, body: bytes) -> Any:
    """The value of an answer's body; None where it is neither JSON nor MessagePack."""
    try:
        if content_type.startswith("application/msgpack"):
            return ormsgpack.unpackb(body)
        return orjson.loads(body)
    except ValueError:
        return None


def no_answer(detail: str) -> Problem:
    """What a broken connection or a timeout comes to."""
    return Problem(0, NO_ANSWER, detail, retryable=True)


def read_problem(status: int, value: Any) -> Problem:
    """A problem document, or whatever else came with a status of 400 and above."""
    given = value if isinstance(value, dict) else {}
    position, retry_after_s = given.get("position"), given.get("retry_after_s")
    return Problem(
        status=status,
        code=str(given.get("code", f"status_{status}")),
        detail=str(given.get("detail", "no problem document came with it")),
        retryable=bool(given.get("retryable", status in _BUSY_STATUSES)),
        position=position if isinstance(position, int) else None,
        retry_after_s=retry_after_s if isinstance(retry_after_s, (int, float)) else 0.0,
    )


def read_reply(layout: OutputSpec, value: Any, steps: int) -> Reply:
    """One chunk's reply.

    Args:
        layout: the model's outputs.
        value: the decoded body, or one item of it.
        steps: T, events in the chunk.

    Raises:
        ReplayError: it is not a reply to T events of that model.
    """
    try:
        return Reply(
            stream=str(value["stream"]),
            epoch=str(value["epoch"]),
            tag=str(value["tag"]),
            position=int(value["position"]),
            replayed=bool(value["replayed"]),
            outputs=packed(layout, value["outputs"], steps),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ReplayError(
            f"the service's reply cannot be read ({type(error).__name__}: {error}): "
            f"{str(value)[:200]}"
        ) from error


def packed(layout: OutputSpec, outputs: Mapping[str, Any], steps: int) -> FloatRows:
    """Named outputs [T, ...] side by side in rows [T, O]; ValueError for another shape.

    An output that holds once for the whole chunk stands in each of its rows.
    """
    rows = np.empty((steps, layout.size), np.float32)
    for output in layout.outputs:
        values = np.asarray(outputs[output.name], np.float32)
        shape = output.shape if output.per == "chunk" else (steps, *output.shape)
        if values.shape != shape:
            raise ValueError(
                f"output {output.name!r}: expected shape {list(shape)}, got {list(values.shape)}"
            )
        rows[:, layout.slices[output.name]] = values.reshape(-1, output.size)
    return rows


def read_items(layout: OutputSpec, value: Any, steps: Sequence[int]) -> list[Answer]:
    """The outcomes of a request for many streams, in its order.

    Raises:
        ReplayError: it is not an answer to that many items.
    """
    items = value.get("results") if isinstance(value, dict) else None
    if not isinstance(items, list) or len(items) != len(steps):
        raise ReplayError(f"expected {len(steps)} results in one reply, got {str(value)[:200]}")
    return [_read_item(layout, item, count) for item, count in zip(items, steps, strict=True)]


def _read_item(layout: OutputSpec, item: Any, steps: int) -> Answer:
    if not isinstance(item, dict):
        raise ReplayError(f"expected results that are objects, got {str(item)[:200]}")
    if "error" in item:
        return read_problem(int(item.get("status", 500)), item["error"])
    return read_reply(layout, item.get("reply"), steps)
