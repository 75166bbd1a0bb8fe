"""The history of a stream has the events as they came, by whatever transport they came."""

from __future__ import annotations

from typing import Any

import numpy as np
import ormsgpack

from models.spec.history import HistorySpec
from service.core.values import StreamKey
from service.store.history_codec import HistoryEntry
from tests.service.transports.v1.harness import EVENT, LATER, MSGPACK, Harness, rows
from tests.service.transports.v2.v2 import V2

ROWS = rows(6)


async def entries(api: Harness, model: str, stream: str) -> list[HistoryEntry]:
    """The decoded entries of a stream's history."""
    served = api.pipeline.models[model]
    found = await api.store.histories.read(StreamKey(model, stream), served.fingerprint)
    assert found.is_valid
    return list(map(served.history_codec.decode, found.entries))


async def test_rows_are_kept_of_every_transport(v2: V2) -> None:
    api = v2.api
    api.pipeline.models["probe"].history = HistorySpec(events=4)
    body: dict[str, Any] = {"inputs": ROWS.tolist()}
    packed = {"inputs": ROWS.astype("<f4").tobytes()}
    assert (await api.chunk(body, stream="json")).is_success
    await api.packed(packed, stream="msgpack")
    for stream, binary in (("v2", False), ("binary", True)):
        await v2.infer(ROWS, binary=binary, sequence_id=stream, sequence_start=True)
    items = {"chunks": [{"stream": f"item{at}", **packed} for at in range(2)]}
    answer = await api.client.post(
        "/v1/models/probe/chunks", content=ormsgpack.packb(items), headers=MSGPACK
    )
    assert answer.is_success
    for stream in ("json", "msgpack", "v2", "binary", "item0", "item1"):
        (entry,) = await entries(api, "probe", stream)
        assert (entry.start, entry.stop) == (2, 6)
        assert entry.steps.rows is not None
        np.testing.assert_array_equal(entry.steps.rows, ROWS[2:])


async def test_events_are_kept_with_their_strings_and_resets(v2: V2) -> None:
    api = v2.api
    api.pipeline.models["small"].history = HistorySpec(events=10)
    events = [EVENT, {**LATER, "reset": True}]
    assert (await api.chunk({"events": events}, model="small", stream="json")).is_success
    await api.packed({"events": events}, model="small", stream="msgpack")
    for stream in ("json", "msgpack"):
        (entry,) = await entries(api, "small", stream)
        assert (entry.starts, entry.steps.resets) == (True, (1,))
        columns = entry.steps.columns
        assert columns is not None
        assert columns.values["carrier"].tolist() == ["UA", "nobody knows"]
        assert columns.values["load"].tolist() == [12.5, 7]
        assert columns.present["delay"].tolist() == [False, True]
