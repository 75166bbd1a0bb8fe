"""The check of a server's replies: the values of plain stacks, the shapes of every kind of network.

Stacks whose outputs do not depend on the cuts are compared with the tests' float64 oracle over the
whole stream. The values of the other kinds are proven on both runtimes by
`tests/service/engine/test_runtime_contract.py`; their positions are checked by `Traffic`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
import ormsgpack

from models.artifact.artifact import Artifact
from tests.bench.traffic import TrafficSpec
from tests.bench.workloads import HORIZON, TARGET, FloatRows
from tests.support.oracle import oracle_step

TOLERANCE = 1e-5
TRAINED_TOLERANCE = 1e-3
"""For weights from training, with heads that exponentiate: the contract's bound is for
contracting networks, and this check is to find wrong answers, not the last digit."""


class WrongOutputsError(Exception):
    """A server's outputs are not the network's."""


def check_answers(
    artifact: Artifact,
    spec: TrafficSpec,
    rows: Sequence[FloatRows],
    sampled: Sequence[bytes],
    tolerance: float = TOLERANCE,
) -> None:
    """Check the replies to stream 0, from its first chunk on.

    Args:
        rows: the encoded rows of each body, in a stream's own order of bodies.

    Raises:
        WrongOutputsError: another shape or value than the network's, or no reply at all.
    """
    read = orjson.loads if spec.media == "json" else ormsgpack.unpackb
    parts = [_outputs(artifact, read(reply)) for reply in sampled]
    if not parts or not all(np.isfinite(part).all() for part in parts):
        raise WrongOutputsError(f"expected finite outputs, got {parts[:1]}")
    model = artifact.spec
    if model.chunking != "invisible" or model.blocks or model.decoder or model.onnx:
        return
    sent = np.concatenate([rows[spec.body(0, chunk)] for chunk in range(len(sampled))])
    oracle, _ = oracle_step(model, artifact.weights, sent, artifact.state.zero().floats)
    # the last columns are the weights of attention, which replies do not show here
    expected = oracle[:, : sum(output.size for output in artifact.outputs.outputs)]
    answers = np.concatenate(parts)
    if answers.shape != expected.shape:
        raise WrongOutputsError(f"expected outputs {expected.shape}, got {answers.shape}")
    difference = np.abs(answers - expected)
    if not (difference <= tolerance * (1 + np.abs(expected))).all():
        raise WrongOutputsError(
            f"the outputs differ from the oracle's by up to {difference.max():.2g}, "
            f"expected {tolerance:g}"
        )


def _outputs(artifact: Artifact, reply: Mapping[str, Any]) -> Any:
    """The outputs of a reply, float64 [T, O]; of a forecast [H, 1 + Q]."""
    if "forecast" in reply:
        target = reply["forecast"][TARGET]
        return np.column_stack([target["point"], target["quantiles"]]).reshape(HORIZON, -1)
    named = reply["predictions"][0]["outputs"] if "predictions" in reply else reply["outputs"]
    outputs = artifact.outputs.outputs
    columns = [np.asarray(named[one.name], np.float64).reshape(-1, one.size) for one in outputs]
    return np.concatenate(columns, axis=1)
