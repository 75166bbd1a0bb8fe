"""Networks in blocks: trained on whole sequences, packaged with the blocks, scored as served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

pytest.importorskip("tensorflow")

from models import commands
from models.artifact.artifact import Artifact, load_artifact
from models.artifact.writing import write_artifact
from models.errors import DataError, SpecError
from models.networks.initial_weights import draw_weights
from models.spec.blocks import BlockSpec
from models.spec.layout import network_state
from models.training.data import Streams, streams_of
from models.training.ensemble import merge_members
from models.training.evaluate import run_chunks
from models.training.report import WHOLE
from models.training.scores import MODEL
from models.training.trainer import train
from tests.support.oracle import oracle_in_blocks, oracle_step
from tests.support.training import both_ways_frame, both_ways_spec

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BLOCKS = {"size": 3, "lookahead": 1}
LONGEST = 9


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return both_ways_frame()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, frame: pl.DataFrame) -> Path:
    """A specification, its data, and the artifact that `carry train` writes for them."""
    folder = tmp_path_factory.mktemp("blocks")
    frame.write_parquet(folder / "events.parquet")
    (folder / "SPEC.yaml").write_text(both_ways_spec(blocks=BLOCKS, layers=1).model_dump_json())
    commands.train(
        folder / "SPEC.yaml", folder / "events.parquet", folder / "model", trees=False, quiet=True
    )
    return folder


@pytest.fixture(scope="module")
def whole_artifact(tmp_path_factory: pytest.TempPathFactory, frame: pl.DataFrame) -> Artifact:
    """A trained model of the specification without blocks."""
    out = tmp_path_factory.mktemp("whole") / "model"
    return train(both_ways_spec(layers=1), frame, out, quiet=True).artifact


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Artifact:
    return load_artifact(folder / "model")


def encoded_streams(artifact: Artifact, streams: Streams) -> list[NDArray[np.float32]]:
    """The encoded rows of every stream."""
    assert artifact.spec.events is not None
    rows = streams.encoded(artifact.spec.events)
    return [rows[start:stop] for start, stop in streams.spans]


def test_weights_equal_those_trained_on_whole_sequences(
    artifact: Artifact, whole_artifact: Artifact, tmp_path: Path
) -> None:
    assert artifact.spec.blocks is not None
    assert artifact.spec.blocks.model_dump() == BLOCKS
    assert (artifact.spec.chunking, whole_artifact.spec.chunking) == ("invisible", "whole")
    assert artifact.fingerprint != whole_artifact.fingerprint
    assert artifact.weights.keys() == whole_artifact.weights.keys()
    for name, value in artifact.weights.items():
        np.testing.assert_array_equal(value, whole_artifact.weights[name])
    with_blocks = whole_artifact.spec.model_copy(update={"blocks": BlockSpec(**BLOCKS)})
    repackaged = write_artifact(tmp_path / "model", with_blocks, whole_artifact.weights)
    assert repackaged.fingerprint == artifact.fingerprint
    validated = artifact.manifest["metrics"]["validation"]
    assert validated == whole_artifact.manifest["metrics"]["validation"]


@pytest.mark.parametrize("batch", [64, 5])
def test_outputs_of_the_blocks_are_scored(
    artifact: Artifact, frame: pl.DataFrame, batch: int
) -> None:
    streams = streams_of(artifact.spec, frame)
    assert {stop - start for start, stop in streams.spans} == set(range(1, LONGEST + 1))
    advanced: list[int] = []
    outputs = run_chunks(artifact, streams, batch=batch, advance=advanced.append)
    expected = [
        oracle_in_blocks(artifact.spec, artifact.weights, rows)
        for rows in encoded_streams(artifact, streams)
    ]
    np.testing.assert_allclose(outputs, np.concatenate(expected), **CLOSE)
    assert sum(advanced) == streams.events


def test_whole_sequences_are_scored_in_one_call(
    whole_artifact: Artifact, artifact: Artifact, frame: pl.DataFrame
) -> None:
    """One call per stream; outputs differ from those of the blocks if it exceeds a window."""
    streams = streams_of(whole_artifact.spec, frame)
    outputs = run_chunks(whole_artifact, streams, chunk=2)
    zero = np.zeros(network_state(whole_artifact.spec).float_size)
    expected = [
        oracle_step(whole_artifact.spec, whole_artifact.weights, rows, zero)[0]
        for rows in encoded_streams(whole_artifact, streams)
    ]
    np.testing.assert_allclose(outputs, np.concatenate(expected), **CLOSE)
    difference = np.abs(outputs - run_chunks(artifact, streams)).max(axis=1)
    for start, stop in streams.spans:
        longer = stop - start > sum(BLOCKS.values())
        assert (
            (difference[start:stop].max() > 1e-4)
            if longer
            else (difference[start:stop].max() < 1e-6)
        )
    training = whole_artifact.spec.training.model_copy(update={"window_steps": LONGEST - 1})
    shorter = whole_artifact.spec.model_copy(
        update={"max_chunk_steps": LONGEST - 1, "training": training}
    )
    with pytest.raises(DataError, match=r"at most `max_chunk_steps` \(8\) events.* got 9 of 's"):
        run_chunks(replace(whole_artifact, spec=shorter), streams)


def test_the_report_compares_blocks_with_whole_sequences(
    folder: Path, artifact: Artifact, whole_artifact: Artifact, frame: pl.DataFrame
) -> None:
    report = json.loads((folder / "model" / "report.json").read_bytes())
    assert report["run"]["blocks"] == BLOCKS
    head = report["heads"]["up"]
    assert list(head["scores"])[:2] == [MODEL, WHOLE]
    since = both_ways_spec().training.test_from
    data = folder / "events.parquet"
    block_scores = commands.evaluate(folder / "model", data, since=since, quiet=True)
    whole_scores = commands.evaluate(whole_artifact.path, data, since=since, quiet=True)
    assert block_scores["blocks"] == BLOCKS
    assert "chunk" not in block_scores
    for metric, value in block_scores["heads"]["up"].items():
        assert head["scores"][MODEL][metric]["value"] == pytest.approx(value, rel=1e-5)
        whole_value = whole_scores["heads"]["up"][metric]
        assert head["scores"][WHOLE][metric]["value"] == pytest.approx(whole_value, rel=1e-5)
        assert abs(whole_value - value) > 1e-3
        difference = head["difference"][WHOLE][metric]["value"]
        assert difference == pytest.approx(whole_value - value, rel=1e-4)
        assert artifact.manifest["metrics"]["held_out"]["up"][metric] == pytest.approx(value)


def test_merged_members_keep_their_blocks(tmp_path: Path, artifact: Artifact) -> None:
    spec = artifact.spec
    merged_spec, weights = merge_members(spec, [artifact.weights, draw_weights(spec, 2)])
    assert merged_spec.blocks == spec.blocks
    assert write_artifact(tmp_path / "model", merged_spec, weights).spec == merged_spec


@pytest.mark.parametrize(
    ("window_steps", "message"),
    [
        (
            LONGEST - 1,
            r"training\.window_steps: the network reads each stream as a whole, in one ",
        ),
        (
            None,
            r"training\.window_steps: .* at least 4100, the events of 'long', .* got 4096",
        ),
    ],
)
def test_a_stream_longer_than_a_window_is_rejected_with_the_line_of_the_setting(
    tmp_path: Path, frame: pl.DataFrame, window_steps: int | None, message: str
) -> None:
    """Also if the setting has its default, at the line of `training`."""
    plain = both_ways_spec(blocks=BLOCKS).model_dump(mode="json")
    plain["training"].pop("window_steps")
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in plain["training"].items())
    if window_steps is None:
        more = frame.filter(pl.col("id") == frame["id"][0]).sample(4100, with_replacement=True)
        frame = pl.concat([frame, more.with_columns(id=pl.lit("long"))])
    else:
        lines += f"\nwindow_steps: {window_steps}"
    rest = {key: value for key, value in plain.items() if key != "training"}
    text = f"{json.dumps(rest)[:-1]},\ntraining: {{\n" + lines.replace("\n", ",\n") + "}}"
    (tmp_path / "SPEC.yaml").write_text(text)
    line = text[: text.index("window_steps" if window_steps else "training:")].count("\n") + 1
    frame.write_parquet(tmp_path / "events.parquet")
    with pytest.raises(SpecError, match=rf"SPEC\.yaml:{line}: {message}"):
        commands.train(
            tmp_path / "SPEC.yaml", tmp_path / "events.parquet", tmp_path / "model", quiet=True
        )
