"""Encoding the chunks of a batch together: equal to single encoding, with errors per chunk."""

from __future__ import annotations

import cProfile
import pstats
from pathlib import Path

import numpy as np
import pytest

from models.artifact.writing import write_artifact
from models.events.encode import Clock
from models.spec.model import parse_spec
from models.spec.state import State
from service.core.errors import InvalidInput, StateDamaged
from service.core.values import Feed, Steps
from service.pipeline.served_model import ServedModel
from tests.support.events import FULL_SCHEMA
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.oracle import contracting_weights
from tests.support.strict_events import columns_from_events

SPEC = parse_spec(
    {
        "name": "probe",
        "events": FULL_SCHEMA.model_dump(),
        "layers": [{"kind": "gru", "units": 3}],
        "heads": [{"kind": "sequence", "name": "last"}],
    }
)
NOON_MS = 1_362_999_600_000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder: Path = tmp_path_factory.mktemp("artifact")
    artifact = write_artifact(folder / "probe", SPEC, contracting_weights(SPEC, 1))
    return ServedModel(artifact, NumpyRuntime(artifact))


def steps_at(*times_ms: int, load: float = 1.5) -> Steps:
    chunk = [{"load": load, "at": at, "carrier": "UA", "heavy": True} for at in times_ms]
    return Steps(Feed.EVENTS, len(chunk), columns=columns_from_events(FULL_SCHEMA, chunk))


def state_of(served: ServedModel, clock: Clock, seed: int) -> State:
    zero = served.state.zero()
    floats = np.random.default_rng(seed).normal(size=zero.floats.shape).astype(np.float32)
    return State(floats, clock.into_ints(served.state, zero.ints))


def test_batch_encoding_equals_single_encoding(served: ServedModel) -> None:
    rows = np.random.default_rng(3).normal(size=(2, served.input_features)).astype(np.float32)
    items = [
        (steps_at(NOON_MS, NOON_MS + 5), state_of(served, Clock(), 1)),
        (Steps(Feed.INPUTS, 2, rows=rows), state_of(served, Clock(NOON_MS, 4, 1), 2)),
        (steps_at(NOON_MS - 9, load=-2.0), state_of(served, Clock(NOON_MS, 4, 1), 3)),
        (steps_at(NOON_MS + 70_000), state_of(served, Clock(NOON_MS, 4, 1), 4)),
    ]
    before = [state.ints.copy() for _, state in items]

    found = served.encode_many(items)

    for each, (steps, state) in zip(found, items, strict=True):
        assert not isinstance(each, Exception)
        wanted = served.encode(steps, state)
        assert each[0].tobytes() == wanted[0].tobytes()
        assert each[1].tolist() == wanted[1].tolist()
    assert [state.ints.tolist() for _, state in items] == [ints.tolist() for ints in before]
    assert served.encode_many([]) == []


def test_encoding_errors_are_per_chunk(served: ServedModel) -> None:
    good = (steps_at(NOON_MS), state_of(served, Clock(NOON_MS - 1000, 4, 1), 1))
    too_large = (steps_at(NOON_MS, load=1e39), state_of(served, Clock(), 2))
    damaged = (steps_at(NOON_MS), state_of(served, Clock(NOON_MS, -1, 0), 3))
    nothing = (Steps(Feed.EVENTS, 1), state_of(served, Clock(), 4))
    items = [good, too_large, damaged, nothing, good]

    first, *wrong, last = served.encode_many(items)

    assert [type(each) for each in wrong] == [InvalidInput, StateDamaged, InvalidInput]
    assert "events[0].load" in str(wrong[0])
    assert not isinstance(first, Exception)
    assert not isinstance(last, Exception)
    assert first[0].tobytes() == last[0].tobytes() == served.encode(*good)[0].tobytes()
    assert first[1].tolist() == [NOON_MS, 5, 1]


def test_a_chunk_with_many_resets_is_encoded_at_once(served: ServedModel) -> None:
    # on the event loop: encoded one by one, 10,000 segments would block it for half a second
    steps = steps_at(*range(NOON_MS, NOON_MS + 500))

    def calls(resets: range) -> int:
        profile = cProfile.Profile()
        profile.runcall(served.encode_segments, steps, served.initial, resets)
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]

    calls(range(0))
    assert calls(range(500)) - calls(range(1)) < 10 * 500
