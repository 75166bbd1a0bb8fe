"""Streams of a model with blocks that another version wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.spec.history import HistorySpec
from models.spec.model import parse_spec
from service.access.caller import ANYONE
from service.core.delivery import chunk_digest
from service.core.errors import StateIncompatible, StreamFinal
from service.core.values import Chunk, Feed, Steps, StreamKey
from tests.support.oracle import contracting_weights, oracle_step
from tests.support.pipelines import rows_of, worker

ALL = HistorySpec(events=1000)

Versions = tuple[Artifact, Artifact]

BLOCKS = parse_spec(
    {
        "name": "blocks",
        "features": 3,
        "layers": [{"kind": "bidirectional", "cell": "lstm", "units": 3}],
        "heads": [{"kind": "dense", "name": "out", "units": 2}],
        "blocks": {"size": 4, "lookahead": 3},
    }
)


def block_chunk(rows: NDArray[np.float32], start: int, *, final: bool = False) -> Chunk:
    steps = Steps(Feed.INPUTS, len(rows), rows=rows)
    digest = chunk_digest(None, steps, final=final)
    return Chunk(StreamKey("blocks", "s"), steps, digest, start, final=final)


def block_outputs(artifact: Artifact, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """The outputs of complete blocks of rows that begin with one."""
    state: Any = artifact.state.zero().floats[: artifact.network_state.float_size]
    outputs = []
    for start in range(0, len(rows) - 6, 4):
        found, state = oracle_step(BLOCKS, artifact.weights, rows[start : start + 7], state)
        outputs.append(found)
    return np.concatenate(outputs)


@pytest.fixture(scope="module")
def block_versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    folder = tmp_path_factory.mktemp("blocks")
    one, other = (
        write_artifact(folder / str(seed), BLOCKS, contracting_weights(BLOCKS, seed))
        for seed in (1, 2)
    )
    return one, other


@pytest.mark.parametrize(("events", "since"), [(1000, 0), (12, 16)])
async def test_blocks_start_where_a_block_does(
    store_url: str, block_versions: Versions, events: int, since: int
) -> None:
    old, new = block_versions
    history = HistorySpec(events=events)
    rows = rows_of(np.random.default_rng(13), 48)
    async with (
        worker(store_url, old, history=history) as before,
        worker(store_url, new, history=history) as after,
    ):
        for start in range(0, 26, 2):
            await before.process(ANYONE, block_chunk(rows[start : start + 2], start))
        reply = await after.process(ANYONE, block_chunk(rows[26:], 26))
    # at 26, the blocks before event 20 are computed
    assert reply.output_position == 20
    expected = block_outputs(new, rows[since:])[20 - since :]
    np.testing.assert_allclose(reply.outputs, expected, rtol=1e-4, atol=1e-5)


async def test_a_history_without_events_that_wait_for_their_block_is_rejected(
    store_url: str, block_versions: Versions
) -> None:
    old, new = block_versions
    history = HistorySpec(events=3)
    rows = rows_of(np.random.default_rng(14), 40)
    async with (
        worker(store_url, old, history=history) as before,
        worker(store_url, new, history=history) as after,
    ):
        for start in range(0, 26, 2):
            await before.process(ANYONE, block_chunk(rows[start : start + 2], start))
        with pytest.raises(StateIncompatible, match="wait for their block"):
            await after.process(ANYONE, block_chunk(rows[26:], 26))


async def test_a_closed_stream_stays_closed(store_url: str, block_versions: Versions) -> None:
    old, new = block_versions
    rows = rows_of(np.random.default_rng(15), 20)
    empty = np.zeros((0, 3), np.float32)
    async with (
        worker(store_url, old, history=ALL) as before,
        worker(store_url, new, history=ALL) as after,
    ):
        await before.process(ANYONE, block_chunk(rows, 0))
        ended = await before.process(ANYONE, block_chunk(empty, 20, final=True))
        again = await after.process(ANYONE, block_chunk(empty, 20, final=True))
        assert again.replayed
        np.testing.assert_array_equal(again.outputs, ended.outputs)
        with pytest.raises(StreamFinal):
            await after.process(ANYONE, block_chunk(rows, 20))
