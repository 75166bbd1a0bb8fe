"""The training loop of one network.

Truncated back-propagation through time: the loss of a window is differentiated within the window,
and its final state starts the next one, with the gradient stopped (Williams and Peng, 1990).
The optimiser is AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization"):

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
    w = w - rate (m^ / (sqrt(v^) + eps) + decay w),  m^ = m / (1 - b1^k),  v^ = v / (1 - b2^k)

with g clipped to a global norm, and decay on matrices only. An exponential average of the weights
is validated and kept. `arrays()` has everything that the next epoch depends on: the dropout masks
and the order of groups follow from seed and epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from math import cos, pi
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.events.schema import UNKNOWN_CODE
from models.networks.build import Forward, StepNetwork
from models.spec.decoder import DECODER
from models.spec.layout import weight_shapes
from models.spec.model import ModelSpec
from models.training.data import training_of
from models.training.decoder_training import Anchors, DecoderTrainer, mean_loss
from models.training.labels import Labels
from models.training.plan import Plan, Window, groups_of, windows_of

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7
WARM_UP_WINDOWS = 50
"""Windows over which the learning rate rises, or a fifth of all if that is less."""
SCORING_WINDOW_STEPS = 256

FloatArray = NDArray[np.float32]


class Loop:
    """Trains one network, epoch by epoch; one thread only.

    Tracing the network takes seconds: the members of an ensemble are trained by one loop, which is
    restarted for each.
    """

    def __init__(self, spec: ModelSpec, plan: Plan, seed: int):
        """Build the network and start it; arguments as for `restart`."""
        self.spec, self.plan = spec, plan
        self._training = training_of(spec)
        self.network = StepNetwork(spec)
        self._trainable = self.network.trainable_variables
        self._names = [
            name
            for name in weight_shapes(spec)
            if not name.endswith((".moving_mean", ".moving_variance"))
        ]
        self._moments = [[tf.Variable(tf.zeros_like(v)) for v in self._trainable] for _ in "mv"]
        self._average = [tf.Variable(v) for v in self._trainable]
        self._traced_seed = tf.Variable(0, dtype=tf.int32)
        self._weights = {
            head.name: float(self._training.loss_weights.get(head.name, 1.0)) for head in spec.heads
        }
        self._decoder: DecoderTrainer | None = None
        if spec.decoder is not None:
            self._weights[DECODER] = float(self._training.loss_weights.get(DECODER, 1.0))
            self._decoder = DecoderTrainer(self.network, plan, self._training, seed)
        # What a window's loss is multiplied by: 1, or how many of a head's steps it holds of
        # what windows hold on average.
        self._typical = self._steps_per_window() if self._training.weigh == "steps" else {}
        self._step = tf.function(self._train_window, autograph=False)
        self._validate_window = tf.function(self._validation_window, autograph=False)
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Begin a training with initial weights; the seed also determines orders and dropout."""
        self._seed = seed
        self._traced_seed.assign(seed % 2**31)
        self.network.initialise(seed)
        for variable in (*self._moments[0], *self._moments[1]):
            variable.assign(tf.zeros_like(variable))
        for variable, average in zip(self._trainable, self._average, strict=True):
            average.assign(variable)
        self._ended = np.zeros((len(self.plan.segments), self.network.state_size), np.float32)
        self._windows = 0
        if self._decoder is not None:
            self._decoder.seed = seed

    @cached_property
    def windows_per_epoch(self) -> int:
        """Windows of one epoch."""
        return sum(1 for group in self.plan.groups for _ in self._cut(group))

    def train_epoch(self, epoch: int) -> Iterator[float]:
        """Train one epoch; yields each window's loss, and is to be run to its end.

        Args:
            epoch: counted from 0; decides the order of groups and the dropout masks.
        """
        training = self._training
        self.network.reseed(self._seed * 100_003 + epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self.plan.groups))
        total = self.windows_per_epoch * training.epochs
        warm_up = max(1, min(WARM_UP_WINDOWS, total // 5))
        for group in (self.plan.groups[index] for index in order):
            state = self._begin([self.plan.segments[i].before for i in group])
            for window in self._cut(group):
                self._windows += 1
                warm = min(1.0, self._windows / warm_up)
                rate = training.learning_rate * warm
                if training.schedule == "cosine":
                    rate *= 0.5 * (1 + cos(pi * min(1.0, self._windows / total)))
                decay = min(training.average_decay, self._windows / (self._windows + 10))
                loss, state = self._step(
                    *self._tensors(window, self.plan.trained, self.plan.trained_labels),
                    state,
                    tf.constant([rate, decay if training.average_decay else 0.0], tf.float32),
                    tf.constant(self._windows, tf.float32),
                    self._anchors(window, self._windows, self._windows / total),
                )
                yield float(loss)
            self._ended[list(group)] = state.numpy()[: len(group)]

    def validate(self) -> dict[str, float]:
        """Mean validation loss of each head under the averaged weights, and their weighted sum.

        Every stream goes on from its last training segment, which is run again first.
        """
        raw = [variable.numpy() for variable in self._trainable]
        for variable, average in zip(self._trainable, self._average, strict=True):
            variable.assign(average)
        batch_size = self._training.batch_streams
        # Where the cuts are part of what is computed, they are those of training.
        has_fixed_cuts = self.spec.chunking != "invisible"
        steps = self._training.window_steps if has_fixed_cuts else SCORING_WINDOW_STEPS
        sums = dict.fromkeys(self._weights, 0.0)
        counts = dict.fromkeys(self._weights, 0)
        numbers = 0
        for group in groups_of(self.plan.validation, batch_size):
            segments = [self.plan.validation[index] for index in group]
            state = self._begin([segment.before for segment in segments])
            for window in windows_of(segments, batch_size, steps):
                rows, following, lengths, mask, labels = self._tensors(
                    window, self.plan.validated, self.plan.validated_labels
                )
                anchors = self._anchors(window, numbers, None)
                numbers += 1
                losses, decoded, state = self._validate_window(
                    rows, following, lengths, mask, labels, anchors, state
                )
                if decoded is not None:
                    sums[DECODER] += float(np.sum(decoded[0]))
                    counts[DECODER] += int(np.sum(decoded[1]))
                for name, value in losses.items():
                    counted = np.isfinite(labels[name]) if name in labels else mask
                    counts[name] += int(np.count_nonzero(counted))
                    sums[name] += float(value) * int(np.count_nonzero(counted))
        for variable, value in zip(self._trainable, raw, strict=True):
            variable.assign(value)
        means = {name: value / max(1, counts[name]) for name, value in sums.items()}
        means["loss"] = sum(self._weights[name] * value for name, value in means.items())
        return means

    def averaged_weights(self) -> dict[str, FloatArray]:
        """All weights, trainable ones as their average."""
        weights = self.network.get_weights()
        for name, average in zip(self._names, self._average, strict=True):
            weights[name] = average.numpy()
        return weights

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that the next epoch depends on, by name."""
        arrays: dict[str, NDArray[Any]] = {
            f"weights/{name}": value for name, value in self.network.get_weights().items()
        }
        for kind, variables in self._slots():
            for name, variable in zip(self._names, variables, strict=True):
                arrays[f"{kind}/{name}"] = variable.numpy()
        arrays["ended"] = self._ended
        arrays["windows"] = np.array([self._windows], np.int64)
        return arrays

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Restore the state that `arrays` returned."""
        marker = "weights/"
        self.network.set_weights(
            {n[len(marker) :]: v for n, v in arrays.items() if n.startswith(marker)}
        )
        for kind, variables in self._slots():
            for name, variable in zip(self._names, variables, strict=True):
                variable.assign(arrays[f"{kind}/{name}"])
        self._ended = np.array(arrays["ended"])
        self._windows = int(arrays["windows"][0])

    def _steps_per_window(self) -> dict[str, float]:
        """How many steps of each head's a window holds, on average."""
        counts = {}
        for name in self._weights:
            labels = self.plan.trained_labels.get(name)
            steps = self.plan.trained if labels is None else np.isfinite(labels)
            counts[name] = max(1.0, float(np.count_nonzero(steps)) / self.windows_per_epoch)
        return counts

    def _share(self, name: str, mask: Any, labels: Any) -> Any:
        """Weight of a head's mean loss over a window."""
        if not self._typical:
            return self._weights[name]
        counted = tf.math.is_finite(labels[name]) if name in labels else mask
        steps = tf.reduce_sum(tf.cast(counted, tf.float32))
        return self._weights[name] * steps / self._typical[name]

    def _slots(self) -> list[tuple[str, list[Any]]]:
        return [("m", self._moments[0]), ("v", self._moments[1]), ("average", self._average)]

    def _cut(self, group: tuple[int, ...]) -> Iterator[Window]:
        segments = [self.plan.segments[index] for index in group]
        return windows_of(segments, self._training.batch_streams, self._training.window_steps)

    def _begin(self, before: list[int | None]) -> Any:
        state = np.zeros((self._training.batch_streams, self.network.state_size), np.float32)
        for slot, index in enumerate(before):
            if index is not None:
                state[slot] = self._ended[index]
        return tf.constant(state)

    def _tensors(
        self, window: Window, counted: NDArray[np.bool_], labels: Labels
    ) -> tuple[FloatArray, FloatArray, NDArray[np.int32], NDArray[np.bool_], Labels]:
        valid = np.arange(window.index.shape[1]) < window.lengths[:, None]
        following = self.plan.rows[self.plan.following[window.index]]
        return (
            self.plan.rows[window.index],
            following,
            window.lengths,
            valid & counted[window.index],
            {
                name: np.where(valid, values[window.index], np.float32(np.nan))
                for name, values in labels.items()
            },
        )

    def _hide_categories(self, rows: Any, seed: Any) -> Any:
        """The rows with a share of their categories replaced by the unknown one."""
        columns = np.array([column.codes is not None for column in self.spec.columns])
        if not self._training.unknown_rate or not columns.any():
            return rows
        draws = tf.random.stateless_uniform(tf.shape(rows), seed)
        return tf.where(columns & (draws < self._training.unknown_rate), float(UNKNOWN_CODE), rows)

    def _train_window(
        self,
        rows: Any,
        following: Any,
        lengths: Any,
        mask: Any,
        labels: Any,
        state: Any,
        rates: Any,
        count: Any,
        anchors: Anchors | None = None,
    ) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            masked = self._hide_categories(
                rows, tf.stack([self._traced_seed, tf.cast(count, tf.int32)])
            )
            result, decoded = self._pass(masked, lengths, tf.stop_gradient(state), anchors, True)
            losses = self.network.losses(result.raw, following, mask, labels)
            if decoded is not None:
                losses[DECODER] = mean_loss(*decoded)
            loss = tf.add_n(
                [self._share(name, mask, labels) * value for name, value in losses.items()]
            )
        gradients = [
            tf.convert_to_tensor(gradient) if gradient is not None else tf.zeros_like(variable)
            for gradient, variable in zip(
                tape.gradient(loss, self._trainable), self._trainable, strict=True
            )
        ]
        gradients, _ = tf.clip_by_global_norm(gradients, self._training.clip_norm)
        first = 1.0 - tf.pow(BETA_1, count)
        second = 1.0 - tf.pow(BETA_2, count)
        for weight, gradient, m, v, average in zip(
            self._trainable, gradients, *self._moments, self._average, strict=True
        ):
            m.assign(BETA_1 * m + (1 - BETA_1) * gradient)
            v.assign(BETA_2 * v + (1 - BETA_2) * tf.square(gradient))
            change = (m / first) / (tf.sqrt(v / second) + EPSILON)
            if len(weight.shape) > 1:
                change += self._training.weight_decay * weight
            weight.assign(weight - rates[0] * change)
            average.assign(rates[1] * average + (1 - rates[1]) * weight)
        return loss, result.state

    def _validation_window(
        self,
        rows: Any,
        following: Any,
        lengths: Any,
        mask: Any,
        labels: Any,
        anchors: Anchors | None,
        state: Any,
    ) -> tuple[dict[str, Any], tuple[Any, Any] | None, Any]:
        result, decoded = self._pass(rows, lengths, state, anchors, False)
        return self.network.losses(result.raw, following, mask, labels), decoded, result.state

    def _pass(
        self, rows: Any, lengths: Any, state: Any, anchors: Anchors | None, training: bool
    ) -> tuple[Forward, tuple[Any, Any] | None]:
        """The network over a window; sums and counts of the decoder's losses, if it has one."""
        if self._decoder is None or anchors is None:
            return self.network.forward(rows, lengths, state, training=training), None
        result, states = self._decoder.forward(rows, lengths, state, anchors, training)
        return result, self._decoder.losses(states, anchors, training)

    def _anchors(self, window: Window, number: int, progress: float | None) -> Anchors | None:
        return None if self._decoder is None else self._decoder.anchors(window, number, progress)
