"""Specifications of layers: inputs, options, and the shapes of outputs, weights and state parts.

Contains neither weights nor a runtime, but the constants that runtimes share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from models.events.schema import Frozen

UNIT_NORM_EPSILON = 1e-12
"""Least sum of squares of a unit normalization, that of `keras.ops.normalize`."""
NORMALISATION_EPSILON = 1e-3
"""Added to the variance inside a cell, the default of `keras.layers.LayerNormalization`."""
MASKED_SCORE = -1e30
"""Attention score of a masked step: its exp is 0 next to any other score."""
EMPTY_MAXIMUM = -1e300
"""Maximum attention score of no steps: a float64 below every float32 score."""
FEATURES = "features"
"""Input name of the encoded rows, in which categories are replaced by their embeddings."""
MAX_WIDTH = 16 * 16384
"""Largest width of a layer: a concatenation has no weights, and can double the width."""

LayerName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Units = Annotated[int, Field(ge=1, le=16384)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Shapes = dict[str, tuple[int, ...]]
ActivationName = Literal[
    "linear",
    "relu",
    "sigmoid",
    "hard_sigmoid",
    "tanh",
    "softmax",
    "softplus",
    "softsign",
    "elu",
    "selu",
    "gelu",
    "silu",
    "exponential",
    "leaky_relu",
    "relu6",
    "hard_silu",
    "mish",
    "log_softmax",
]


class _Layer(Frozen):
    """Base of all layers: a name and the names of its input layers.

    An empty name becomes `<kind>_<n>`, with n counting the layers of that kind from 1. Empty
    `inputs` mean the previous layer; `features` are the encoded rows.
    """

    name: LayerName | Literal[""] = ""
    inputs: tuple[LayerName, ...] = ()

    is_stepwise: ClassVar[bool] = False
    """Whether it treats every step alike, and so is constant if its inputs are."""

    @property
    def is_non_causal(self) -> bool:
        """Whether its value at a step depends on later steps of the same chunk."""
        return False

    def width_of(self, read: Sequence[int]) -> int:
        """Values per step, for inputs of these widths.

        Raises:
            ValueError: it cannot read them.
        """
        return read[0]

    def weight_shapes(self, read: int) -> Shapes:
        """Shapes of its weights in Keras' layout by kind, for an input of this width."""
        return {}

    def state_shapes(self, read: int) -> Shapes:
        """Shapes of its state parts by name, for an input of this width."""
        return {}


class _Stepwise(_Layer):
    is_stepwise: ClassVar[bool] = True


class _Recurrent(_Layer):
    """Base of recurrent layers.

    Attributes:
        starts_from: the layer whose returned state, of the same call, is the initial state of
            each call; the layer then has no state parts.
    """

    units: Units
    activation: ActivationName = "tanh"
    use_bias: bool = True
    dropout: Rate = 0.0
    recurrent_dropout: Rate = 0.0
    starts_from: LayerName | None = None

    @property
    def is_non_causal(self) -> bool:
        return self.starts_from is not None

    @property
    def width(self) -> int:
        """Values per step, and size of the hidden part of a cell."""
        return self.units

    @property
    def returned_state(self) -> dict[str, int]:
        """Sizes of the state parts that it returns, in Keras' order."""
        return {"hidden": self.width}

    def width_of(self, read: Sequence[int]) -> int:
        return self.width

    def state_shapes(self, read: int) -> Shapes:
        if self.starts_from is not None:
            return {}
        return {part: (size,) for part, size in self.returned_state.items()}

    def _cell_shapes(self, read: int, gates: int) -> Shapes:
        shapes: Shapes = {"kernel": (read, gates), "recurrent_kernel": (self.width, gates)}
        return {**shapes, "bias": (gates,)} if self.use_bias else shapes


