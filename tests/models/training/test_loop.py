"""The training loop: optimiser, random order and dropout, validation."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("tensorflow")

from models.training.data import fitted_spec, streams_of
from models.training.loop import BETA_1, BETA_2, EPSILON, WARM_UP_WINDOWS, Loop
from models.training.plan import Window, plan_of
from tests.support.training import HOUR_MS, latch_frame, latch_spec

Arrays = dict[str, NDArray[Any]]


def loop_of(*, dropout: float = 0.0, **training: Any) -> Loop:
    """A loop over a network that is small to compile."""
    lstm = {"kind": "lstm", "units": 2}
    spec = latch_spec(dropout=dropout, recurrent=lstm, heads=["up"], **training)
    streams = streams_of(spec, latch_frame())
    fitted = fitted_spec(spec, streams, 16 * HOUR_MS)
    return Loop(fitted, plan_of(fitted, streams, {}, 16 * HOUR_MS, 22 * HOUR_MS), 1)


def part(arrays: Arrays, kind: str) -> Arrays:
    """Copies of the weights, of their average or of a moment, by weight."""
    prefix = f"{kind}/"
    return {n.removeprefix(prefix): v.copy() for n, v in arrays.items() if n.startswith(prefix)}


def norm(gradients: Arrays) -> float:
    return float(np.sqrt(sum(np.square(each).sum() for each in gradients.values())))


def adamw(loop: Loop, schedule: str, average_decay: float) -> list[Arrays]:
    """Check some steps against the module's equations; returns the gradients that were used."""
    total = loop.windows_per_epoch * 4
    before, used = loop.arrays(), []
    for count, _ in zip(range(1, 5), loop.train_epoch(0), strict=False):
        after = loop.arrays()
        m, v = part(before, "m"), part(before, "v")
        gradients = {n: (x - BETA_1 * m[n]) / (1 - BETA_1) for n, x in part(after, "m").items()}
        used.append(gradients)
        rate = 0.1 * min(1, count / min(WARM_UP_WINDOWS, total // 5))
        if schedule == "cosine":
            rate *= 0.5 * (1 + cos(pi * count / total))
        decay = min(average_decay, count / (count + 10)) if average_decay else 0.0
        for name, weight in part(before, "weights").items():
            second = BETA_2 * v[name] + (1 - BETA_2) * np.square(gradients[name])
            np.testing.assert_allclose(part(after, "v")[name], second, rtol=1e-3, atol=1e-12)
            mean = part(after, "m")[name] / (1 - BETA_1**count)
            change = mean / (np.sqrt(part(after, "v")[name] / (1 - BETA_2**count)) + EPSILON)
            if weight.ndim > 1:
                change += 0.5 * weight
            expected = weight - rate * change
            np.testing.assert_allclose(part(after, "weights")[name], expected, rtol=1e-4, atol=1e-6)
            average = decay * part(before, "average")[name] + (1 - decay) * expected
            np.testing.assert_allclose(part(after, "average")[name], average, rtol=1e-4, atol=1e-6)
        before = after
    return used


def test_optimiser_is_adamw_with_clipped_gradients() -> None:
    shared = {"weight_decay": 0.5, "learning_rate": 0.1}
    loop = loop_of(clip_norm=0.01, schedule="cosine", average_decay=0.99, **shared)
    clipped = adamw(loop, "cosine", 0.99)
    np.testing.assert_allclose([norm(each) for each in clipped], 0.01, rtol=1e-3)
    loop = loop_of(clip_norm=100.0, schedule="constant", average_decay=0.0, **shared)
    whole = adamw(loop, "constant", 0.0)
    assert max(norm(each) for each in whole) < 100
    share = 0.01 / norm(whole[0])
    assert share < 0.5
    for name, gradient in whole[0].items():
        np.testing.assert_allclose(clipped[0][name], share * gradient, rtol=1e-3, atol=1e-8)


def test_validation_uses_averaged_weights_and_keeps_the_raw_ones() -> None:
    """Also: a restarted loop has kept nothing."""
    loop = loop_of(average_decay=0.9, learning_rate=0.05)
    initial = {name: value.copy() for name, value in loop.arrays().items()}
    for _ in loop.train_epoch(0):
        pass
    # copies, because the loop updates its own arrays in place
    before = {name: value.copy() for name, value in loop.arrays().items()}
    raw, averaged = part(before, "weights"), part(before, "average")
    assert norm({name: value - averaged[name] for name, value in raw.items()}) > 0.01
    losses = loop.validate()
    for name, value in loop.arrays().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    loop.restore({**before, **{f"weights/{name}": value for name, value in averaged.items()}})
    assert loop.validate() == losses
    loop.restore({**before, **{f"average/{name}": value for name, value in raw.items()}})
    assert loop.validate() != losses
    loop.restart(1)
    for name, value in loop.arrays().items():
        np.testing.assert_array_equal(value, initial[name], err_msg=name)


def epoch_of(loop: Loop, epoch: int) -> dict[tuple[int, ...], float]:
    """Losses by the first rows of each window, in the order in which they ran."""
    ran: list[tuple[int, ...]] = []
    tensors = loop._tensors

    def recorded(window: Window, *rest: Any) -> Any:
        ran.append(tuple(window.index[:, 0].tolist()))
        return tensors(window, *rest)

    loop._tensors = recorded  # type: ignore[method-assign]
    losses = list(loop.train_epoch(epoch))
    loop._tensors = tensors  # type: ignore[method-assign]
    return dict(zip(ran, losses, strict=True))


def test_order_and_dropout_differ_between_epochs_and_seeds() -> None:
    """The weights do not move, and every stream is one segment: the same windows each time."""
    still = {"learning_rate": 1e-30, "weight_decay": 0.0, "segment_windows": 50}
    loop = loop_of(dropout=0.5, batch_streams=4, **still)
    arrays = {name: value.copy() for name, value in loop.arrays().items()}
    ran = []
    for seed in (1, 2):
        loop.restart(seed)
        loop.restore(arrays)
        ran += [epoch_of(loop, epoch) for epoch in (0, 1)]
    for index, one in enumerate(ran):
        for other in ran[:index]:
            assert set(one) == set(other)
            assert list(one) != list(other)
            assert all(one[window] != other[window] for window in one)
    loop.restart(1)
    loop.restore(arrays)
    repeated = epoch_of(loop, 1)
    assert list(repeated.items()) == list(ran[1].items())
