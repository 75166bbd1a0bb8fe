"""Comparison of two versions' outputs: differences, losses and calibration, event by event."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from models.artifact.writing import write_artifact
from models.events.columns import EventColumns
from models.spec.model import parse_spec
from service.pipeline.comparison import BOUNDS, SIDES, Comparator, ComparedChunk, Comparison
from service.pipeline.served_model import ServedModel
from tests.support.models import SMALL, random_weights
from tests.support.numpy_runtime import NumpyRuntime

CARRIERS = ["UA", "B6", "Österreich", "航空", "new"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[ServedModel]:
    """Two versions of a model with heads of every kind; one orders the categories otherwise."""
    folder: Path = tmp_path_factory.mktemp("small")
    served = []
    for seed in (1, 2):
        spec = parse_spec(SMALL)
        if seed == 2:
            fields = list(spec.events.fields)
            at = next(i for i, field in enumerate(fields) if field.name == "carrier")
            vocabulary = tuple(reversed(fields[at].vocabulary))
            fields[at] = fields[at].model_copy(update={"vocabulary": vocabulary})
            events = spec.events.model_copy(update={"fields": tuple(fields)})
            spec = spec.model_copy(update={"events": events})
        artifact = write_artifact(folder / str(seed), spec, random_weights(spec, seed))
        served.append(ServedModel(artifact, NumpyRuntime(artifact)))
    return served


def random_chunk(
    random: np.random.Generator, served: Sequence[ServedModel], steps: int, *, known: bool = True
) -> ComparedChunk:
    """A chunk of random events, with random outputs of both versions."""
    values = {
        "load": random.normal(15, 3, steps),
        "delay": random.normal(0, 2, steps),
        "carrier": random.choice(np.array(CARRIERS, object), steps),
    }
    present = dict.fromkeys(values, np.ones(steps, np.bool_))
    present["delay"] = random.random(steps) < 0.7
    width = served[0].outputs.size
    outputs = [random.random((steps + 1, width)).astype(np.float32) for _ in served]
    return ComparedChunk(
        (outputs[0][1:], outputs[1][1:]),
        (outputs[0][0], outputs[1][0]) if known else None,
        EventColumns(steps, present, values),
        (2,) if steps > 2 else (),
    )


def expected_losses(
    served: Sequence[ServedModel], chunks: Sequence[ComparedChunk]
) -> dict[tuple[str, str, str], list[float]]:
    """The losses, one event at a time."""
    losses: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for chunk in chunks:
        for side, (name, model) in enumerate(zip(SIDES, served, strict=True)):
            for at in range(len(chunk.outputs[side])):
                own = model.outputs.by_name(chunk.outputs[side][at])
                losses[name, "surprise", "nll"].append(float(own["surprise"]))
                if at in chunk.resets or (at == 0 and chunk.before is None):
                    continue
                previous = chunk.outputs[side][at - 1] if at else chunk.before[side]
                told = model.outputs.by_name(previous.astype(np.float64))
                values = {key: column[at] for key, column in chunk.columns.values.items()}
                late = values["load"] > 15.0
                given = told["late_load"] if late else 1 - told["late_load"]
                losses[name, "late_load", "log_loss"].append(-np.log(given))
                losses[name, "late_load", "brier"].append((told["late_load"] - late) ** 2)
                code = model.events.field("carrier").code_of.get(values["carrier"], 0)
                wanted = np.eye(len(told["carrier"]))[code]
                losses[name, "carrier", "log_loss"].append(-np.log(told["carrier"][code]))
                losses[name, "carrier", "brier"].append(((told["carrier"] - wanted) ** 2).sum())
                load = (values["load"] - 3.7) / 1.9
                losses[name, "next", "mae"].append(abs(load - told["next"][0]))
                if chunk.columns.present["delay"][at]:
                    errors = np.array([[values["load"]], [values["delay"]]]) - told["range"]
                    level = np.array([0.1, 0.5, 0.9])
                    pinball = np.maximum(level * errors, (level - 1) * errors)
                    losses[name, "range", "pinball"].append(pinball.mean())
                    losses[name, "range", "mae"].append(np.abs(errors[:, 1]).mean())
    return losses


def test_losses_equal_those_of_each_event_by_itself(small: list[ServedModel]) -> None:
    random = np.random.default_rng(3)
    chunks = [
        random_chunk(random, small, steps, known=known)
        for steps, known in ((1, True), (7, False), (1, False), (16, True), (3, True))
    ]
    losses = Comparator(*small).compare(chunks).losses
    expected = expected_losses(small, chunks)
    assert losses.keys() == expected.keys()
    for key, each in expected.items():
        assert losses[key][1] == len(each), key
        assert losses[key][0] == pytest.approx(sum(each), rel=1e-5), key


def test_comparisons_of_chunks_add_up(small: list[ServedModel]) -> None:
    random = np.random.default_rng(4)
    chunks = [random_chunk(random, small, steps, known=steps > 5) for steps in (4, 9, 1)]
    comparator = Comparator(*small)
    together, parts = comparator.compare(chunks), [comparator.compare([each]) for each in chunks]
    for key, (total, events) in together.losses.items():
        own = [part.losses[key] for part in parts if key in part.losses]
        assert events == sum(each[1] for each in own)
        assert total == pytest.approx(sum(each[0] for each in own))
    for key, sums in together.reliability.items():
        own_sums = [part.reliability[key] for part in parts if key in part.reliability]
        assert sums == pytest.approx(np.sum(own_sums, axis=0))
    for name, difference in together.differences.items():
        counts = np.sum([part.differences[name].counts for part in parts], axis=0)
        assert list(difference.counts) == counts.tolist()


def test_differences_are_counted_by_their_size(small: list[ServedModel]) -> None:
    width = small[0].outputs.size
    sizes = [0.0, 1e-12, *BOUNDS, 0.3, 1.0001, 5000.0]
    first = np.zeros((len(sizes), width), np.float32)
    second = first.copy()
    place = small[0].outputs.slices["late_load"].start
    second[:, place] = sizes
    result = Comparator(*small).compare([ComparedChunk((first, second))])
    counts, total = result.differences["late_load"]
    values = second[:, place].astype(np.float64)
    expected = np.bincount(np.searchsorted(BOUNDS, values), minlength=len(BOUNDS) + 1)
    assert list(counts) == expected.tolist()
    assert total == pytest.approx(values.sum())
    assert result.differences["next"].counts[0] == len(sizes)
    assert result.losses == {}


def bins_of(comparison: Comparison, head: str, side: str) -> dict[str, tuple[float, ...]]:
    return {
        each: tuple(sums)
        for (at, name, each), sums in comparison.reliability.items()
        if (at, name) == (side, head)
    }


def test_calibration_counts_what_came_true(small: list[ServedModel]) -> None:
    """An event of load 20 after a probability of 0.83 that it is above 15, then one of 10."""
    chunk = random_chunk(np.random.default_rng(5), small, 2)
    chunk.columns.values["load"][:] = (20.0, 10.0)
    place = small[0].outputs.slices["late_load"].start
    chunk.before[1][place] = 0.83
    chunk.outputs[1][0, place] = 0.87
    median = small[0].outputs.slices["range"].start + 1
    chunk.before[1][median], chunk.outputs[1][0, median] = 19.0, 11.0
    comparison = Comparator(*small).compare([chunk])
    [(bin_name, sums)] = bins_of(comparison, "late_load", "challenger").items()
    assert bin_name == "0.8"
    assert sums == pytest.approx((2, 1.7, 1))
    quantiles = bins_of(comparison, "range", "challenger")
    delays = int(chunk.columns.present["delay"].sum())
    events, predicted, true = quantiles["0.5"]
    assert (events, predicted) == (2 + delays, 0.5 * (2 + delays))
    assert true >= 1
    codes = [
        small[1].events.field("carrier").code_of.get(c, 0) for c in chunk.columns.values["carrier"]
    ]
    told = [
        small[1].outputs.by_name(row)["carrier"] for row in (chunk.before[1], chunk.outputs[1][0])
    ]
    classes = bins_of(comparison, "carrier", "challenger")
    hits = sum(int(row.argmax() == code) for row, code in zip(told, codes, strict=True))
    assert np.sum(list(classes.values()), axis=0)[[0, 2]].tolist() == [2, hits]


def test_rows_and_models_without_targets_are_compared_by_their_differences(
    small: list[ServedModel],
) -> None:
    random = np.random.default_rng(6)
    chunk = random_chunk(random, small, 3)._replace(columns=None)
    assert Comparator(*small).compare([chunk]).losses == {}
    empty = np.zeros((0, small[0].outputs.size), np.float32)
    final = chunk._replace(outputs=(empty, empty), resets=())
    assert Comparator(*small).compare([final]).differences["next"].total == 0