class LstmLayer(_Recurrent):
    """Keras `LSTM`: state parts `hidden` h and `carry` c, gates in Keras' order i, f, c, o.

    Attributes:
        peepholes: gates see the carry (Gers and Schmidhuber 2000).
        layer_normalization: inside the cell (Ba et al. 2016).
        projection: P <= units, size of the hidden part and of the output; the carry has `units`
            values (Sak et al. 2014).

    `models.networks.cells` has the equations.
    """

    kind: Literal["lstm"] = "lstm"
    recurrent_activation: ActivationName = "sigmoid"
    peepholes: bool = False
    layer_normalization: bool = False
    projection: Units | None = None

    @model_validator(mode="after")
    def _check_projection(self) -> LstmLayer:
        if self.projection is not None and self.projection > self.units:
            raise ValueError(
                f"projection: expected at most `units` ({self.units}), got {self.projection}"
            )
        return self

    @property
    def width(self) -> int:
        return self.units if self.projection is None else self.projection

    @property
    def returned_state(self) -> dict[str, int]:
        return {"hidden": self.width, "carry": self.units}

    @property
    def is_standard(self) -> bool:
        """Whether it is an LSTM of Keras and ONNX, without the extensions of Carry."""
        return not (self.peepholes or self.layer_normalization or self.projection is not None)

    def weight_shapes(self, read: int) -> Shapes:
        gates = 4 * self.units
        shapes = self._cell_shapes(read, gates)
        if self.peepholes:
            shapes["peepholes"] = (3 * self.units,)
        if self.layer_normalization:
            shapes |= {"kernel_gamma": (gates,), "recurrent_gamma": (gates,)}
            shapes |= {"carry_gamma": (self.units,), "carry_beta": (self.units,)}
        if self.projection is not None:
            shapes["projection"] = (self.units, self.projection)
        return shapes


class GruLayer(_Recurrent):
    """Keras `GRU`: one state part, `hidden` h, gates in Keras' order z, r, h."""

    kind: Literal["gru"] = "gru"
    recurrent_activation: ActivationName = "sigmoid"
    reset_after: bool = True

    def weight_shapes(self, read: int) -> Shapes:
        shapes = self._cell_shapes(read, 3 * self.units)
        if self.use_bias and self.reset_after:
            shapes["bias"] = (2, 3 * self.units)
        return shapes


class SimpleRnnLayer(_Recurrent):
    """Keras `SimpleRNN` (Elman 1990): one state part, `hidden` h."""

    kind: Literal["simple_rnn"] = "simple_rnn"

    def weight_shapes(self, read: int) -> Shapes:
        return self._cell_shapes(read, self.units)


class BidirectionalLayer(_Recurrent):
    """Keras `Bidirectional`: a cell that reads the steps forward, and one that reads them backward.

    Each direction is a separate layer, named `<name>.forward` and `<name>.backward`, with its own
    weights and state parts; `merge` combines their outputs at each step. With `starts_from`, which
    names a bidirectional layer of the same cell and units, the initial state of each direction is
    the final state of that layer's same direction.
    """

    kind: Literal["bidirectional"] = "bidirectional"
    cell: Literal["lstm", "gru"] = "lstm"
    merge: Literal["concat", "sum", "mul", "ave"] = "concat"
    recurrent_activation: ActivationName = "sigmoid"
    reset_after: bool = True

    @property
    def is_non_causal(self) -> bool:
        return True

    @model_validator(mode="after")
    def _check_cell_options(self) -> BidirectionalLayer:
        if self.cell == "lstm" and not self.reset_after:
            raise ValueError("reset_after: an option of the gru cell, got cell lstm")
        return self

    @property
    def directions(self) -> tuple[LstmLayer | GruLayer, LstmLayer | GruLayer]:
        """The two cells as layers: forward, backward."""
        return self._direction("forward"), self._direction("backward")

    @property
    def width(self) -> int:
        return 2 * self.units if self.merge == "concat" else self.units

    @property
    def returned_state(self) -> dict[str, int]:
        return {
            f"{cell.name.removeprefix(f'{self.name}.')}.{part}": size
            for cell in self.directions
            for part, size in cell.returned_state.items()
        }

    def weight_shapes(self, read: int) -> Shapes:
        return {
            f"{cell.name.removeprefix(f'{self.name}.')}.{kind}": shape
            for cell in self.directions
            for kind, shape in cell.weight_shapes(read).items()
        }

    def _direction(self, name: str) -> LstmLayer | GruLayer:
        # Built without validation: the options are validated, and a name may not contain a dot.
        options = self.model_dump(exclude={"kind", "cell", "merge", "starts_from", "name"})
        options["name"] = f"{self.name}.{name}"
        if self.cell == "gru":
            return GruLayer.model_construct(**options)
        del options["reset_after"]
        return LstmLayer.model_construct(**options)


