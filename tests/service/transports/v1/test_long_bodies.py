"""A long chunk that is read in blocks is the same chunk, or the same rejection."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifact.artifact import Artifact
from service.codec.long_bodies import long_reader
from service.codec.long_bodies.admission import Checkpoint
from service.codec.long_bodies.long_reader import LongReader
from service.codec.media import Media
from service.codec.request_reader import RequestReader
from service.codec.settings import RequestSettings
from service.core.errors import CarryError
from service.core.values import Chunk
from service.pipeline.served_model import ServedModel
from tests.support.numpy_runtime import NumpyRuntime

LIMITS = RequestSettings(
    max_chunk_steps=10_000, max_predict_steps=10_000, max_body_bytes=2**24, max_items=10
)


@pytest.fixture(scope="module")
def reader(models: Mapping[str, Artifact]) -> RequestReader:
    artifact = models["probe"]
    return RequestReader(
        ServedModel(artifact, NumpyRuntime(artifact)), LIMITS, nonce=lambda: b"n" * 16
    )


async def read_long(reader: RequestReader, body: bytes) -> Any:
    try:
        checkpoint = Checkpoint(math.inf)
        return await LongReader(reader).chunk(body, Media.JSON, checkpoint, "s", None)
    except CarryError as error:
        return error


def read_in_blocks(reader: RequestReader, body: bytes) -> Any:
    return uvloop.run(read_long(reader, body))


def read_at_once(reader: RequestReader, body: bytes) -> Any:
    try:
        return reader.chunk(body, Media.JSON, "s", None)
    except CarryError as error:
        return error


def rows(count: int) -> list[list[float]]:
    found: list[list[float]] = np.random.default_rng(count).normal(size=(count, 3)).tolist()
    return found


def without_steps(chunk: Chunk) -> dict[str, Any]:
    return {name: each for name, each in msgspec.structs.asdict(chunk).items() if name != "steps"}


@pytest.mark.parametrize(
    "body",
    [
        orjson.dumps({"position": 7, "inputs": rows(9000)}),
        orjson.dumps({"inputs": rows(5000), "epoch": "0123456789abcdef", "position": 2}),
        json.dumps({"inputs": rows(4000)}, indent=1).encode(),
        orjson.dumps({"inputs": rows(4000), "resets": [0, 7, 3999], "dry_run": True}),
        orjson.dumps({"resets": list(range(10_000)), "inputs": rows(10_000)}),
        json.dumps({"inputs": rows(4000)}, separators=(" , ", " : ")).encode(),
    ],
    ids=["compact", "members after", "indented", "resets", "all reset", "spaced"],
)
def test_a_long_body_is_the_same_chunk(reader: RequestReader, body: bytes) -> None:
    found, expected = read_in_blocks(reader, body), read_at_once(reader, body)
    assert without_steps(found) == without_steps(expected)
    assert found.steps.length == expected.steps.length
    np.testing.assert_array_equal(found.steps.rows, expected.steps.rows)


@pytest.mark.parametrize("resets", [[0, 4000], [1, 1], [True]], ids=str)
def test_wrong_resets_of_a_long_body_are_the_same_rejection(
    reader: RequestReader, resets: list[Any]
) -> None:
    body = orjson.dumps({"inputs": rows(4000), "resets": resets})
    found, expected = read_in_blocks(reader, body), read_at_once(reader, body)
    assert (type(found), found.facts) == (type(expected), expected.facts)
    assert found.detail == expected.detail


def test_other_tasks_run_between_the_blocks(reader: RequestReader) -> None:
    body = orjson.dumps({"inputs": rows(9000)})

    async def both() -> int:
        turns = 0
        reading = asyncio.create_task(read_long(reader, body))
        while not reading.done():
            await asyncio.sleep(0)
            turns += 1
        assert isinstance(await reading, Chunk)
        return turns

    assert uvloop.run(both()) >= len(body) // long_reader.BLOCK_BYTES - 1


@pytest.mark.parametrize(
    "body",
    [
        orjson.dumps({"position": 0, "inputs": rows(10_001)}),
        orjson.dumps({"position": 0, "inputs": [*rows(5000), [1, 2]]}),
        orjson.dumps({"position": 0, "inputs": [*rows(5000), [1, 2, "3"], *rows(100)]}),
        orjson.dumps({"position": 0, "inputs": [*rows(2500), [1, 2, True], *rows(2500)]}),
        orjson.dumps({"position": 0, "inputs": [*rows(2500), [[1], 2, 3], *rows(2500)]}),
        orjson.dumps({"position": 0, "inputs": [*rows(2500), [1e39, 2, 3], *rows(2500)]}),
        orjson.dumps({"position": 0, "inputs": rows(5000), "more": 1}),
        orjson.dumps({"position": 0, "inputs": rows(5000)})[:-1],
        orjson.dumps({"position": 0, "inputs": rows(5000)}) + b"]",
        orjson.dumps({"position": 0, "inputs": [rows(5000)]}),
        orjson.dumps({"position": 0, "inputs": rows(5000)}).replace(b"],[", b"],,[", 900),
        orjson.dumps({"events": rows(5000)}),
        b'{"inputs":[' + b" " * 70_000 + b"]}",
        b"[" * 70_000,
    ],
)
def test_an_invalid_long_body_is_rejected(reader: RequestReader, body: bytes) -> None:
    assert isinstance(read_in_blocks(reader, body), CarryError)
    assert isinstance(read_at_once(reader, body), CarryError)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_long_and_short_reader_agree_on_damaged_bodies(reader: RequestReader, data: Any) -> None:
    """With small blocks, so that a block may end anywhere in the body."""
    body = bytearray(orjson.dumps({"position": 1, "inputs": rows(40)}))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(body) - 1))
        byte = data.draw(st.sampled_from(b'[],0-1.e"{}: t'))
        if data.draw(st.booleans()):
            body[at] = byte
        else:
            body.insert(at, byte)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(long_reader, "BLOCK_BYTES", data.draw(st.integers(1, 300)))
        found = read_in_blocks(reader, bytes(body))
    expected = read_at_once(reader, bytes(body))
    if isinstance(expected, CarryError):
        assert isinstance(found, CarryError)
    else:
        assert found.digest == expected.digest
        assert without_steps(found) == without_steps(expected)
