"""Classes and functions of a user, for models whose import is given this file."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers as kl
from keras import ops


@keras.saving.register_keras_serializable("own")
class Leaky(kl.Layer):
    """A cell: h = a h + (1 - a) tanh(W x + R h + b), and how many events it has read.

    Args:
        units: size of h.
        learned: whether a new stream starts from a learned h.
    """

    def __init__(self, units: int, learned: bool = False, **options: Any):
        super().__init__(**options)
        self.units, self.learned = units, learned
        self.state_size = self.output_size = units

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")
        self.recurrent = self.add_weight(shape=(self.units, self.units), name="recurrent")
        self.start = self.add_weight(shape=(self.units,), name="start")

    def get_initial_state(self, batch_size: Any = None) -> Any:
        first = self.start[None] if self.learned else ops.zeros((1, self.units))
        return [ops.tile(first, (batch_size, 1))]

    def call(self, x: Any, states: Any) -> Any:
        (h,) = states
        h = 0.7 * h + 0.3 * ops.tanh(x @ self.kernel + h @ self.recurrent)
        return h, [h]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units, "learned": self.learned}


class Smoother(kl.Layer):
    """Without registration: (x, mean) -> (x - mean, new mean), event by event."""

    def call(self, x: Any, mean: Any) -> Any:
        means = []
        for step in range(x.shape[1]):
            mean = 0.9 * mean + 0.1 * x[:, step]
            means.append(mean)
        return x - ops.stack(means, axis=1), mean


class Drifting(kl.Layer):
    """Keeps a sum over the events inside the call, which no stream could continue."""

    def call(self, x: Any) -> Any:
        return ops.cumsum(x, axis=1)


@keras.saving.register_keras_serializable("own")
class TwoMeans(keras.Model):
    """[x, fast, slow] -> (x - fast, fast, slow), states of one shape."""

    def call(self, inputs: Any) -> Any:
        x, fast, slow = inputs
        values = []
        for step in range(x.shape[1]):
            slow = 0.9 * slow + 0.1 * fast
            fast = 0.5 * fast + 0.5 * x[:, step]
            values.append(x[:, step] - fast)
        return ops.stack(values, axis=1), fast, slow


@keras.saving.register_keras_serializable("own")
class Periodic(kl.Layer):
    """Time2Vec: one linear value, the others sines."""

    def __init__(self, units: int, **options: Any):
        super().__init__(**options)
        self.units = units

    def build(self, shape: Any) -> None:
        self.frequencies = self.add_weight(shape=(shape[-1], self.units), name="frequencies")

    def call(self, x: Any) -> Any:
        angles = x @ self.frequencies
        return ops.concatenate([angles[..., :1], ops.sin(angles[..., 1:])], axis=-1)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("own")
class Forecaster(keras.Model):
    """A subclassed model, whose states are inside its layers."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.lstm, self.gru = kl.LSTM(4, return_sequences=True), kl.GRU(3, return_sequences=True)
        self.out = kl.Dense(1)

    def call(self, rows: Any) -> Any:
        return {"forecast": self.out(self.gru(self.lstm(rows)) * 0.5)}


@keras.saving.register_keras_serializable("own")
class Stepper(keras.Model):
    """A subclassed model, whose state is an argument: [x, h] -> (y, h)."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.gru = kl.GRU(4, return_sequences=True, return_state=True)
        self.out = kl.Dense(2)

    def call(self, inputs: Any) -> Any:
        x, h = inputs
        values, h = self.gru(x, initial_state=h)
        return self.out(values), h


@keras.saving.register_keras_serializable("own")
def squared(x: Any) -> Any:
    return ops.square(x) - 0.5


def doubled(x: Any) -> Any:
    return x * 2.0
