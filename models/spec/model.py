"""Specification of a model: its event schema, layers, heads, decoder and training.

An imported ONNX graph takes the place of layers and heads (`models.spec.onnx_network`).

`SPEC.yaml` is written by hand; the artifact's manifest contains the same specification with every
name resolved and every fitted number filled in. No runtime is imported: the Keras builder, the ONNX
exporter and the state layout are derived from this specification.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Annotated, Any

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from models.errors import SpecError
from models.events.schema import Column, EventSchema, Frozen, NumericField
from models.spec.blocks import BlockSpec
from models.spec.chunking import (
    DEFAULT_CHUNK_STEPS,
    Chunking,
    check_starts_from,
    chunking_of,
    non_causal_layers,
)
from models.spec.decoder import (
    DECODER,
    DecoderSpec,
    check_decoder,
    collect_starts_from,
    network_data,
)
from models.spec.detection import DetectionSpec
from models.spec.heads import (
    AnomalyHead,
    ClassificationHead,
    DenseHead,
    ForecastHead,
    Head,
    LabelHead,
    SequenceHead,
    scores_events,
)
from models.spec.history import HistorySpec
from models.spec.layers import (
    FEATURES,
    AttentionLayer,
    BidirectionalLayer,
    Conv1dLayer,
    Layer,
    MergeLayer,
    Recurrent,
    Units,
)
from models.spec.onnx_network import OnnxNetwork
from models.spec.resets import ResetPolicy
from models.spec.training import TrainingSpec

MAX_RESET_EVERY = 2**63 - 1
"""The largest period of resets, as large as the largest position."""

MODEL_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
ModelName = Annotated[str, Field(pattern=MODEL_NAME)]


class EmbeddedColumn(Frozen):
    """A column of raw rows that holds codes, which the network reads as embeddings.

    Attributes:
        column: its index among the `features`.
        codes: number of codes; a row's value is a whole number in 0..codes-1.
        units: width of the embedding.
    """

    column: Annotated[int, Field(ge=0)]
    codes: Annotated[int, Field(ge=1, le=2**24)]
    units: Units


class ModelSpec(Frozen):
    """Specification of one model, with either `events` (an event schema) or `features` (raw rows
    of F floats).

    Validation resolves every name in `layers` and `heads`: a spec read back from a manifest equals
    the one that was written.

    Attributes:
        embeddings: columns of raw rows that hold codes; categorical fields of `events` have
            embeddings of their own.
        onnx: the signature of an imported graph, which is the whole network: without layers, heads,
            blocks and decoder.
        blocks: blocks in which a bidirectional network processes streams; without it, the network
            accepts complete sequences only.
        max_chunk_steps: longest chunk of a network that sees a chunk as a whole; `chunk_limit` is
            the effective value.
        reset_every: number of events after which a stream's state becomes the initial state again,
            counted by position: for networks trained on windows of that length.
        session_gap_s: seconds between two timestamps of a stream; after a longer gap the state
            becomes the initial state again.
        history: what the store keeps of each stream besides its state; by default nothing.
    """

    later_options = frozenset(
        {"detection", "embeddings", "history", "onnx", "reset_every", "session_gap_s"}
    )

    name: ModelName
    description: str = ""
    events: EventSchema | None = None
    features: Annotated[int, Field(ge=1, le=16384)] | None = None
    embeddings: tuple[EmbeddedColumn, ...] = ()
    onnx: OnnxNetwork | None = None
    layers: Annotated[tuple[Layer, ...], Field(max_length=128)]
    heads: Annotated[tuple[Head, ...], Field(max_length=32)]
    blocks: BlockSpec | None = None
    max_chunk_steps: Annotated[int, Field(ge=1, le=65536)] | None = None
    reset_every: Annotated[int, Field(ge=1, le=MAX_RESET_EVERY)] | None = None
    session_gap_s: Annotated[float, Field(gt=0)] | None = None
    decoder: DecoderSpec | None = None
    detection: DetectionSpec | None = None
    history: HistorySpec | None = None
    training: TrainingSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _resolve_names(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("onnx") is not None:
            return {"layers": (), "heads": (), **data}
        if not isinstance(data, dict) or not isinstance(data.get("layers"), (list, tuple)):
            return data
        layers, previous = _resolve_layers(data["layers"])
        decoder = data.get("decoder")
        if isinstance(decoder, dict) and isinstance(decoder.get("layers"), (list, tuple)):
            own, _ = _resolve_layers(decoder["layers"])
            data = {**data, "decoder": collect_starts_from({**decoder, "layers": own})}
        heads = data.get("heads")
        if isinstance(heads, (list, tuple)):
            heads = [
                {**head, "input": head.get("input") or previous} if isinstance(head, dict) else head
                for head in heads
            ]
        return {**data, "layers": layers, "heads": heads}

    @field_validator("layers", "heads")
    @classmethod
    def _check_not_empty(cls, value: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        if not value and info.data.get("onnx") is None:
            context = {"field_type": "Tuple", "min_length": 1, "actual_length": 0}
            raise PydanticKnownError("too_short", context)
        return value

    @model_validator(mode="after")
    def _check_consistency(self) -> ModelSpec:
        if self.onnx is not None:
            self._check_onnx(self.onnx)
            self._check_resets()
            return self
        if (self.events is None) == (self.features is None):
            raise ValueError("expected exactly one of `events` and `features`")
        self._check_embeddings()
        widths = {FEATURES: sum(column.width for column in self.columns)}
        before: dict[str, Layer] = {}
        for layer in self.layers:
            if layer.name in widths:
                raise ValueError(f"layer {layer.name!r}: expected a unique name")
            for name in layer.inputs:
                if name not in widths:
                    raise ValueError(
                        f"layer {layer.name!r} reads {name!r}, "
                        f"expected one before it: {sorted(widths)}"
                    )
            is_merge = isinstance(layer, MergeLayer)
            if is_merge == (len(layer.inputs) < 2):
                expected = "two or more inputs" if is_merge else "one input"
                raise ValueError(
                    f"layer {layer.name!r}: expected {expected}, got {list(layer.inputs)}"
                )
            if isinstance(layer, Recurrent):
                check_starts_from(layer, before)
            widths[layer.name] = layer.width_of([widths[name] for name in layer.inputs])
            before[layer.name] = layer
        if not any(
            isinstance(layer, Recurrent) or (isinstance(layer, Conv1dLayer) and layer.past_steps)
            for layer in self.layers
        ):
            raise ValueError(
                "expected at least one recurrent layer (lstm, gru, simple_rnn, bidirectional) or "
                "conv1d, since no other keeps a state"
            )
        names: set[str] = set()
        for head in self.heads:
            if head.name in names:
                raise ValueError(f"head {head.name!r}: expected a unique name")
            names.add(head.name)
            if head.input not in widths:
                raise ValueError(
                    f"head {head.name!r} reads {head.input!r}, expected one of {sorted(widths)}"
                )
            if isinstance(head, SequenceHead) and head.shape:
                width = widths[head.input]
                if prod(head.shape) != width:
                    raise ValueError(
                        f"head {head.name!r}: expected a shape of the {width} values of "
                        f"{head.input!r}, got {list(head.shape)}"
                    )
            self._check_targets(head)
            if scores_events(head) and head.input in non_causal_layers(self.layers):
                raise ValueError(
                    f"head {head.name!r} scores events by forecasts made before them, but "
                    f"{head.input!r} depends on later events of the chunk; expected a causal layer"
                )
        self._check_blocks()
        self._check_chunk_limit()
        self._check_resets()
        self._check_detection()
        if self.decoder is not None:
            check_decoder(self, self.decoder)
            try:
                _ = self.decoder_network
            except ValidationError as error:
                message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"decoder: {message}") from error
            names.add(DECODER)
        loss_weights = self.training.loss_weights if self.training is not None else {}
        for name in loss_weights:
            if name not in names:
                raise ValueError(
                    f"training.loss_weights: expected heads among {sorted(names)}, got {name!r}"
                )
        return self

    def _check_embeddings(self) -> None:
        columns = [embedded.column for embedded in self.embeddings]
        if columns and self.features is None:
            raise ValueError(
                "embeddings: expected none, since `events` embed their categorical fields"
            )
        for column in columns:
            if column >= (self.features or 0):
                raise ValueError(
                    f"embeddings: expected columns 0 to {(self.features or 0) - 1}, got {column}"
                )
        if len(set(columns)) < len(columns):
            raise ValueError(f"embeddings: expected distinct columns, got {columns}")

    def _check_onnx(self, network: OnnxNetwork) -> None:
        own = (
            "events",
            "embeddings",
            "layers",
            "heads",
            "blocks",
            "decoder",
            "detection",
            "training",
        )
        given = [name for name in own if getattr(self, name)]
        if given:
            raise ValueError(f"onnx: expected a graph without {given}, which it takes the place of")
        if self.features != network.features:
            raise ValueError(
                f"features: expected {network.features}, the columns of the graph's inputs, "
                f"got {self.features}"
            )
        self._check_chunk_limit()

    def _check_blocks(self) -> None:
        backward = any(isinstance(layer, BidirectionalLayer) for layer in self.layers)
        if backward and self.decoder is not None:
            raise ValueError(
                "decoder: expected layers that carry their states through a stream, which "
                "bidirectional ones do not"
            )
        if self.blocks is None:
            return
        if not backward:
            raise ValueError("blocks: expected a bidirectional layer, since no other needs them")
        for layer in self.layers:
            if isinstance(layer, (AttentionLayer, Conv1dLayer)):
                raise ValueError(
                    f"layer {layer.name!r}: expected no {layer.kind} in a network with `blocks`, "
                    "whose windows overlap"
                )
            if isinstance(layer, Recurrent) and layer.starts_from is not None:
                raise ValueError(
                    f"layer {layer.name!r}: expected no `starts_from` in a network with `blocks`, "
                    "whose layers carry their own states from block to block"
                )
        for head in self.heads:
            if scores_events(head):
                raise ValueError(
                    f"head {head.name!r} scores an event by a forecast from before it, but a "
                    "network with `blocks` depends on later events"
                )

    def _check_chunk_limit(self) -> None:
        limit = self.chunk_limit
        if limit is None:
            if self.max_chunk_steps is not None:
                raise ValueError(
                    "max_chunk_steps: expected none, since the network processes chunks of any "
                    f"length step by step; got {self.max_chunk_steps}"
                )
        elif (
            self.training is not None
            and self.training.window_steps is not None
            and self.training.window_steps > limit
        ):
            raise ValueError(
                "training.window_steps: a window is a chunk of this network; expected at most "
                f"max_chunk_steps ({limit}), got {self.training.window_steps}"
            )

    def _check_resets(self) -> None:
        for name in ("reset_every", "session_gap_s"):
            if self.blocks is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: expected none in a network with `blocks`, whose windows would extend "
                    "across a reset; use a stream for each session, closed by `final`"
                )
        if self.session_gap_s is not None and (
            self.events is None or self.events.timestamp is None
        ):
            raise ValueError(
                "session_gap_s: expected a timestamp field in `events`, whose gaps separate the "
                "sessions; for models of rows, reset by `resets` or `reset_every`"
            )

    def _check_detection(self) -> None:
        if self.detection is None:
            return
        heads = {head.name: head for head in self.heads if isinstance(head, AnomalyHead)}
        if self.detection.head not in heads:
            raise ValueError(
                f"detection.head: expected an anomaly head among {list(heads)}, "
                f"got {self.detection.head!r}"
            )
        targets = heads[self.detection.head].targets
        fields = [self.events.field(name) for name in targets] if self.events else []
        is_numeric = any(isinstance(field, NumericField) for field in fields)
        if self.detection.season_events is not None and not is_numeric:
            raise ValueError(
                f"detection.season_events: expected a numeric target, got {list(targets)}"
            )
        for name in self.detection.outputs:
            labels = self.detection.labels(name, targets, self.events) if self.events else ()
            if not labels:
                raise ValueError(
                    f"detection.outputs: expected no {name!r}, which needs a numeric or boolean "
                    f"target, got the targets {list(targets)}"
                )

    def _check_targets(self, head: Head) -> None:
        allowed_kinds: dict[str, tuple[str, ...]] = {}
        kinds: tuple[str, ...]
        match head:
            case DenseHead() if head.targets:
                allowed_kinds = dict.fromkeys(head.targets, ("numeric",))
                if len(head.targets) != head.units:
                    raise ValueError(
                        f"head {head.name!r}: expected one target per unit ({head.units})"
                    )
            case ForecastHead():
                allowed_kinds = dict.fromkeys(head.targets, ("numeric",))
            case ClassificationHead():
                kinds = ("categorical", "boolean") if head.above is None else ("numeric",)
                allowed_kinds = {head.target: ("categorical",) if head.top else kinds}
            case AnomalyHead():
                allowed_kinds = dict.fromkeys(head.targets, ("numeric", "categorical", "boolean"))
            case LabelHead() if self.events is not None:
                if head.source in {field.name for field in self.events.fields}:
                    raise ValueError(
                        f"head {head.name!r}: expected a label that the events do not carry, "
                        f"{head.source!r} is one of their fields"
                    )
            case _:
                pass
        for name, kinds in allowed_kinds.items():
            if self.events is None:
                raise ValueError(
                    f"head {head.name!r}: targets are event fields, and the model has no `events`"
                )
            try:
                field = self.events.field(name)
            except KeyError:
                fields = [f.name for f in self.events.fields]
                raise ValueError(
                    f"head {head.name!r}: expected a target among {fields}, got {name!r}"
                ) from None
            if field.kind not in kinds:
                raise ValueError(
                    f"head {head.name!r}: expected a {' or '.join(kinds)} target, "
                    f"{name!r} is {field.kind}"
                )
            is_normalised = isinstance(field, NumericField) and field.normalisation is not None
            if is_normalised and isinstance(head, DenseHead):
                raise ValueError(
                    f"head {head.name!r}: expected a target without `normalisation`, {name!r} has "
                    "it: a forecast head predicts it in the stream's own units"
                )

    @property
    def chunking(self) -> Chunking:
        """The chunking semantics of the network; see `models.spec.layers`."""
        if self.onnx is not None:
            return self.onnx.chunking
        return chunking_of(self.layers, blocks=self.blocks is not None)

    @property
    def chunk_limit(self) -> int | None:
        """Largest number of steps of a chunk; None if chunks may have any length."""
        if self.chunking == "invisible":
            return None
        return self.max_chunk_steps or DEFAULT_CHUNK_STEPS

    @cached_property
    def resets(self) -> ResetPolicy:
        """When the states of the model's streams are reset without being asked."""
        gap_s = self.session_gap_s
        return ResetPolicy(self.reset_every, None if gap_s is None else gap_s * 1000)

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """The F columns of a row of `inputs`."""
        if self.events is not None:
            return self.events.columns
        if self.onnx is not None:
            return tuple(map(Column, self.onnx.column_names))
        embedded = {own.column: own for own in self.embeddings}
        return tuple(
            Column(f"feature_{index}", None, own.codes, own.units)
            if (own := embedded.get(index))
            else Column(f"feature_{index}")
            for index in range(self.features or 0)
        )

    @property
    def input_features(self) -> int:
        """F, the number of values of a row of `inputs`."""
        return len(self.columns)

    @property
    def read_features(self) -> int:
        """The leading columns of a row, which layers read; heads alone read those behind them."""
        return sum(not column.statistic for column in self.columns)

    @cached_property
    def decoder_network(self) -> ModelSpec | None:
        """The specification of one decoder step (`models.spec.decoder`); None without a decoder."""
        if self.decoder is None:
            return None
        return ModelSpec.model_validate(network_data(self, self.decoder))


