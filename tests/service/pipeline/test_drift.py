"""Sampled batches are compared with the ranges of training."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.artifact.artifact import Artifact
from models.artifact.ranges import NormLayout, Ranges
from service.core.errors import NotFinite
from service.pipeline import drift
from service.pipeline.drift import DriftSampler, make_drift_sampler
from service.pipeline.served_model import ServedModel
from tests.support.numpy_runtime import NumpyRuntime
from tests.support.pipelines import SPEC, Counts, make_artifact, rows_of, send, worker

NAMES = NormLayout(SPEC).names
PARTS = len(NAMES)
EVERYTHING = Ranges(NAMES, np.zeros(PARTS), np.full(PARTS, 1e6), np.full(PARTS, 1e6))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder: Path = tmp_path_factory.mktemp("drift")
    return make_artifact(folder)


def sampler_of(artifact: Artifact, ranges: Ranges, counts: Counts) -> DriftSampler:
    served = ServedModel(replace(artifact, ranges=ranges), NumpyRuntime(artifact))
    sampler = make_drift_sampler(served, counts)
    assert sampler is not None
    return sampler


def test_norms_outside_of_their_ranges_are_counted_by_part(artifact: Artifact) -> None:
    layout, counts = NormLayout(SPEC), Counts()
    random = np.random.default_rng(3)
    rows = [rows_of(random, 4) for _ in range(8)]
    states = random.normal(size=(8, artifact.state.float_size)).astype(np.float32)
    parts = artifact.state.slices
    norms = {
        name: np.linalg.norm(states[:, parts[name]].astype(np.float64), axis=1)
        if name in parts
        else np.linalg.norm([each[-1].astype(np.float64) for each in rows], axis=1)
        for name in NAMES
    }
    ordered = {name: np.sort(values) for name, values in norms.items()}
    # two are below, three above
    ranges = Ranges(
        NAMES,
        np.array([(ordered[name][1] + ordered[name][2]) / 2 for name in NAMES]),
        np.array([(ordered[name][4] + ordered[name][5]) / 2 for name in NAMES]),
        np.zeros(PARTS),
    )
    sampler = sampler_of(artifact, ranges, counts)
    sampler.sample(rows, states)
    ((version, samples, outside, ratios),) = counts.drift
    assert (version, samples) == (artifact.version, 8)
    assert outside == dict.fromkeys(NAMES, 5)
    for at, name in enumerate(layout.names):
        assert ratios[name] == pytest.approx(norms[name].mean() / ranges.high[at])


def test_chunks_without_events_are_left_out(artifact: Artifact) -> None:
    counts = Counts()
    sampler = sampler_of(artifact, EVERYTHING, counts)
    empty = np.zeros((0, 3), np.float32)
    states = np.ones((2, artifact.state.float_size), np.float32)
    sampler.sample([empty, empty], states)
    assert counts.drift == []
    sampler.sample([empty, np.full((1, 3), 2e6, np.float32)], states)
    ((_, samples, outside, _),) = counts.drift
    assert samples == 1
    assert outside == {name: int(name == "inputs") for name in NAMES}


def test_parts_that_were_always_zero_have_no_ratio_to_divide_by(artifact: Artifact) -> None:
    counts = Counts()
    nothing = Ranges(NAMES, np.zeros(PARTS), np.zeros(PARTS), np.zeros(PARTS))
    states = np.full((1, artifact.state.float_size), 2.0, np.float32)
    sampler_of(artifact, nothing, counts).sample([np.zeros((1, 3), np.float32)], states)
    ((_, _, outside, ratios),) = counts.drift
    assert ratios["inputs"] == outside["inputs"] == 0
    assert np.isfinite(list(ratios.values())).all()
    assert sum(outside.values()) == PARTS - 1


async def test_the_next_batch_is_due_after_the_interval(artifact: Artifact) -> None:
    counts = Counts()
    sampler = sampler_of(artifact, EVERYTHING, counts)
    states = np.ones((1, artifact.state.float_size), np.float32)
    sampler.schedule([np.ones((1, 3), np.float32)], states, 10.0)
    assert (counts.drift, sampler.due_s) == ([], 10.0 + drift.SAMPLE_INTERVAL_S)
    await asyncio.sleep(0)
    assert len(counts.drift) == 1


async def test_a_pipeline_samples_one_batch_in_an_interval(
    store_url: str, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "SAMPLE_INTERVAL_S", 1e9)
    counts, random = Counts(), np.random.default_rng(5)
    with_ranges = replace(artifact, ranges=EVERYTHING)
    async with worker(store_url, with_ranges, counts) as pipeline:
        for position in (0, 3, 6):
            await send(pipeline, "drifting", rows_of(random, 3), position)
    assert [samples for _, samples, *_ in counts.drift] == [1]
    assert counts.seen["chunks"] == 3


async def test_results_that_are_not_finite_are_not_sampled(
    store_url: str, artifact: Artifact
) -> None:
    counts = Counts()
    async with worker(store_url, replace(artifact, ranges=EVERYTHING), counts) as pipeline:
        row = 1e30 * np.sign(artifact.weights["heads.steep.kernel"][:, :1].T)
        with pytest.raises(NotFinite):
            await send(pipeline, "infinite", row.astype(np.float32))
    assert counts.drift == []


async def test_a_model_without_ranges_is_not_sampled(store_url: str, artifact: Artifact) -> None:
    counts = Counts()
    async with worker(store_url, artifact, counts) as pipeline:
        await send(pipeline, "plain", rows_of(np.random.default_rng(6), 3), 0)
    assert counts.seen["chunks"] == 1
    assert counts.drift == []
