"""Verification against Keras: right outputs pass, one wrong number fails; the exit status."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import typer

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.offline.runner import Runner
from models.offline.verification import Received, keras_runner, verify_outputs
from service.commands.replay import command
from service.commands.replay.command import EXIT_UNFINISHED, replay
from service.commands.replay.send import StreamEvents
from tests.service.commands.replay.conftest import LENGTHS, STANDIN_SEED, Replayed
from tests.service.commands.replay.standin import SPEC, Standin
from tests.support.oracle import contracting_weights

EVENTS = sum(LENGTHS.values())


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The model of the stand-in."""
    weights = contracting_weights(SPEC, STANDIN_SEED)
    return write_artifact(tmp_path_factory.mktemp("models") / "small", SPEC, weights)


@pytest.fixture(scope="module")
def whole(artifact: Artifact) -> Runner:
    """Its Keras layers, which take a second to trace."""
    return keras_runner(artifact)


async def received(replayed: Replayed) -> list[Received]:
    replay = await replayed(chunk=(1, 5))
    return [Received(s.events.name, s.events.columns, s.outputs) for s in replay.streams]


async def test_chunked_outputs_equal_the_whole_sequence(replayed: Replayed, whole: Runner) -> None:
    streams = await received(replayed)
    found = verify_outputs(SPEC, whole, streams)
    assert found.holds
    assert [check.name for check in found.outputs] == ["late", "next"]
    assert (found.compared, found.missing) == (EVENTS, 0)
    assert 0 < found.outputs[1].difference < 1e-4
    # a resumed run is verified from the first event on
    for stream in streams:
        stream.outputs[: len(stream.outputs) // 2] = np.nan
    found = verify_outputs(SPEC, whole, streams)
    assert found.holds
    assert found.missing == sum(length // 2 for length in LENGTHS.values())
    assert found.compared == EVENTS - found.missing
    for stream in streams:
        stream.outputs[:] = np.nan
    found = verify_outputs(SPEC, whole, streams)
    assert (found.compared, found.missing) == (0, EVENTS)


async def test_one_wrong_number_is_detected(
    replayed: Replayed, standin: Standin, whole: Runner
) -> None:
    standin.wrong_by = 1e-3
    found = verify_outputs(SPEC, whole, await received(replayed))
    assert not found.holds
    late, forecast = found.outputs
    assert late.beyond == 0
    assert forecast.step == 7
    assert forecast.beyond == 3
    assert forecast.difference == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("swap", ["streams", "time"])
async def test_outputs_of_another_stream_or_state_are_detected(
    replayed: Replayed, whole: Runner, swap: str
) -> None:
    streams = {stream.name: stream for stream in await received(replayed)}
    wrong = streams["s1"].outputs.copy()
    if swap == "streams":
        wrong[5:20] = streams["s2"].outputs[5:20]
    else:
        wrong[1:] = wrong[:-1].copy()
    found = verify_outputs(SPEC, whole, [streams["s1"]._replace(outputs=wrong), streams["s2"]])
    assert not found.holds
    assert {check.stream for check in found.outputs} == {"s1"}


def test_long_and_short_streams_are_not_padded_together(streams: list[StreamEvents]) -> None:
    sizes: list[list[int]] = []
    output = 0.0

    def step(
        rows: np.ndarray, lengths: np.ndarray, states: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(sorted(lengths.tolist()))
        return np.full((*rows.shape[:2], 4), output, np.float32), states

    (longest,) = (stream for stream in streams if len(stream) == 61)
    lengths = [1, 1, 30, 31, 40, 60, 61]
    parts = [Received(str(n), longest.columns[:n], np.zeros((n, 4), np.float32)) for n in lengths]
    found = verify_outputs(SPEC, Runner(SPEC, {}, step), parts)
    assert (found.compared, found.holds) == (sum(lengths), True)
    assert sizes == [[1, 1], [30, 31, 40], [60, 61]]
    # what is not a number is equal to nothing
    output = float("nan")
    assert not verify_outputs(SPEC, Runner(SPEC, {}, step), parts).holds


Run = Callable[..., int]


@pytest.fixture
def run(background: str, artifact: Artifact, data: Path, standin: Standin) -> Run:
    """Runs `carry replay --verify` of the file; returns the exit status."""
    standin.version = artifact.version

    def run(**options: Any) -> int:
        given = {"model": "small", "data": data, "stream_column": "who", "verify": True}
        try:
            replay(url=[background], **{**given, "artifact": artifact.path, **options})
        except typer.Exit as error:
            return error.exit_code
        return 0

    return run


@pytest.mark.parametrize(("wrong_by", "status"), [(0.0, 0), (1e-3, 1)])
def test_exit_status_is_the_result_of_the_verification(
    run: Run,
    standin: Standin,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wrong_by: float,
    status: int,
) -> None:
    standin.wrong_by = wrong_by
    rejections = iter(["store_unavailable"])
    standin.fault = lambda request: next(rejections, None)
    assert run(report=tmp_path / "report.json") == status
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert ("BEYOND, 3 values" in printed) == bool(status)
    report = orjson.loads((tmp_path / "report.json").read_bytes())
    assert report["events"] == report["verification"]["compared"] == EVENTS
    assert report["failed"] == bool(status)
    assert report["retries"] == {"store_unavailable": 1}


def test_replay_sends_nothing_to_a_model_that_it_cannot_verify(
    run: Run,
    standin: Standin,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(**options: Any) -> str:
        assert run(**options) == EXIT_UNFINISHED
        return capsys.readouterr().err

    assert str(tmp_path / "none") in fails(artifact=tmp_path / "none")
    standin.version = "f" * 12
    assert "is served, version ffffffffffff" in fails()
    standin.chunking = "per_chunk"
    assert "'small' depend on how a stream is cut into chunks" in fails()
    standin.chunking = "invisible"
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "needs TensorFlow, whatever runtime serves: pip install" in fails()
    assert standin.seen == []
