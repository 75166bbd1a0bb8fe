"""The oracle of the other tests reproduces the post's printed tables."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.oracle import oracle_step
from tests.support.post_tables import INPUT, OUTPUTS, PRINTED, STATES, post_model


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_oracle_reproduces_the_printed_numbers(kind: str) -> None:
    spec, weights = post_model(kind)
    expected, expected_state = OUTPUTS[kind], list(STATES[kind].values())
    rows = np.array(INPUT).reshape(5, 1)
    outputs, state = oracle_step(spec, weights, rows, np.zeros(len(expected_state)))
    np.testing.assert_allclose(outputs[:, 0], expected, rtol=0, atol=PRINTED)
    np.testing.assert_allclose(state, expected_state, rtol=0, atol=PRINTED)
