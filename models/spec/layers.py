"""Layers: their options, sizes, and the chunking semantics that they give a network.

Contains neither weights nor a runtime, but the constants that runtimes share. The outputs of a
network may depend on how a stream is cut into chunks:

    invisible   every layer is causal and continues from its own state: outputs do not depend on
                the chunk boundaries
    per_chunk   some layer sees the chunk as a whole: each chunk is one Keras call from the carried
                state, and outputs depend on the chunk boundaries
    whole       some layer reads backward: only complete sequences can be processed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.events.schema import Frozen

NORMALISATION_EPSILON = 1e-3
"""Added to the variance inside a cell, the default of `keras.layers.LayerNormalization`."""
MASKED_SCORE = -1e30
"""Attention score of a masked step: its exp is 0 next to any other score."""
EMPTY_MAXIMUM = -1e300
"""Maximum attention score of no steps: a float64 below every float32 score."""

LayerName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Units = Annotated[int, Field(ge=1, le=16384)]
MAX_WIDTH = 16 * 16384
"""Largest width of a layer: a concatenation has no weights, and can double the width."""
Rate = Annotated[float, Field(ge=0, lt=1)]
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
]


class _Layer(Frozen):
    """Base of all layers: a name and the names of its input layers.

    An empty name becomes `<kind>_<n>`, with n counting the layers of that kind from 1. Empty
    `inputs` mean the previous layer; `features` are the encoded rows.
    """

    name: LayerName | Literal[""] = ""
    inputs: tuple[LayerName, ...] = ()


class LstmLayer(_Layer):
    """Keras `LSTM`: state parts `hidden` h and `carry` c, gates in Keras' order i, f, c, o.

    Attributes:
        peepholes: gates see the carry (Gers and Schmidhuber 2000).
        layer_normalization: inside the cell (Ba et al. 2016).
        projection: P <= units, size of the hidden part and of the output; the carry has `units`
            values (Sak et al. 2014).
        starts_from: the layer whose returned state, of the same call, is the initial state of
            each call; the layer then has no state parts.

    `models.networks.cells` has the equations.
    """

    kind: Literal["lstm"] = "lstm"
    units: Units
    activation: ActivationName = "tanh"
    recurrent_activation: ActivationName = "sigmoid"
    use_bias: bool = True
    dropout: Rate = 0.0
    recurrent_dropout: Rate = 0.0
    peepholes: bool = False
    layer_normalization: bool = False
    projection: Units | None = None
    starts_from: LayerName | None = None

    @model_validator(mode="after")
    def _check_projection(self) -> LstmLayer:
        if self.projection is not None and self.projection > self.units:
            raise ValueError(
                f"projection: expected at most `units` ({self.units}), got {self.projection}"
            )
        return self

    @property
    def width(self) -> int:
        """Size of the hidden part, and of the output at every step."""
        return self.units if self.projection is None else self.projection

    @property
    def is_standard(self) -> bool:
        """Whether it is an LSTM of Keras and ONNX, without the extensions of Carry."""
        return not (self.peepholes or self.layer_normalization or self.projection is not None)


class GruLayer(_Layer):
    """Keras `GRU`: one state part, `hidden` h, gates in Keras' order z, r, h.

    `starts_from` has the same meaning as in `LstmLayer`.
    """

    kind: Literal["gru"] = "gru"
    units: Units
    activation: ActivationName = "tanh"
    recurrent_activation: ActivationName = "sigmoid"
    use_bias: bool = True
    reset_after: bool = True
    dropout: Rate = 0.0
    recurrent_dropout: Rate = 0.0
    starts_from: LayerName | None = None


class SimpleRnnLayer(_Layer):
    """Keras `SimpleRNN` (Elman 1990): one state part, `hidden` h.

    `starts_from` has the same meaning as in `LstmLayer`.
    """

    kind: Literal["simple_rnn"] = "simple_rnn"
    units: Units
    activation: ActivationName = "tanh"
    use_bias: bool = True
    dropout: Rate = 0.0
    recurrent_dropout: Rate = 0.0
    starts_from: LayerName | None = None


class BidirectionalLayer(_Layer):
    """Keras `Bidirectional`: a cell that reads the steps forward, and one that reads them backward.

    Each direction is a separate layer, named `<name>.forward` and `<name>.backward`, with its own
    weights and state parts; `merge` combines their outputs at each step. With `starts_from`, which
    names a bidirectional layer of the same cell and units, the initial state of each direction is
    the final state of that layer's same direction, and there are no state parts.
    """

    kind: Literal["bidirectional"] = "bidirectional"
    cell: Literal["lstm", "gru"] = "lstm"
    units: Units
    merge: Literal["concat", "sum", "mul", "ave"] = "concat"
    activation: ActivationName = "tanh"
    recurrent_activation: ActivationName = "sigmoid"
    use_bias: bool = True
    reset_after: bool = True
    dropout: Rate = 0.0
    recurrent_dropout: Rate = 0.0
    starts_from: LayerName | None = None

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
        """Values per step."""
        return 2 * self.units if self.merge == "concat" else self.units

    def _direction(self, name: str) -> LstmLayer | GruLayer:
        # Built without validation: the options are validated, and a name may not contain a dot.
        options = self.model_dump(exclude={"kind", "cell", "merge", "starts_from", "name"})
        options["name"] = f"{self.name}.{name}"
        if self.cell == "gru":
            return GruLayer.model_construct(**options)
        del options["reset_after"]
        return LstmLayer.model_construct(**options)


class DenseLayer(_Layer):
    """Keras `Dense`, with the same weights at every step."""

    kind: Literal["dense"] = "dense"
    units: Units
    activation: ActivationName = "linear"
    use_bias: bool = True


class ActivationLayer(_Layer):
    """Keras `Activation`."""

    kind: Literal["activation"] = "activation"
    activation: ActivationName


class DropoutLayer(_Layer):
    """Keras `Dropout`: active in training only."""

    kind: Literal["dropout"] = "dropout"
    rate: Rate


class LayerNormalizationLayer(_Layer):
    """Keras `LayerNormalization` over the last axis."""

    kind: Literal["layer_normalization"] = "layer_normalization"
    epsilon: Annotated[float, Field(gt=0)] = 1e-3
    center: bool = True
    scale: bool = True


class BatchNormalizationLayer(_Layer):
    """Keras `BatchNormalization` over the last axis, with its moving statistics (inference)."""

    kind: Literal["batch_normalization"] = "batch_normalization"
    epsilon: Annotated[float, Field(gt=0)] = 1e-3
    center: bool = True
    scale: bool = True


class AffineLayer(_Layer):
    """(x - shift) scale + offset, one constant of each per value: Keras' `Normalization` and
    `Rescaling`.

    Subtracting first is exact where values are large and close together. The constants are weights
    that training does not change.
    """

    kind: Literal["affine"] = "affine"


class PreluLayer(_Layer):
    """Keras `PReLU` with one slope per value: x where x >= 0, slope x elsewhere."""

    kind: Literal["prelu"] = "prelu"


class SliceLayer(_Layer):
    """The values `start` to `stop - 1` of each step."""

    kind: Literal["slice"] = "slice"
    start: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _check_order(self) -> SliceLayer:
        if self.stop <= self.start:
            raise ValueError(f"stop: expected more than `start` ({self.start}), got {self.stop}")
        return self


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


class MergeLayer(_Layer):
    """Keras `Add`, `Multiply`, `Average` or `Concatenate` (last axis) of two or more layers."""

    kind: Literal["add", "multiply", "average", "concatenate"]


class AttentionLayer(_Layer):
    """Attention with context (Yang et al. 2016): a weighted mean of its inputs, of their width.

    Attributes:
        over: `chunk`: one value for the whole chunk, the same at every step; `stream`: at each
            step over all steps of the stream so far, with the state parts `maximum`,
            `normaliser` and `sum`.
        units: size of the hidden layer that scores a step.

    `models.networks.layers` has the equations.
    """

    kind: Literal["attention"] = "attention"
    over: Literal["chunk", "stream"]
    units: Units


Layer = Annotated[
    LstmLayer
    | GruLayer
    | SimpleRnnLayer
    | BidirectionalLayer
    | Conv1dLayer
    | DenseLayer
    | ActivationLayer
    | DropoutLayer
    | LayerNormalizationLayer
    | BatchNormalizationLayer
    | AffineLayer
    | PreluLayer
    | SliceLayer
    | MergeLayer
    | AttentionLayer,
    Field(discriminator="kind"),
]
Cell = LstmLayer | GruLayer | SimpleRnnLayer
"""Recurrent layers of one direction."""
Recurrent = Cell | BidirectionalLayer
RECURRENT = (LstmLayer, GruLayer, SimpleRnnLayer, BidirectionalLayer)


def returned_state(layer: Recurrent) -> dict[str, int]:
    """Sizes of the state parts of a recurrent layer, in Keras' order."""
    if isinstance(layer, BidirectionalLayer):
        return {
            f"{cell.name.removeprefix(f'{layer.name}.')}.{part}": size
            for cell in layer.directions
            for part, size in returned_state(cell).items()
        }
    if isinstance(layer, LstmLayer):
        return {"hidden": layer.width, "carry": layer.units}
    return {"hidden": layer.units}


