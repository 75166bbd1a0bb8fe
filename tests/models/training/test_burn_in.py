"""A burn-in is the number of events that a known network needs to forget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from models import commands
from models.artifact.artifact import Artifact, load_artifact
from models.artifact.writing import add_measurements, write_artifact
from models.errors import ArtifactError, DataError
from models.networks.initial_artifact import initialise_artifact
from models.spec.layout import weight_shapes
from models.spec.model import ModelSpec, parse_spec
from models.training.burn_in import burn_in_lines, measure_burn_in, measure_rows_burn_in
from models.training.data import streams_of
from models.training.evaluate import run_chunks
from models.training.measurements import entry_of, measure
from models.training.ranges import measure_ranges
from tests.models.artifact.artifacts import manifest_of, seal

STREAMS, EVENTS = 12, 400
Weights = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def leaky(keep: float, path: Path, **inputs: Any) -> Artifact:
    """A model whose only output is its state: what it kept of the last one, and the input."""
    spec = parse_spec(
        {
            "name": "leaky",
            "features": 1,
            "layers": [{"kind": "simple_rnn", "name": "sum", "units": 1, "activation": "linear"}],
            "heads": [{"kind": "sequence", "name": "kept"}],
            **inputs,
        }
    )
    return write_artifact(path, spec, weights_of(spec, keep))


def weights_of(spec: ModelSpec, keep: float) -> Weights:
    kernel = np.zeros((spec.input_features, 1), np.float32)
    kernel[-1] = 1
    return {
        "sum.kernel": kernel,
        "sum.recurrent_kernel": np.full((1, 1), keep, np.float32),
        "sum.bias": np.zeros(1, np.float32),
    }


EVENTS_OF: dict[str, Any] = {
    "features": None,
    "events": {
        "fields": [
            {"kind": "timestamp", "name": "at", "gap_mean": 0, "gap_std": 1},
            {"kind": "numeric", "name": "x", "mean": 0.0, "std": 1.0},
        ]
    },
    "training": {
        "stream": "id",
        "validate_from": "1970-01-01T00:00:00.300Z",
        "test_from": "1970-01-01T00:00:00.350Z",
        "epochs": 1,
        "patience": 1,
        "window_steps": 4,
        "segment_windows": 1,
        "batch_streams": 1,
        "learning_rate": 0.1,
    },
}


def signs(streams: int = STREAMS, events: int = EVENTS) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(7)
    return [
        random.choice(np.array([-1, 1], np.float32), (events, 1)).astype(np.float32)
        for _ in range(streams)
    ]


def table() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "id": np.repeat([f"s{at:02d}" for at in range(STREAMS)], EVENTS),
            "at": np.tile(np.arange(EVENTS), STREAMS),
            "x": np.concatenate(signs())[:, 0].astype(np.float64),
        }
    )


def bounds(keep: float) -> tuple[float, float]:
    """Events after which a state of a usual size and one of the largest size are forgotten."""
    deviation = 1 / np.sqrt(1 - keep**2)
    largest = 1 / (1 - keep)
    usual, longest = (np.log(0.01 * deviation / of) / np.log(keep) for of in (deviation, largest))
    return usual, np.ceil(longest)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.95])
def test_a_leaky_sum_forgets_at_its_own_rate(tmp_path, keep):
    measured = measure_rows_burn_in(leaky(keep, tmp_path / "m"), signs())
    usual, longest = bounds(keep)
    assert measured is not None
    assert usual < measured["events"] <= longest
    by_quantile = measured["outputs"]["kept"]["events"]
    assert by_quantile["0.5"] < by_quantile["0.9"] <= by_quantile["0.99"] == measured["events"]
    assert f"{measured['events']} events" in burn_in_lines(measured)[0]


def test_a_sum_that_keeps_everything_does_not_forget(tmp_path):
    measured = measure_rows_burn_in(leaky(1.0, tmp_path / "m"), signs())
    assert measured is not None
    assert measured["events"] is None
    assert "does not forget within 300 events" in burn_in_lines(measured)[0]


@pytest.mark.parametrize(("keep", "reset_every", "most"), [(0.9, None, 64), (1.0, 40, 40)])
def test_windows_of_streams_are_reset_where_the_streams_are(tmp_path, keep, reset_every, most):
    artifact = leaky(keep, tmp_path / "m", **EVENTS_OF, reset_every=reset_every)
    streams = streams_of(artifact.spec, table())
    measured = measure_burn_in(artifact, streams, run_chunks(artifact, streams))
    assert measured is not None
    assert most / 2 < measured["events"] <= most


def test_runs_in_blocks_begin_at_a_block(tmp_path):
    """Runs that are cut into other blocks look ahead to other events, and never agree."""
    layers = [{"kind": "bidirectional", "name": "sum", "units": 3}]
    blocks = {"size": 7, "lookahead": 3}
    spec = leaky(0.5, tmp_path / "m", **EVENTS_OF).spec.model_dump(mode="json")
    spec = parse_spec({**spec, "layers": layers, "blocks": blocks})
    artifact = initialise_artifact(spec, tmp_path / "blocks", 1)
    streams = streams_of(artifact.spec, table())
    measured = measure_burn_in(artifact, streams, run_chunks(artifact, streams))
    assert measured is not None
    assert 1 < measured["events"] < 150


def test_a_network_of_whole_sequences_has_ranges_alone(tmp_path):
    """Also if streams are longer than a sequence that it takes."""
    spec = leaky(0.5, tmp_path / "m", **EVENTS_OF).spec.model_dump(mode="json")
    layers = [{"kind": "bidirectional", "name": "sum", "units": 3}]
    spec = parse_spec({**spec, "layers": layers, "max_chunk_steps": 50})
    artifact = initialise_artifact(spec, tmp_path / "whole", 1)
    measured = measure(artifact, table())
    assert measured.keys() == {"ranges"}
    assert measured["ranges"]["inputs.x"]["largest"] == 1


def test_only_the_events_before_a_key_are_used(tmp_path):
    artifact = leaky(0.9, tmp_path / "m", **EVENTS_OF)
    streams = streams_of(artifact.spec, table())
    outputs = run_chunks(artifact, streams)
    before = measure_burn_in(artifact, streams, outputs, 200)
    late = streams.split_keys >= 200
    outputs[late] = np.nan
    assert measure_burn_in(artifact, streams, outputs, 200) == before
    assert before is not None
    assert before["longest_events"] == 150


def test_short_streams_have_no_burn_in(tmp_path):
    assert measure_rows_burn_in(leaky(0.5, tmp_path / "m"), signs(events=20)) is None


def test_burn_in_is_in_the_manifest_but_not_in_the_fingerprint(tmp_path):
    artifact = leaky(0.9, tmp_path / "m", **EVENTS_OF)
    assert artifact.burn_in is None
    assert artifact.ranges is None
    streams = streams_of(artifact.spec, table())
    burn_in = measure_burn_in(artifact, streams, run_chunks(artifact, streams))
    ranges = measure_ranges(artifact, streams, 300)
    added = add_measurements(artifact.path, {**entry_of(burn_in), "ranges": ranges.to_manifest()})
    assert burn_in is not None
    assert added.fingerprint == artifact.fingerprint
    assert added.burn_in == burn_in["events"]
    assert "curves" not in added.manifest["burn_in"]
    assert added.ranges is not None
    assert added.ranges.names == ("sum.hidden", "inputs.at", "inputs.x")
    for one, two in zip(added.ranges[1:], ranges[1:], strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("burn_in", []),
        ("burn_in", {}),
        ("burn_in", {"events": 0}),
        ("burn_in", {"events": True}),
        ("burn_in", {"events": "12"}),
        ("ranges", []),
        ("ranges", {"sum.hidden": {"low": 0, "high": 1, "largest": 1}}),
        ("ranges", {"sum.hidden": {"low": 0}, "inputs": {"low": 0}}),
        ("ranges", {"sum.hidden": 1, "inputs": 2}),
    ],
)
def test_measurements_of_another_form_are_rejected(tmp_path, key, value):
    path = leaky(0.9, tmp_path / "m").path
    seal(path, {**manifest_of(path), key: value})
    with pytest.raises(ArtifactError, match=key):
        load_artifact(path)


def test_ranges_are_those_of_the_training_events(tmp_path):
    artifact = leaky(0.5, tmp_path / "m", **EVENTS_OF)
    frame = table().with_columns(x=pl.when(pl.col("at") < 300).then("x").otherwise(1e6))
    ranges = measure_ranges(artifact, streams_of(artifact.spec, frame), 300)
    state, inputs = 0, 2
    # of inputs of -1 and 1, a state is between -2 and 2
    assert 1.5 < ranges.high[state] <= 2 * 1.01
    assert ranges.largest[state] <= 2
    assert 0 <= ranges.low[state] <= 0.99
    np.testing.assert_allclose(
        [ranges.low[inputs], ranges.high[inputs], ranges.largest[inputs]], [0.99, 1.01, 1]
    )


def test_young_streams_are_in_the_range(tmp_path):
    """The first states of streams are small, and too few among the others for a quantile."""
    artifact = leaky(0.999, tmp_path / "m", **EVENTS_OF)
    frame = table().with_columns(x=1.0 + pl.col("at") / EVENTS)
    ranges = measure_ranges(artifact, streams_of(artifact.spec, frame), 300)
    assert ranges.low[0] == pytest.approx(0.99)


def test_the_command_measures_a_model_that_takes_rows(tmp_path):
    artifact = leaky(0.9, tmp_path / "m")
    table().select("x", "id").write_csv(tmp_path / "data.csv")
    options: dict[str, Any] = {"quiet": True, "stream": "id"}
    found = commands.evaluate(
        artifact.path, tmp_path / "data.csv", plots=tmp_path / "plots", record=True, **options
    )
    measured = measure_rows_burn_in(artifact, signs())
    assert {"burn_in": found["burn_in"]} == entry_of(measured)
    assert json.loads(json.dumps(found)) == found
    recorded = load_artifact(artifact.path)
    assert recorded.burn_in == found["burn_in"]["events"]
    assert recorded.ranges is not None
    assert (tmp_path / "plots" / "burn-in.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="--stream"):
        commands.evaluate(artifact.path, tmp_path / "data.csv", quiet=True)


def test_the_command_measures_a_model_with_events(tmp_path, capsys):
    label = {"kind": "label", "name": "up", "input": "sum"}
    heads = [{"kind": "sequence", "name": "kept"}, label]
    spec = parse_spec(
        {**leaky(0.9, tmp_path / "m", **EVENTS_OF).spec.model_dump(mode="json"), "heads": heads}
    )
    weights = weights_of(spec, 0.9)
    weights["heads.up.kernel"] = np.full((1, 1), 0.1, np.float32)
    weights["heads.up.bias"] = np.zeros(1, np.float32)
    path = write_artifact(tmp_path / "labelled", spec, weights).path
    table().with_columns(up=pl.col("x") > 0).write_csv(tmp_path / "data.csv")
    found = commands.evaluate(path, tmp_path / "data.csv", record=True)
    printed = capsys.readouterr()
    assert f"burn-in: {found['burn_in']['events']} events" in printed.err
    assert printed.out == ""
    outputs = found["burn_in"]["outputs"]
    assert [each["relative_to"] for each in outputs.values()] == ["deviation", "probability"]
    assert load_artifact(path).burn_in == found["burn_in"]["events"]


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (pl.DataFrame({"id": ["a"], "x": [1.0], "y": [1.0]}), "1 columns of numbers"),
        (pl.DataFrame({"x": [1.0]}), "'id'"),
        (pl.DataFrame({"id": ["a", "a"], "x": ["1", "high"]}), "row 2: a finite number"),
        (pl.DataFrame({"id": ["a"], "x": [None]}), "row 1: a finite number"),
    ],
)
def test_tables_of_other_rows_are_rejected(tmp_path, frame, words):
    artifact = leaky(0.9, tmp_path / "m")
    frame.write_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match=words):
        commands.evaluate(artifact.path, tmp_path / "data.parquet", stream="id", quiet=True)


def test_outputs_of_streams_of_any_size_count_alike(tmp_path):
    """Two of the streams have values a million times as large, and an output in their units."""
    spec = leaky(0.9, tmp_path / "m", **EVENTS_OF).spec.model_dump(mode="json")
    spec["events"]["fields"][1]["normalisation"] = {"memory_events": 20, "std": 1.0}
    spec["heads"] = [{"kind": "forecast", "name": "next", "targets": ["x"]}]
    parsed = parse_spec(spec)
    weights = {name: np.zeros(shape, np.float32) for name, shape in weight_shapes(parsed).items()}
    weights |= {name: weights_of(parsed, 0.9)[name] for name in ("sum.recurrent_kernel",)}
    weights["sum.kernel"][-1] = weights["heads.next.kernel"][0] = 1
    artifact = write_artifact(tmp_path / "scaled", parsed, weights)
    is_large = pl.col("id").str.tail(1).is_in(["0"])
    frame = table().with_columns(x=pl.when(is_large).then(1e6 * pl.col("x")).otherwise("x"))
    streams = streams_of(artifact.spec, frame)
    measured = measure_burn_in(artifact, streams, run_chunks(artifact, streams))
    assert measured is not None
    output = measured["outputs"]["next"]
    assert output["relative_to"] == "deviation in the stream"
    assert output["events"]["0.5"] > 40
