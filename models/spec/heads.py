"""The kinds of heads, which turn what a layer gives into named outputs.

Descriptions and the bounds that all who compute them keep; `models.networks.heads`,
`models.onnx.heads` and, for a decoder's steps, `models.decoding.forecasts` compute them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.events.schema import Frozen
from models.spec.layers import ActivationName, LayerName, Units

LOG_DEVIATION_LIMIT = 7.0
"""Bound of a Gaussian's log deviation, either way: deviations of 0.0009 to 1,097."""
DEVIATION_LIMIT = 1e18
"""Bound of (z - mean) / deviation, so that 256 squares still sum to a finite float32."""
EXPONENT_LIMIT = 88.0
"""Bound of what `signed_log1p` inverts: exp(88) is a float32, exp(89) is not."""


class _Head(Frozen):
    """What every head has: the output's name and the layer it reads (the last by default)."""

    name: LayerName
    input: LayerName | Literal[""] = ""


class SequenceHead(_Head):
    """The layer's sequence itself: what `return_sequences=True` gives. No weights."""

    kind: Literal["sequence"] = "sequence"


class DenseHead(_Head):
    """A Dense layer per step, with the outputs as they are."""

    kind: Literal["dense"] = "dense"
    units: Units
    activation: ActivationName = "linear"
    use_bias: bool = True
    targets: tuple[str, ...] = ()
    """Numeric event fields of the next event that training regresses on, one per unit."""


class ForecastHead(_Head):
    """The next event's numeric fields, in their own units: quantiles, or one point each."""

    kind: Literal["forecast"] = "forecast"
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    quantiles: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.5, 0.9)

    @model_validator(mode="after")
    def _rising(self) -> ForecastHead:
        if list(self.quantiles) != sorted(set(self.quantiles)):
            raise ValueError(f"expected rising quantiles, got {list(self.quantiles)}")
        return self


class ClassificationHead(_Head):
    """Probabilities of the next event's category.

    `target` is a categorical field (one probability per code), a boolean field, or a numeric
    field with `above`: then the one probability is that of value > above.
    """

    kind: Literal["classification"] = "classification"
    target: str
    above: float | None = None


class LabelHead(_Head):
    """Probabilities of a label of the event itself, which the event does not carry.

    Labels are known later, or only for the past: a column of the training data that is no
    field of the events. With `classes` (one probability each) a cell holds one of them, without
    it is true or false (one probability, that of true). An empty cell is a step without a
    label: it is read like any other, and neither trained nor scored.
    """

    kind: Literal["label"] = "label"
    column: str = ""
    """The data's column; the head's name where empty."""
    classes: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = ()

    @model_validator(mode="after")
    def _classes(self) -> LabelHead:
        if len(self.classes) == 1 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"expected two or more distinct classes, got {list(self.classes)}")
        return self

    @property
    def source(self) -> str:
        """The column that holds the label."""
        return self.column or self.name


class AnomalyHead(_Head):
    """How surprising each event is under the forecast made one event earlier, in nats.

    The forecast is a Gaussian per numeric target, a softmax per categorical and a Bernoulli
    per boolean; its parameters after a chunk's last event are a part of the state, so the
    next chunk's first event is judged by them. A stream's first event is judged by the
    zero parameters: a standard normal of the standardised value, uniform categories.
    """

    kind: Literal["anomaly"] = "anomaly"
    targets: Annotated[tuple[str, ...], Field(min_length=1)]


Head = Annotated[
    SequenceHead | DenseHead | ForecastHead | ClassificationHead | LabelHead | AnomalyHead,
    Field(discriminator="kind"),
]
