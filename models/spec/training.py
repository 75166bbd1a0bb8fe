"""Training options of a specification, as written and as resolved.

A specification may leave options open: `models.training.defaults` derives them from the data, and
the artifact contains every one. `ResolvedTraining` is the same without open options.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from models.events.schema import Frozen
from models.spec.decoder import DecoderTraining
from models.spec.layers import Rate

Epochs = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=1, le=4096)]
LearningRate = Annotated[float, Field(gt=0)]
AverageDecay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Seconds = Annotated[float, Field(gt=0)]


class TrainingSpec(Frozen):
    """Training options of `carry train`; None is derived from the data.

    Attributes:
        stream: column of the data with the stream's name.
        order_by: column that orders a stream's events; the timestamp field by default.
        validate_from: RFC 3339 time (in the schema's time zone if it has none); events from then
            on are the validation set, which selects the epoch.
        test_from: RFC 3339 time; events from then on are the test set, scored once.
        validate_share, test_share: instead of both times, shares of each stream's events: its last
            ones are the test set, and those before them the validation set.
        epochs: maximum number of epochs.
        patience: epochs without a better validation loss after which training stops (early
            stopping).
        time_limit_s: training stops after the first epoch that ends later than this; no limit if
            `epochs` is set and this is not. A run that it stops cannot be repeated exactly.
        window_steps: events per window of truncated back-propagation through time.
        segment_windows: consecutive windows that continue from a stream's state before the batch
            slot is given to a segment of another stream.
        batch_streams: segments per batch.
        learning_rate: peak learning rate of AdamW, reached after a short warm-up.
        schedule: `cosine` decays the learning rate to zero over `epochs`, `constant` keeps it.
        weight_decay: weight decay of AdamW, on matrices (not on biases and other vectors).
        clip_norm: bound of the gradient's global norm.
        average_decay: decay per window of the exponential moving average of the weights, which is
            validated and kept; 0 disables averaging.
        unknown_rate: share of category values that training replaces by the unknown category, so
            that the network learns to handle unseen categories and overfits less.
        weigh: unit of equal weight in an epoch: `steps`, or `windows` regardless of their length.
        loss_weights: weight of each head in the loss; 1 by default.
        seed: seed of weights, order and dropout.
        seeds: networks that are trained, with consecutive seeds from `seed` on; as many as
            `members` by default. More show how far results depend on chance.
        members: of the networks trained, how many are kept, the best by validation loss; several
            are merged into one that averages their outputs.
        decoder: training options of the decoder, if the model has one.
    """

    stream: str
    order_by: str | None = None
    validate_from: str | None = None
    test_from: str | None = None
    validate_share: Share | None = None
    test_share: Share | None = None
    epochs: Epochs | None = None
    patience: Epochs | None = None
    time_limit_s: Seconds | None = None
    window_steps: Steps | None = None
    segment_windows: Steps | None = None
    batch_streams: Steps | None = None
    learning_rate: LearningRate | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    average_decay: AverageDecay = 0.99
    unknown_rate: Rate = 0.0
    weigh: Literal["steps", "windows"] = "steps"
    loss_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=0)] = 1
    seeds: Annotated[int, Field(ge=1, le=16)] | None = None
    members: Annotated[int, Field(ge=1, le=16)] = 1
    decoder: DecoderTraining = DecoderTraining()

    @property
    def is_split_by_share(self) -> bool:
        """Whether each stream is split by shares of its events, not all of them by a time."""
        return self.validate_share is not None or self.test_share is not None

    @property
    def networks(self) -> int:
        """How many networks are trained."""
        return self.seeds or self.members

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if self.networks < self.members:
            raise ValueError(
                f"expected seeds to be at least members, {self.members}, got {self.seeds}"
            )
        return self

    @model_validator(mode="after")
    def _check_split(self) -> Self:
        if not self.is_split_by_share:
            return self
        for name in ("validate_from", "test_from"):
            if getattr(self, name) is not None:
                raise ValueError(f"expected {name} or shares of each stream, got both")
        if (self.validate_share or 0) + (self.test_share or 0) >= 1:
            raise ValueError(
                "expected validate_share and test_share that leave events to train on, got "
                f"{self.validate_share} and {self.test_share}"
            )
        return self

    @model_serializer(mode="wrap")
    def _omit_later_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out options that are None as well."""
        data: dict[str, Any] = serialize(self)
        return {name: value for name, value in data.items() if value is not None}


class ResolvedTraining(TrainingSpec):
    """Training options with a value for each that the data decide: the times of the split or both
    shares; and only `time_limit_s` may be None, which is no limit."""

    epochs: Epochs
    patience: Epochs
    window_steps: Steps
    segment_windows: Steps
    batch_streams: Steps
    learning_rate: LearningRate

    @model_validator(mode="after")
    def _check_complete_split(self) -> Self:
        names = ("validate_from", "test_from")
        if self.is_split_by_share:
            names = ("validate_share", "test_share")
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(f"expected {' and '.join(names)}, got none of {missing}")
        return self