def layer_width(layer: Layer, widths: Mapping[str, int]) -> int:
    """Compute the number of output values per step of a layer.

    Args:
        widths: the widths of its inputs, by name.

    Raises:
        ValueError: it combines inputs of different widths elementwise, or exceeds `MAX_WIDTH`.
    """
    read = [widths[name] for name in layer.inputs]
    match layer:
        case LstmLayer() | BidirectionalLayer():
            return layer.width
        case GruLayer() | SimpleRnnLayer() | DenseLayer() | Conv1dLayer():
            return layer.units
        case SliceLayer():
            if layer.stop > read[0]:
                raise ValueError(
                    f"layer {layer.name!r}: expected `stop` within the {read[0]} values of "
                    f"{layer.inputs[0]!r}, got {layer.stop}"
                )
            return layer.stop - layer.start
        case MergeLayer(kind="concatenate"):
            if sum(read) > MAX_WIDTH:
                raise ValueError(
                    f"layer {layer.name!r}: expected at most {MAX_WIDTH} values per step, "
                    f"got {sum(read)}"
                )
            return sum(read)
        case MergeLayer() if len(set(read)) > 1:
            raise ValueError(
                f"layer {layer.name!r}: expected inputs of one width to {layer.kind}, got {read}"
            )
        case _:
            return read[0]


