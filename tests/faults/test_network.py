"""The network of the fault tests: any mistake in the history shows in every later output."""

import numpy as np
import pytest

from models.artifact.artifact import Artifact, load_artifact
from service.engine.runtimes.onnx import OnnxRuntime
from tests.faults import network
from tests.faults.network import MODEL, PERIOD, ZERO, compute, random_events
from tests.support.stepping import in_cuts

pytestmark = pytest.mark.harness

EVENTS = 3 * PERIOD
LATER = 2000


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return load_artifact(network.write(tmp_path_factory.mktemp("models")) / MODEL)


def test_runtime_equals_the_reference_bit_by_bit_for_any_chunks(artifact: Artifact) -> None:
    runtime, random = OnnxRuntime(artifact), np.random.default_rng(5)
    rows = random_events(random, 600)
    expected = compute(ZERO, rows)
    zero = np.zeros(artifact.state.float_size, np.float32)
    for cuts in ((40,) * 15, (1, 30, 2, 57, 510)):
        outputs, _ = in_cuts(runtime, rows.astype(np.float32), zero, cuts)
        assert (outputs == expected).all()


@pytest.mark.parametrize("mistake", ["wrong", "missing", "doubled", "swapped", "moved"])
@pytest.mark.parametrize("seed", range(5))
def test_mistake_changes_every_later_output(mistake: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = random_events(random, EVENTS)
    later = random_events(random, LATER)
    place = int(random.integers(EVENTS - PERIOD))
    changed = rows.copy()
    match mistake:
        case "wrong":
            changed[place, 0] += 1
        case "missing":
            changed = np.delete(rows, place, axis=0)
        case "doubled":
            changed = np.insert(rows, place, rows[place], axis=0)
        case "swapped":
            while (rows[place] == rows[place + 1]).all():
                place += 1
            changed[[place, place + 1]] = rows[[place + 1, place]]
        case "moved":
            far = place + int(random.integers(2, PERIOD))
            changed[[place, far]] = rows[[far, place]]
            assert (changed != rows).any()
    right = compute(ZERO, np.concatenate([rows, later]))[-LATER:]
    wrong = compute(ZERO, np.concatenate([changed, later]))[-LATER:]
    assert np.abs(right - wrong).max(axis=1).min() >= 1
