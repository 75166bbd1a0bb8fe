"""The decoder on each runtime, against the float64 oracle from a state that is not zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.writing import add_graph, write_artifact
from models.decoding.forecasts import Decoding, Distribution, Forecast, encode_covariates
from models.events.encode import Clock, encode
from models.spec.decoder import known_schema
from models.spec.layout import state_spec
from models.spec.state import State
from service.engine.runtimes.base import Runtime
from service.engine.runtimes.loading import RUNTIMES, open_decoders, open_runtime
from tests.support.decoder_oracle import oracle_decode
from tests.support.decoders import clock, decoder_spec, future_of, hourly_events, random_state
from tests.support.oracle import contracting_weights, oracle_step
from tests.support.strict_events import columns_from_events

HORIZON, SAMPLES, SEED = 7, 3, 5
WITH_EVERY_RUNG = "quantiles"
"""The head of the decoder for which TensorFlow compiles all rungs."""
HEADS: dict[str, dict[str, Any]] = {
    "quantiles": {},
    "gaussian": {"head": {"kind": "gaussian", "quantiles": [0.2, 0.5, 0.9]}},
}


class Opened(NamedTuple):
    artifact: Artifact
    encoder: Runtime
    decoder: Runtime


@pytest.fixture(scope="module", params=[(n, h) for h in HEADS for n in RUNTIMES], ids="-".join)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    name, head = request.param
    spec = decoder_spec(**HEADS[head])
    artifact = write_artifact(
        tmp_path_factory.mktemp("models") / "m", spec, contracting_weights(spec, 11)
    )
    threads = 0 if name == "tensorflow" else 1
    with pytest.MonkeyPatch.context() as patched:
        if name == "tensorflow":
            # the rung for every batch alone: a compilation takes seconds
            patched.setattr("service.engine.runtimes.tensorflow.ROWS_AT", {64: (32,)})
            if head != WITH_EVERY_RUNG:
                patched.setattr("service.engine.runtimes.tensorflow.DECODER_RUNGS", ((32, 1),))
        encoder = open_runtime(name, artifact, threads)
        [decoder] = open_decoders([encoder], [artifact], threads)
    assert decoder is not None
    decoder.warm()
    return Opened(artifact, encoder, decoder)


def known_of(artifact: Artifact, horizon: int = HORIZON) -> NDArray[np.float32]:
    spec = artifact.spec
    assert spec.events is not None
    assert spec.decoder is not None
    schema = known_schema(spec.events, spec.decoder, timed=False)
    assert schema is not None
    columns = columns_from_events(schema, future_of(horizon))
    return encode_covariates(spec, clock(), horizon, columns).rows


def decoded(opened: Opened, known: NDArray[np.float32], samples: int = SAMPLES) -> Forecast:
    spec, runtime = opened.artifact.spec, opened.decoder
    decoding = Decoding(spec, random_state(spec), known, samples, SEED)
    count = samples + 1
    lengths = np.ones(runtime.padded_shape(count, 1)[0], np.int32)
    while not decoding.is_done:
        rows = np.zeros((len(lengths), 1, decoding.rows.shape[1]), np.float32)
        rows[:count, 0] = decoding.rows
        states = np.zeros((len(lengths), decoding.states.shape[1]), np.float32)
        states[:count] = decoding.states
        outputs, after = runtime.step(rows, lengths, states)
        decoding.advance(outputs[:count, 0], after[:count])
    return decoding.forecast()


def test_forecast_matches_the_oracle(opened: Opened) -> None:
    spec, weights, known = opened.artifact.spec, opened.artifact.weights, known_of(opened.artifact)
    forecast = decoded(opened, known)
    noise = Distribution(spec).noise(SEED, HORIZON, SAMPLES)
    state = random_state(spec)
    point, quantiles = oracle_decode(spec, weights, state, known)
    np.testing.assert_allclose(forecast.point, point, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(forecast.quantiles, quantiles, rtol=2e-5, atol=2e-5)
    for path in range(SAMPLES):
        drawn, _ = oracle_decode(spec, weights, state, known, noise[:, path])
        np.testing.assert_allclose(forecast.paths[path], drawn, rtol=2e-5, atol=2e-5)
    assert np.abs(np.diff(forecast.paths, axis=0)).min() > 1e-3


def test_forecast_is_deterministic_and_a_shorter_one_is_its_prefix(opened: Opened) -> None:
    known = known_of(opened.artifact)
    once, twice, shorter = (decoded(opened, rows) for rows in (known, known, known[:3]))
    for name in ("point", "quantiles", "paths"):
        np.testing.assert_array_equal(getattr(once, name), getattr(twice, name))
    np.testing.assert_array_equal(once.paths[:, :3], shorter.paths)
    np.testing.assert_array_equal(once.point[:3], shorter.point)


@pytest.mark.parametrize(
    "opened", [(name, WITH_EVERY_RUNG) for name in RUNTIMES], ids="-".join, indirect=True
)
def test_encoder_keeps_the_last_value_of_each_target(opened: Opened) -> None:
    artifact, runtime = opened.artifact, opened.encoder
    spec, layout = artifact.spec, state_spec(artifact.spec)
    assert spec.events is not None
    events = hourly_events(9, seed=2)
    for event in events[-3:]:
        event.pop("rain", None)
    rows, _ = encode(spec.events, columns_from_events(spec.events, events), Clock())
    runtime.warm()
    before = random_state(spec)
    cuts = ((0, 2), (2, 8), (8, 9))
    floats = before
    for start, stop in cuts:
        count, steps = runtime.padded_shape(1, stop - start)
        batch = np.zeros((count, steps, rows.shape[1]), np.float32)
        batch[0, : stop - start] = rows[start:stop]
        lengths = np.ones(count, np.int32)
        lengths[0] = stop - start
        _, after = runtime.step(batch, lengths, np.tile(floats, (count, 1)))
        floats = after[0]
    _, exact = oracle_step(spec, artifact.weights, rows, before)
    np.testing.assert_allclose(floats, exact, rtol=1e-5, atol=1e-5)
    last = layout.by_name(State(floats, np.zeros(layout.int_size, np.int64)))["decoder.last"]
    rain = [event["rain"] for event in events if "rain" in event][-1]
    wanted = [(events[-1]["warmth"] - 12.0) / 8.0, (np.log1p(rain) - 0.4) / 0.7]
    np.testing.assert_allclose(last, wanted, rtol=1e-6)
    # a target that no event of a chunk has keeps what it had
    assert "rain" not in events[8]


def test_both_graphs_are_packaged_and_regenerated(tmp_path: Path) -> None:
    spec = decoder_spec()
    made = write_artifact(tmp_path / "m", spec, contracting_weights(spec, 1))
    assert made.graphs.decoder is not None
    assert made.manifest["decoder_graph"] == "decoder.onnx"
    again = add_graph(tmp_path / "m")
    assert again.graphs == made.graphs
    (tmp_path / "m" / "decoder.onnx").write_bytes(b"junk")
    with pytest.raises(Exception, match=r"decoder\.onnx"):
        load_artifact(tmp_path / "m")
