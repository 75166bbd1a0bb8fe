"""The Keras network of a specification, as a pure step over explicit state.

    step(rows [B,T,F], lengths [B], state [B,N]) -> (outputs [B,T,O], state' [B,N])

Every recurrent layer gets its part of the packed state as `initial_state` and returns it through
`return_state`; a layer with `starts_from` gets the state that another one returned in this call.
There is no `stateful=True`, no `predict()` and no hidden state in a layer: equal arguments give
equal results, in any order of calls. Steps at or beyond a row's length are masked: padding never
changes a state, and a row of length 0 keeps its state.

Shapes and names follow `models.spec.layout`; the step runs eagerly and under
`tf.function(jit_compile=True)`. A schema that is not fitted and weights of other shapes are
rejected. Callers check that results are finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.artifact.weights import check_weights
from models.errors import SpecError
from models.networks.cells import recurrent_layer
from models.networks.heads import (
    Tensor,
    build_head,
    head_output,
    last_observed,
    last_valid,
    mean_losses,
)
from models.networks.initial_weights import draw_weights
from models.networks.layers import (
    Affine,
    Attention,
    AttentionState,
    CausalConvolution,
    Prelu,
    activation_of,
    run_bidirectional,
    run_forward,
)
from models.spec.decoder import LAST, add_decoder_prefix
from models.spec.heads import has_surprise, scores_events
from models.spec.layers import (
    FEATURES,
    ActivationLayer,
    AffineLayer,
    AttentionLayer,
    BatchNormalizationLayer,
    BidirectionalLayer,
    Conv1dLayer,
    DenseLayer,
    DropoutLayer,
    GruLayer,
    Layer,
    LayerNormalizationLayer,
    LstmLayer,
    MergeLayer,
    PreluLayer,
    Recurrent,
    RmsNormalizationLayer,
    SimpleRnnLayer,
    SliceLayer,
    UnitNormalizationLayer,
)
from models.spec.layout import (
    head_units,
    layer_widths,
    network_outputs,
    network_state,
    weight_shapes,
)
from models.spec.model import ModelSpec

Variable = Any
"""A Keras variable; TensorFlow ships no types."""

_MERGES = {
    "add": keras.layers.Add,
    "subtract": keras.layers.Subtract,
    "multiply": keras.layers.Multiply,
    "average": keras.layers.Average,
    "maximum": keras.layers.Maximum,
    "minimum": keras.layers.Minimum,
    "concatenate": keras.layers.Concatenate,
}


Traced = TypeVar("Traced", bound=Callable[..., Any])


def _plain_python(function: Traced) -> Traced:
    """Exclude the function from AutoGraph: its loops and matches run at trace time."""
    return cast(Traced, tf.autograph.experimental.do_not_convert(function))


@dataclass(frozen=True, slots=True)
class Forward:
    """One pass over a batch.

    Attributes:
        raw: head name -> raw values, float32 [B, T, U]; see `models.networks.heads`.
        state: the state after each row's last valid step, float32 [B, N].
        attention: layer that attends over the chunk -> the weight of each step [B, T].
    """

    raw: dict[str, Tensor]
    state: Tensor
    attention: dict[str, Tensor]


class StepNetwork:
    """The network of one specification, with its weights.

    Attributes:
        spec: the specification it was built from.
        state_size: N, values in a packed state.
        output_size: O, values in a packed output row.
        decoder: the network of the decoder's step, which shares the weights of this one; None
            for a model without decoder.
    """

    def __init__(self, spec: ModelSpec, *, unroll: bool = False):
        """Build the layers; Keras initialises the weights until they are set.

        Args:
            unroll: unroll the steps instead of looping over them, which is cheaper for one step;
                their number is then fixed at trace time.

        Raises:
            SpecError: the event schema is not fitted, or Keras runs another backend than
                TensorFlow.
        """
        if keras.backend.backend() != "tensorflow":
            raise SpecError(
                f"expected Keras on TensorFlow, got KERAS_BACKEND={keras.backend.backend()!r}"
            )
        if spec.events is not None and not spec.events.fitted:
            names = [field.name for field in spec.events.fields if not field.fitted]
            raise SpecError(
                f"model {spec.name!r}: expected a fitted schema, fields {names} are not"
            )
        self.spec = spec
        state = network_state(spec)
        self._slices = state.slices
        self._float_parts = [part.name for part in state.parts]
        self.state_size = state.float_size
        self.output_size = network_outputs(spec).size
        widths = layer_widths(spec)
        self._embeddings = {
            column.name: _embedding(column.name, column.codes, column.embedding)
            for column in spec.columns
            if column.codes is not None and column.embedding is not None
        }
        self._layers: dict[str, keras.layers.Layer] = {}
        for layer in spec.layers:
            cells = layer.directions if isinstance(layer, BidirectionalLayer) else (layer,)
            self._layers.update((cell.name, _build_layer(cell, widths, unroll)) for cell in cells)
        self._heads = {
            head.name: build_head(head, head_units(spec, head), widths[head.input])
            for head in spec.heads
        }
        self.decoder = (
            None if spec.decoder_network is None else StepNetwork(spec.decoder_network, unroll=True)
        )
        self._variables = self._named_variables()

    @_plain_python
    def step(
        self, rows: Tensor, lengths: Tensor, state: Tensor, training: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Consume up to T events of each of B streams.

        Args:
            rows: float32 [B, T, F], T >= 1; encoded columns, a categorical as its code.
            lengths: int32 [B], valid steps of each row, 0..T.
            state: float32 [B, N], packed as `models.spec.layout.network_state` says.
            training: whether dropout is active.

        In blocks (`models.spec.blocks`) the T = C+R steps are a window. The outputs are those of
        its block, [B, C, O], and the state is that after the block.

        Returns:
            Outputs float32 [B, T, O], undefined beyond a row's length, and the new state float32
            [B, N].
        """
        result = self.forward(rows, lengths, state, training)
        _, rows = _zero_padding(rows, lengths)
        if self.spec.blocks is not None:
            rows = rows[:, : self.spec.blocks.size]
        outputs = []
        for head in self.spec.heads:
            forecast = self._part(state, f"{head.name}.forecast")
            dense = self._heads[head.name]
            if has_surprise(head) and dense is not None:
                forecast = dense(forecast)
            outputs.append(head_output(self.spec, head, result.raw[head.name], rows, forecast))
        outputs.extend(weights[..., tf.newaxis] for weights in result.attention.values())
        return tf.concat(outputs, axis=-1), result.state

    @_plain_python
    def forward(
        self, rows: Tensor, lengths: Tensor, state: Tensor, training: bool = False
    ) -> Forward:
        """The pass without the heads' outputs; arguments as for `step`.

        Training passes the raw values to `losses`, and the state to the next window.
        """
        mask, rows = _zero_padding(rows, lengths)
        values = {FEATURES: self._features(rows)}
        parts: dict[str, Tensor] = {}
        attention: dict[str, Tensor] = {}
        for layer in self.spec.layers:
            sources = [values[name] for name in layer.inputs]
            keras_layer: Any = self._layers.get(layer.name)
            match layer:
                case LstmLayer() | GruLayer() | SimpleRnnLayer() | BidirectionalLayer():
                    names = [f"{layer.name}.{part}" for part in layer.returned_state]
                    if layer.starts_from is None:
                        initial = [self._part(state, name) for name in names]
                    else:
                        initial = [
                            parts[f"{layer.starts_from}.{part}"] for part in layer.returned_state
                        ]
                    values[layer.name], after = self._recurrent(
                        layer, sources[0], initial, mask, training
                    )
                    parts.update(zip(names, after, strict=True))
                case AttentionLayer(over="chunk"):
                    values[layer.name], attention[layer.name] = keras_layer.over_chunk(
                        sources[0], mask
                    )
                case AttentionLayer():
                    names = [f"{layer.name}.{part}" for part in ("maximum", "normaliser", "sum")]
                    before = AttentionState(*(self._part(state, name) for name in names))
                    values[layer.name], after = keras_layer.over_stream(sources[0], lengths, before)
                    parts.update(zip(names, after, strict=True))
                case Conv1dLayer():
                    name = f"{layer.name}.past"
                    past = self._part(state, name)
                    values[layer.name], parts[name] = keras_layer(sources[0], lengths, past)
                case SliceLayer():
                    values[layer.name] = sources[0][..., layer.start : layer.stop]
                case MergeLayer():
                    values[layer.name] = keras_layer(sources)
                case DropoutLayer():
                    values[layer.name] = keras_layer(sources[0], training=training)
                case BatchNormalizationLayer():
                    values[layer.name] = keras_layer(sources[0], training=training, mask=mask)
                case _:
                    values[layer.name] = keras_layer(sources[0])
        if self.spec.blocks is not None:
            values = {name: value[:, : self.spec.blocks.size] for name, value in values.items()}
        raw: dict[str, Tensor] = {}
        for head in self.spec.heads:
            dense = self._heads[head.name]
            value = values[head.input]
            raw[head.name] = value if dense is None else dense(value)
            if scores_events(head):
                name = f"{head.name}.forecast"
                kept = value if has_surprise(head) else raw[head.name]
                parts[name] = last_valid(kept, lengths, self._part(state, name))
        if self.spec.decoder is not None:
            parts[LAST] = last_observed(self.spec, rows, mask, self._part(state, LAST))
        after = tf.concat([parts[name] for name in self._float_parts], axis=-1)
        return Forward(raw, after, attention)

    def _recurrent(
        self,
        layer: Recurrent,
        x: Tensor,
        initial: list[Tensor],
        mask: Tensor,
        training: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """A recurrent layer's sequence, and the states it returns."""
        if isinstance(layer, BidirectionalLayer):
            cells = [self._layers[cell.name] for cell in layer.directions]
            return run_bidirectional(layer, cells, x, initial, mask, training, self.spec.blocks)
        cell = self._layers[layer.name]
        return run_forward(cell, x, initial, mask, training, self.spec.blocks)

    @_plain_python
    def losses(
        self,
        raw: dict[str, Tensor],
        next_rows: Tensor,
        mask: Tensor,
        labels: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Training losses of a pass, one scalar per head with targets.

        Args:
            raw: the raw values from `forward`.
            next_rows: float32 [B, T, F], the encoded event after each step.
            mask: bool [B, T], True where a step and the event after it exist.
            labels: label head -> float32 [B, T], NaN for steps without a label that counts.
        """
        return mean_losses(self.spec, raw, next_rows, mask, labels or {})

    @property
    def trainable_variables(self) -> list[Variable]:
        """The trainable variables, in the order of `models.spec.layout.weight_shapes`."""
        return [variable for variable in self._variables.values() if variable.trainable]

    def get_weights(self) -> dict[str, NDArray[np.float32]]:
        """Copies of all weights by name, in the order of `models.spec.layout.weight_shapes`."""
        return {
            name: np.array(variable.value.numpy()) for name, variable in self._variables.items()
        }

    def set_weights(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Set all weights by name; nothing changes unless all of them are valid.

        Raises:
            ArtifactError: a name is missing or unknown, or an array is not finite float32 of its
                shape.
        """
        check_weights(self.spec, weights, f"model {self.spec.name!r}")
        for name, variable in self._variables.items():
            variable.assign(weights[name])

    def initialise(self, seed: int) -> None:
        """Initialise the weights; equal seeds give equal weights."""
        self.set_weights(draw_weights(self.spec, seed))

    def reseed(self, seed: int) -> None:
        """Reset the dropout random generators, so that later masks depend on `seed` only."""
        for index, layer in enumerate(self._layers.values()):
            owner = getattr(layer, "cell", layer)
            generator = getattr(owner, "seed_generator", None)
            if generator is not None:
                generator.state.assign([seed % 2**31, index])
        if self.decoder is not None:
            self.decoder.reseed(seed)

    def _features(self, rows: Tensor) -> Tensor:
        """The columns that layers read, in order, with every code replaced by its embedding."""
        pieces: list[Tensor] = []
        plain, read = 0, self.spec.read_features
        for index, column in enumerate(self.spec.columns):
            embedding = self._embeddings.get(column.name)
            if embedding is None:
                continue
            if index > plain:
                pieces.append(rows[..., plain:index])
            pieces.append(embedding(tf.cast(tf.round(rows[..., index]), tf.int32)))
            plain = index + 1
        if plain < read:
            pieces.append(rows[..., plain:read])
        return pieces[0] if len(pieces) == 1 else tf.concat(pieces, axis=-1)

    def _part(self, state: Tensor, name: str) -> Tensor:
        """The part's columns of the packed state; empty for a part the model does not have."""
        columns = self._slices.get(name, slice(0, 0))
        return state[:, columns.start : columns.stop]

    def _named_variables(self) -> dict[str, Variable]:
        variables: dict[str, Variable] = {}
        owners = {name: getattr(layer, "cell", layer) for name, layer in self._layers.items()}
        owners.update({f"heads.{name}": layer for name, layer in self._heads.items()})
        decoding = {} if self.decoder is None else add_decoder_prefix(self.decoder._variables)
        for name, shape in weight_shapes(self.spec).items():
            owner, _, kind = name.rpartition(".")
            if name in decoding:
                variable = decoding[name]
            elif owner == "embedding":
                variable = self._embeddings[kind].embeddings
            else:
                variable = getattr(owners[owner], kind)
            if tuple(variable.shape) != shape:
                raise SpecError(
                    f"weight {name!r}: the layout says {list(shape)}, Keras {list(variable.shape)}"
                )
            variables[name] = variable
        return variables


def _zero_padding(rows: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Which steps are valid, bool [B, T], and the rows with zeros in all others.

    Whatever padding holds would do no harm to the states, but an arbitrary number is no code
    of an embedding.
    """
    mask = tf.sequence_mask(lengths, rows.shape[1] or tf.shape(rows)[1])
    return mask, tf.where(mask[..., tf.newaxis], rows, 0.0)


def _embedding(name: str, codes: int, width: int) -> keras.layers.Embedding:
    layer = keras.layers.Embedding(codes, width, dtype="float32", name=f"embedding_{name}")
    layer.build((None, None))
    return layer


def _build_layer(layer: Layer, widths: Mapping[str, int], unroll: bool = False) -> Any:
    """The Keras layer, built for [B, T, width of what it reads], or one of this package."""
    common: dict[str, Any] = {"name": layer.name, "dtype": "float32"}
    match layer:
        case LstmLayer() | GruLayer() | SimpleRnnLayer():
            keras_layer = recurrent_layer(layer, layer.name)
            keras_layer.unroll = unroll
        case DenseLayer():
            keras_layer = keras.layers.Dense(
                layer.units,
                activation=activation_of(layer.activation),
                use_bias=layer.use_bias,
                **common,
            )
        case ActivationLayer():
            keras_layer = keras.layers.Activation(activation_of(layer.activation), **common)
        case DropoutLayer():
            keras_layer = keras.layers.Dropout(layer.rate, **common)
        case LayerNormalizationLayer():
            keras_layer = keras.layers.LayerNormalization(
                epsilon=layer.epsilon, center=layer.center, scale=layer.scale, **common
            )
        case RmsNormalizationLayer():
            keras_layer = keras.layers.RMSNormalization(epsilon=layer.epsilon, **common)
            keras_layer.supports_masking = True
        case UnitNormalizationLayer():
            keras_layer = keras.layers.UnitNormalization(**common)
        case BatchNormalizationLayer():
            keras_layer = keras.layers.BatchNormalization(
                epsilon=layer.epsilon, center=layer.center, scale=layer.scale, **common
            )
        case AttentionLayer():
            return Attention(layer, widths[layer.inputs[0]])
        case Conv1dLayer():
            return CausalConvolution(layer, widths[layer.inputs[0]])
        case AffineLayer():
            return Affine(layer.name, widths[layer.inputs[0]])
        case PreluLayer():
            return Prelu(layer.name, widths[layer.inputs[0]])
        case SliceLayer():
            return None
        case MergeLayer():
            keras_layer = _MERGES[layer.kind](**common)
            keras_layer.build([(None, None, widths[name]) for name in layer.inputs])
            return keras_layer
    keras_layer.build((None, None, widths[layer.inputs[0]]))
    return keras_layer