class Conv1dLayer(_Layer):
    """Keras `Conv1D` with causal padding: each step reads itself and `past_steps` steps before it.

    The state part `past` holds the last `past_steps` rows of its input; before the first event
    they are zero, as Keras pads.

    Attributes:
        units: filters.
        kernel_size: steps that the kernel reads.
        dilation: distance of these steps.
    """

    kind: Literal["conv1d"] = "conv1d"
    units: Units
    kernel_size: Annotated[int, Field(ge=1, le=1024)]
    dilation: Annotated[int, Field(ge=1, le=4096)] = 1
    activation: ActivationName = "linear"
    use_bias: bool = True

    @property
    def past_steps(self) -> int:
        """Number of earlier steps that a step depends on."""
        return (self.kernel_size - 1) * self.dilation

    def width_of(self, read: Sequence[int]) -> int:
        return self.units

    def weight_shapes(self, read: int) -> Shapes:
        kernel: Shapes = {"kernel": (self.kernel_size, read, self.units)}
        return {**kernel, "bias": (self.units,)} if self.use_bias else kernel

    def state_shapes(self, read: int) -> Shapes:
        return {"past": (self.past_steps, read)} if self.past_steps else {}


class DenseLayer(_Stepwise):
    """Keras `Dense`, with the same weights at every step."""

    kind: Literal["dense"] = "dense"
    units: Units
    activation: ActivationName = "linear"
    use_bias: bool = True

    def width_of(self, read: Sequence[int]) -> int:
        return self.units

    def weight_shapes(self, read: int) -> Shapes:
        kernel: Shapes = {"kernel": (read, self.units)}
        return {**kernel, "bias": (self.units,)} if self.use_bias else kernel


class ActivationLayer(_Stepwise):
    """Keras `Activation`."""

    kind: Literal["activation"] = "activation"
    activation: ActivationName


class DropoutLayer(_Stepwise):
    """Keras `Dropout`: active in training only."""

    kind: Literal["dropout"] = "dropout"
    rate: Rate


class _Normalization(_Stepwise):
    epsilon: Annotated[float, Field(gt=0)] = 1e-3
    center: bool = True
    scale: bool = True

    def weight_shapes(self, read: int) -> Shapes:
        used = {"gamma": self.scale, "beta": self.center}
        return {kind: (read,) for kind, is_used in used.items() if is_used}


class LayerNormalizationLayer(_Normalization):
    """Keras `LayerNormalization` over the last axis."""

    kind: Literal["layer_normalization"] = "layer_normalization"


class BatchNormalizationLayer(_Normalization):
    """Keras `BatchNormalization` over the last axis, with its moving statistics (inference)."""

    kind: Literal["batch_normalization"] = "batch_normalization"

    def weight_shapes(self, read: int) -> Shapes:
        moving = dict.fromkeys(("moving_mean", "moving_variance"), (read,))
        return {**super().weight_shapes(read), **moving}


class RmsNormalizationLayer(_Stepwise):
    """Keras `RMSNormalization` over the last axis: x scale / sqrt(mean(x^2) + epsilon)."""

    kind: Literal["rms_normalization"] = "rms_normalization"
    epsilon: Annotated[float, Field(gt=0)] = 1e-6

    def weight_shapes(self, read: int) -> Shapes:
        return {"scale": (read,)}