def _resolve_layers(layers: Sequence[Any]) -> tuple[list[Any], str]:
    """Fill in names and inputs of layers given as plain data; also returns the last name."""
    named = [dict(layer) if isinstance(layer, dict) else layer for layer in layers]
    counts: Counter[str] = Counter()
    previous = FEATURES
    for layer in named:
        if not isinstance(layer, dict):
            continue
        kind = str(layer.get("kind"))
        counts[kind] += 1
        layer["name"] = layer.get("name") or f"{kind}_{counts[kind]}"
        layer["inputs"] = layer.get("inputs") or (previous,)
        previous = layer["name"]
    return named, previous


def schema_of(spec: ModelSpec) -> EventSchema:
    """The spec's event schema; SpecError if the model takes raw rows."""
    if spec.events is None:
        raise SpecError(f"model {spec.name!r}: expected `events`; raw `features` name no columns")
    return spec.events


def parse_spec(data: Any, source: str = "spec") -> ModelSpec:
    """Validate plain data as a `ModelSpec`; SpecError lists every invalid member."""
    try:
        return ModelSpec.model_validate(data)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(step) for step in item['loc']) or 'spec'}: "
            + item["msg"].removeprefix("Value error, ")
            for item in error.errors(include_url=False)
        ]
        raise SpecError("\n".join([f"{source}: not a model specification", *lines])) from error
