"""The service reproduces the post's tables with any chunking, on each runtime."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from carry_client import Carry
from models.artifact.writing import write_artifact
from tests.support.post_tables import INPUT, OUTPUTS, PRINTED, STATES, post_model
from tests.support.service import running, runtime_environment

CUTS = [cut for count in range(5) for cut in itertools.combinations(range(1, len(INPUT)), count)]
"""All sixteen ways to cut five events."""
TOLERANCES = {"tensorflow": PRINTED, "onnxruntime": 5e-8}
"""ONNX Runtime's sigmoid and tanh are off by a few units in the last place."""


@pytest.mark.parametrize("runtime", TOLERANCES)
def test_the_tables_are_reproduced_with_every_chunking(runtime: str, tmp_path: Path) -> None:
    for kind in OUTPUTS:
        write_artifact(tmp_path / "models" / kind, *post_model(kind))
    close = {"rtol": 0, "atol": TOLERANCES[runtime]}
    environment = runtime_environment(runtime, tmp_path)
    with (
        running(tmp_path, tmp_path / "models", **environment) as service,
        Carry(service.url, encoding="json") as carry,
    ):
        assert f'"runtime":"{runtime}"' in service.log()
        for kind, cut in itertools.product(OUTPUTS, CUTS):
            stream = carry.model(f"post-{kind}").stream("-".join(map(str, ("cut", *cut))))
            chunks = np.split(np.array(INPUT)[:, np.newaxis], cut)
            replies = [stream.send(chunk, return_state=True) for chunk in chunks]
            outputs = np.concatenate([reply.outputs["output"] for reply in replies])
            np.testing.assert_allclose(np.ravel(outputs), OUTPUTS[kind], **close)
            state = replies[-1].state
            np.testing.assert_equal(state, stream.state().values)
            for part, printed in STATES[kind].items():
                np.testing.assert_allclose(state[part], [printed], **close)
            assert outputs[-1] == np.float32(state["cell.hidden"])
