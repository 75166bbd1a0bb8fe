"""Specifications of heads, which turn a layer's values into named outputs.

The bounds here are shared by every implementation: `models.networks.heads`, `models.onnx.heads`
and, for the steps of a decoder, `models.decoding.forecasts`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeGuard

from pydantic import Field, model_validator

from models.events.schema import Frozen
from models.spec.layers import ActivationName, LayerName, Units

HeadName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")]
"""An output's name: wider than a layer's, so that imported models keep theirs."""

LOG_DEVIATION_LIMIT = 7.0
"""Bound of the absolute log deviation of a Gaussian: deviations of 0.0009 to 1,097."""
DEVIATION_LIMIT = 1e18
"""Bound of (z - mean) / deviation, so that 256 squares still sum to a finite float32."""
MAX_ALL = 256
"""The largest vocabulary all of whose probabilities are an output by default."""
DEFAULT_TOP = 10
EXPONENT_LIMIT = 88.0
"""Bound of the argument when `signed_log1p` is inverted: exp(88) is a float32, exp(89) is not."""


class _Head(Frozen):
    """Base of all heads: the output's name and the input layer (the last one by default)."""

    name: HeadName
    input: LayerName | Literal[""] = ""


class SequenceHead(_Head):
    """The layer's values at every step, as with `return_sequences=True`; no weights.

    Attributes:
        shape: arranges the values of a step, the last axis fastest; one axis by default.
    """

    later_options = frozenset({"shape"})

    kind: Literal["sequence"] = "sequence"
    shape: tuple[Annotated[int, Field(ge=1)], ...] = ()


class DenseHead(_Head):
    """A Dense layer at every step, whose values are the outputs."""

    kind: Literal["dense"] = "dense"
    units: Units
    activation: ActivationName = "linear"
    use_bias: bool = True
    targets: tuple[str, ...] = ()
    """Numeric fields of the next event, the regression targets of training, one per unit."""


class ForecastHead(_Head):
    """Forecast of the next event's numeric fields in their units: quantiles, or one point each."""

    kind: Literal["forecast"] = "forecast"
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    quantiles: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.5, 0.9)

    @model_validator(mode="after")
    def _check_quantiles_rise(self) -> ForecastHead:
        if list(self.quantiles) != sorted(set(self.quantiles)):
            raise ValueError(f"expected rising quantiles, got {list(self.quantiles)}")
        return self


class ClassificationHead(_Head):
    """Class probabilities of the next event.

    `target` is a categorical field (one probability per code), a boolean field, or a numeric
    field with `above`, for the probability of value > above.

    With `top`, for categorical fields of many categories, the outputs are the `top` most probable
    ones instead of all, and the surprise of the event itself: -log p in nats, with p as of the
    event before. What the head reads at a chunk's last event is part of the state; a stream's first
    event is scored as after zeros. Fitting sets `top` for a vocabulary of more than `MAX_ALL`.
    """

    later_options = frozenset({"top"})

    kind: Literal["classification"] = "classification"
    target: str
    above: float | None = None
    top: Annotated[int, Field(ge=1, le=10_000)] | None = None


class LabelHead(_Head):
    """Probabilities of a label of the current event, which is not a field of the event.

    Labels are known later, or for past events only: a column of the training data. With `classes`,
    a cell contains one of them, and each class has a probability; otherwise a cell is true or
    false, and the output is the probability of true. An empty cell is a step without a label: its
    event is an input like any other, but the step is neither trained nor scored.
    """

    kind: Literal["label"] = "label"
    column: str = ""
    """Column of the data; empty for the head's name."""
    classes: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = ()

    @model_validator(mode="after")
    def _check_classes(self) -> LabelHead:
        if len(self.classes) == 1 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"expected two or more distinct classes, got {list(self.classes)}")
        return self

    @property
    def source(self) -> str:
        """The column of the label."""
        return self.column or self.name


class AnomalyHead(_Head):
    """Anomaly score: negative log-likelihood of each event under the previous forecast, in nats.

    The forecast is a Gaussian per numeric target, a softmax per categorical and a Bernoulli
    per boolean target. Its parameters after a chunk's last event are part of the state, and the
    next chunk's first event is scored by them. A stream's first event is scored with zero
    parameters: a standard normal of the standardised value, uniform categories.
    """

    kind: Literal["anomaly"] = "anomaly"
    targets: Annotated[tuple[str, ...], Field(min_length=1)]


def has_surprise(head: _Head) -> TypeGuard[ClassificationHead]:
    """Whether a head gives the most probable categories and the surprise of each event."""
    return isinstance(head, ClassificationHead) and head.top is not None


def scores_events(head: _Head) -> bool:
    """Whether a head scores each event by a forecast from before it, which the state keeps."""
    return isinstance(head, AnomalyHead) or has_surprise(head)


def nats_output(head: _Head) -> str:
    """The output with each event's -log p, of a head that scores events."""
    return f"{head.name}.surprise" if has_surprise(head) else head.name


Head = Annotated[
    SequenceHead | DenseHead | ForecastHead | ClassificationHead | LabelHead | AnomalyHead,
    Field(discriminator="kind"),
]
