"""Verification against Keras: right outputs pass, one wrong number fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest

from models.artifact.artifact import Artifact, write_artifact
from models.offline.runner import Runner
from service.commands.replay import verify as verify_module
from service.commands.replay.events import ReplayError, StreamEvents
from service.commands.replay.run import EXIT_UNFINISHED, run_replay
from service.commands.replay.send import Pace
from service.commands.replay.verify import Received, keras_runner, open_artifact, verify_outputs
from tests.service.commands.replay.conftest import LENGTHS, STANDIN_SEED, Replayed
from tests.service.commands.replay.standin import SPEC, Standin
from tests.support.oracle import contracting_weights


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
    replay = await replayed(Pace((1, 5)))
    return [
        Received(stream.events.name, stream.events.columns, stream.outputs)
        for stream in replay.streams
    ]


async def test_chunked_outputs_equal_the_whole_sequence(replayed: Replayed, whole: Runner) -> None:
    found = verify_outputs(SPEC, whole, await received(replayed))
    assert found.holds
    assert [check.name for check in found.outputs] == ["late", "next"]
    assert found.compared == sum(LENGTHS.values())
    assert found.missing == 0
    assert 0 < found.outputs[1].difference < 1e-4


async def test_one_wrong_number_is_detected(
    replayed: Replayed, standin: Standin, whole: Runner
) -> None:
    standin.wrong_by = 1e-3
    found = verify_outputs(SPEC, whole, await received(replayed))
    assert not found.holds
    late, forecast = found.outputs
    assert late.holds
    assert forecast.step == 7
    assert forecast.beyond == 3
    assert forecast.difference == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("swap", ["streams", "time"])
async def test_outputs_of_another_stream_or_state_are_detected(
    replayed: Replayed, whole: Runner, swap: str
) -> None:
    streams = {stream.name: stream for stream in await received(replayed)}
    outputs = {name: stream.outputs for name, stream in streams.items()}
    wrong = outputs["s1"].copy()
    if swap == "streams":
        wrong[5:20] = outputs["s2"][5:20]
    else:
        wrong[1:] = wrong[:-1].copy()
    changed = Received("s1", streams["s1"].columns, wrong)
    found = verify_outputs(SPEC, whole, [changed, streams["s2"]])
    assert not found.holds
    assert {check.stream for check in found.outputs} == {"s1"}


async def test_resumed_run_is_verified_from_the_first_event(
    replayed: Replayed, whole: Runner
) -> None:
    streams = await received(replayed)
    for stream in streams:
        stream.outputs[: len(stream.columns) // 2] = np.nan
    found = verify_outputs(SPEC, whole, streams)
    assert found.holds
    assert found.missing == sum(length // 2 for length in LENGTHS.values())
    assert found.compared == sum(LENGTHS.values()) - found.missing


def test_streams_without_outputs_are_not_compared(
    streams: list[StreamEvents], whole: Runner
) -> None:
    nothing = [
        Received(s.name, s.columns, np.full((len(s), 4), np.nan, np.float32)) for s in streams
    ]
    found = verify_outputs(SPEC, whole, nothing)
    assert (found.compared, found.missing) == (0, sum(LENGTHS.values()))


def test_long_and_short_streams_are_not_padded_together(
    streams: list[StreamEvents],
) -> None:
    sizes: list[list[int]] = []

    def step(
        rows: np.ndarray, lengths: np.ndarray, states: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(sorted(lengths.tolist()))
        return np.zeros((*rows.shape[:2], 4), np.float32), states

    whole = Runner(SPEC, {}, step)
    (longest,) = (stream for stream in streams if len(stream) == 61)
    lengths = [1, 1, 30, 31, 40, 60, 61]
    received = [
        Received(str(n), longest.columns[:n], np.zeros((n, 4), np.float32)) for n in lengths
    ]
    assert verify_outputs(SPEC, whole, received).compared == sum(lengths)
    assert sizes == [[1, 1], [30, 31, 40], [60, 61]]


def test_other_version_and_missing_artifact_are_rejected(
    artifact: Artifact, tmp_path: Path
) -> None:
    assert open_artifact(artifact.path, "small", artifact.version).version == artifact.version
    with pytest.raises(ReplayError, match="is served, version ffffffffffff"):
        open_artifact(artifact.path, "small", "ffffffffffff")
    with pytest.raises(ReplayError, match="none"):
        open_artifact(tmp_path / "none", "small", artifact.version)


@pytest.mark.parametrize(("wrong_by", "status"), [(0.0, 0), (1e-3, 1)])
def test_exit_status_is_the_result_of_the_verification(
    background: str,
    standin: Standin,
    artifact: Artifact,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wrong_by: float,
    status: int,
) -> None:
    standin.version, standin.wrong_by = artifact.version, wrong_by
    rejections = iter(["store_unavailable"])
    standin.fault = lambda request: next(rejections, None)
    actual = run_replay(
        [background],
        "small",
        Pace(),
        data=data,
        stream_column="who",
        verify=True,
        artifact=artifact.path,
        report=tmp_path / "report.json",
    )
    assert actual == status
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert ("BEYOND, 3 values" in printed) == bool(status)
    report = orjson.loads((tmp_path / "report.json").read_bytes())
    assert report["events"] == sum(LENGTHS.values())
    assert report["verification"]["compared"] == sum(LENGTHS.values())
    assert report["failed"] == bool(status)
    assert report["retries"] == {"store_unavailable": 1}


def test_verify_without_tensorflow_sends_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify_module, "find_spec", lambda name: None)
    assert run_replay(["http://127.0.0.1:1"], "small", Pace(), verify=True) == EXIT_UNFINISHED
    assert "needs TensorFlow, whatever runtime serves: pip install" in capfd.readouterr().err


def test_verify_of_a_cut_dependent_model_sends_nothing(
    standin: Standin, background: str, capsys: pytest.CaptureFixture[str]
) -> None:
    standin.chunking = "per_chunk"
    assert run_replay([background], "small", Pace(), verify=True) == EXIT_UNFINISHED
    assert "'small' depend on how a stream is cut into chunks" in capsys.readouterr().err
    assert standin.seen == []
