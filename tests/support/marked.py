"""Streams that were loaded from a history, with marks of how far their source is in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.spec.state import State
from service.core.values import Feed, SourceMark, StreamHead, StreamKey, StreamState
from service.store.base import COMMITTED, CommitColumns, Store
from service.store.codec import encode_state
from service.store.source_mark import parse_offset
from tests.support.oracle import oracle_step
from tests.support.pipelines import oracle_outputs


def mark_of(source: str, entry_id: bytes) -> SourceMark:
    """The mark of an entry of a topic."""
    return SourceMark(source, *parse_offset(entry_id.decode()))


def stream_after(
    artifact: Artifact, rows: NDArray[np.float32], mark: SourceMark | None
) -> StreamState:
    """The state after rows of the probe model, by the oracle, as a backfill writes it."""
    zero = artifact.state.zero()
    state = oracle_step(artifact.spec, artifact.weights, rows, zero.floats)[1]
    return StreamState(
        head=StreamHead(b"loaded--", b"tag-of-a-history", len(rows)),
        feed=Feed.INPUTS,
        fingerprint=artifact.fingerprint,
        last=None,
        updated_ms=0,
        state=State(state.astype(np.float32), zero.ints),
        source=mark,
    )


async def create_streams(store: Store, streams: Mapping[str, StreamState]) -> None:
    """Write streams of the probe model, none of which exists."""
    keys = [StreamKey("probe", name) for name in streams]
    values = list(map(encode_state, streams.values()))
    nothing = [b""] * len(keys)
    results = await store.commit(CommitColumns(keys, nothing, values, nothing))
    assert results == [COMMITTED] * len(keys)


def assert_continued(
    artifact: Artifact,
    found: list[tuple[int, dict[str, Any]]],
    rows: NDArray[np.float32],
    start: int,
) -> None:
    """The outputs of a stream are each event's from a position on, once and in order, and equal the
    oracle over all rows."""
    assert [position for position, _ in found] == [*range(start, len(rows))]
    packed = [np.concatenate([np.ravel(value) for value in each.values()]) for _, each in found]
    expected = oracle_outputs(artifact, rows)[start:]
    np.testing.assert_allclose(packed, expected, rtol=1e-5, atol=1e-5)