class UnitNormalizationLayer(_Stepwise):
    """Keras `UnitNormalization` over the last axis: x / sqrt(max(sum(x^2), 1e-12))."""

    kind: Literal["unit_normalization"] = "unit_normalization"


class AffineLayer(_Stepwise):
    """(x - shift) scale + offset, one constant of each per value: Keras' `Normalization` and
    `Rescaling`.

    Subtracting first is exact where values are large and close together. The constants are weights
    that training does not change.
    """

    kind: Literal["affine"] = "affine"

    def weight_shapes(self, read: int) -> Shapes:
        return dict.fromkeys(("shift", "scale", "offset"), (read,))


class PreluLayer(_Stepwise):
    """Keras `PReLU` with one slope per value: x where x >= 0, slope x elsewhere."""

    kind: Literal["prelu"] = "prelu"

    def weight_shapes(self, read: int) -> Shapes:
        return {"slope": (read,)}


class SliceLayer(_Stepwise):
    """The values `start` to `stop - 1` of each step."""

    kind: Literal["slice"] = "slice"
    start: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _check_order(self) -> SliceLayer:
        if self.stop <= self.start:
            raise ValueError(f"stop: expected more than `start` ({self.start}), got {self.stop}")
        return self

    def width_of(self, read: Sequence[int]) -> int:
        if self.stop > read[0]:
            raise ValueError(
                f"layer {self.name!r}: expected `stop` within the {read[0]} values of "
                f"{self.inputs[0]!r}, got {self.stop}"
            )
        return self.stop - self.start


class MergeLayer(_Stepwise):
    """Keras `Add`, `Multiply`, `Average`, `Maximum`, `Minimum` or `Concatenate` (last axis) of two
    or more layers, or `Subtract` of two."""

    kind: Literal["add", "subtract", "multiply", "average", "maximum", "minimum", "concatenate"]

    def width_of(self, read: Sequence[int]) -> int:
        if self.kind == "subtract" and len(read) != 2:
            raise ValueError(
                f"layer {self.name!r}: expected two inputs to subtract, got {len(read)}"
            )
        if self.kind == "concatenate":
            if sum(read) > MAX_WIDTH:
                raise ValueError(
                    f"layer {self.name!r}: expected at most {MAX_WIDTH} values per step, "
                    f"got {sum(read)}"
                )
            return sum(read)
        if len(set(read)) > 1:
            raise ValueError(
                f"layer {self.name!r}: expected inputs of one width to {self.kind}, got {read}"
            )
        return read[0]


class AttentionLayer(_Layer):
    """Attention with context (Yang et al. 2016): a weighted mean of its inputs, of their width.

    Attributes:
        over: `chunk`: one value for the whole chunk, the same at every step; `stream`: at each
            step over all steps of the stream so far, with the state parts `maximum`,
            `normaliser` and `sum`, whose sums are stored as a float32 and its remainder.
        units: size of the hidden layer that scores a step.

    `models.networks.layers` has the equations.
    """

    kind: Literal["attention"] = "attention"
    over: Literal["chunk", "stream"]
    units: Units

    @property
    def is_non_causal(self) -> bool:
        return self.over == "chunk"

    def weight_shapes(self, read: int) -> Shapes:
        return {"kernel": (read, self.units), "bias": (self.units,), "context": (self.units,)}

    def state_shapes(self, read: int) -> Shapes:
        if self.over == "chunk":
            return {}
        return {"maximum": (), "normaliser": (2,), "sum": (2, read)}


Cell = LstmLayer | GruLayer | SimpleRnnLayer
"""Recurrent layers of one direction."""
Recurrent = Cell | BidirectionalLayer
_Plain = (
    DenseLayer
    | ActivationLayer
    | DropoutLayer
    | LayerNormalizationLayer
    | RmsNormalizationLayer
    | UnitNormalizationLayer
    | BatchNormalizationLayer
    | AffineLayer
    | PreluLayer
    | SliceLayer
    | MergeLayer
)
Layer = Annotated[
    Recurrent | Conv1dLayer | _Plain | AttentionLayer,
    Field(discriminator="kind"),
]