FEATURES = "features"
"""Input name of the encoded rows, in which categories are replaced by their embeddings."""


Chunking = Literal["invisible", "per_chunk", "whole"]

_STEPWISE = (
    DenseLayer,
    ActivationLayer,
    DropoutLayer,
    LayerNormalizationLayer,
    BatchNormalizationLayer,
    AffineLayer,
    PreluLayer,
    SliceLayer,
    MergeLayer,
)
"""Layers that treat every step alike, and so are constant if their inputs are."""

DEFAULT_CHUNK_STEPS = 1024
"""Default of the longest chunk of a network that sees a chunk as a whole."""


def chunking_of(layers: Iterable[Layer], *, blocks: bool) -> Chunking:
    """Determine the chunking semantics of a network.

    Args:
        blocks: whether the stream is processed in blocks (`models.spec.blocks`).
    """
    if blocks:
        return "invisible"
    layers = tuple(layers)
    if any(isinstance(layer, BidirectionalLayer) for layer in layers):
        return "whole"
    return "per_chunk" if any(_is_non_causal(layer) for layer in layers) else "invisible"


def non_causal_layers(layers: Iterable[Layer]) -> frozenset[str]:
    """Names of the layers whose value at a step depends on later steps of the same chunk."""
    names: set[str] = set()
    for layer in layers:
        if _is_non_causal(layer) or names.intersection(layer.inputs):
            names.add(layer.name)
    return frozenset(names)


def chunk_constant_layers(layers: Iterable[Layer]) -> frozenset[str]:
    """Names of the layers that have the same value at every step of a chunk."""
    names: set[str] = set()
    for layer in layers:
        if isinstance(layer, AttentionLayer):
            is_constant = layer.over == "chunk"
        else:
            is_constant = isinstance(layer, _STEPWISE) and names.issuperset(layer.inputs)
        if is_constant:
            names.add(layer.name)
    return frozenset(names)


def check_starts_from(layer: Recurrent, before: Mapping[str, Layer]) -> None:
    """Check that a layer can take its initial state from the layer in `starts_from`.

    Args:
        before: the preceding layers, by name.

    Raises:
        ValueError: it cannot.
    """
    if layer.starts_from is None:
        return
    source = before.get(layer.starts_from)
    if not isinstance(source, RECURRENT):
        names = [name for name, other in before.items() if isinstance(other, RECURRENT)]
        raise ValueError(
            f"layer {layer.name!r} starts from {layer.starts_from!r}, "
            f"expected a recurrent layer before it: {names}"
        )
    expected, actual = returned_state(layer), returned_state(source)
    if expected != actual:
        raise ValueError(
            f"layer {layer.name!r} starts from {source.name!r}, which returns "
            f"{_format_parts(actual)}; expected {_format_parts(expected)}"
        )


def _is_non_causal(layer: Layer) -> bool:
    match layer:
        case LstmLayer() | GruLayer() | SimpleRnnLayer():
            return layer.starts_from is not None
        case BidirectionalLayer():
            return True
        case AttentionLayer():
            return layer.over == "chunk"
        case _:
            return False


def _format_parts(parts: Mapping[str, int]) -> str:
    return " and ".join(f"{name} [{size}]" for name, size in parts.items())
