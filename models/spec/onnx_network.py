"""A network given as an ONNX graph, whose state inputs and outputs are paired.

    graph(inputs, state inputs, lengths or mask) -> (outputs, state outputs)

Each pair is one part of a stream's state: the graph reads it by one name and returns its next value
by another. The importer (`models.importing.onnx_conversion`) writes this section; nobody has to.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.events.schema import Frozen
from models.spec.state import Dtype

GraphDtype = Literal[Dtype, "uint64"]
Axes = Literal["batch_major", "time_major", "step", "unbatched"]
Batching = Literal["padded", "cut", "equal", "step"]

STARTED = "sequence.started"
"""Part of the state of a graph that has to know the first call of a stream: true after it."""

Name = Annotated[str, Field(min_length=1, max_length=1024)]
Size = Annotated[int, Field(ge=1, le=2**24)]


class GraphInput(Frozen):
    """One input of features.

    Attributes:
        name: the graph's name for it.
        width: its columns of a row of `inputs`; None for an input without an axis of features,
            which takes one column.
        dtype: the element type; rows are cast to it.
    """

    name: Name
    width: Annotated[int, Field(ge=1, le=16384)] | None
    dtype: GraphDtype

    @property
    def columns(self) -> int:
        """Number of columns of a row."""
        return 1 if self.width is None else self.width


class GraphOutput(Frozen):
    """One output.

    Attributes:
        name: the graph's name for it, and the one in replies.
        shape: shape of one step, without the axes of batch and time.
        has_time: whether it has an axis of time.
        state_axis: for an output that is a state output too, the batch axis of the pair.
        labels: names along the last axis, such as classes.
    """

    later_options = frozenset({"labels"})

    name: Name
    shape: tuple[Size, ...]
    has_time: bool = True
    state_axis: int | None = None
    labels: Annotated[tuple[Name, ...], Field(max_length=65536)] = ()

    @model_validator(mode="after")
    def _check_labels(self) -> GraphOutput:
        if self.labels and (
            self.shape[-1:] != (len(self.labels),) or len(set(self.labels)) < len(self.labels)
        ):
            raise ValueError(
                f"labels of {self.name!r}: expected a distinct one for each place of the last axis "
                f"of {list(self.shape)}, got {len(self.labels)}"
            )
        return self


class StatePair(Frozen):
    """One part of the state: a state input, and the state output that holds its next value.

    Attributes:
        input: name of the state input, and of the part.
        output: name of the state output.
        shape: shape of one stream's part, without the batch axis.
        dtype: element type of both.
        batch_axis: place of the batch axis in the graph's tensors; None in an unbatched graph whose
            states have none.
    """

    input: Name
    output: Name
    shape: tuple[Size, ...]
    dtype: Dtype
    batch_axis: Annotated[int, Field(ge=0, le=16)] | None

    @model_validator(mode="after")
    def _check_axis(self) -> StatePair:
        if self.batch_axis is not None and self.batch_axis > len(self.shape):
            raise ValueError(f"batch_axis: expected at most {len(self.shape)}")
        return self


class StepsInput(Frozen):
    """The input by which the graph ignores padding.

    Attributes:
        kind: `lengths` [B], the number of steps of each row, or `mask` [B, T] (or [T, B]), true at
            each of them.
    """

    kind: Literal["lengths", "mask"]
    name: Name
    dtype: GraphDtype


class ControlInput(Frozen):
    """An input by which Triton tells a model about the sequence; [B], or [B, 1].

    Attributes:
        kind: `start`, true in the first call of a stream and after a reset; `ready`, always true;
            `end`, always false, since a stream has no end.
        rank: number of its axes.
        values: of false and of true.
    """

    name: Name
    kind: Literal["start", "ready", "end"]
    dtype: GraphDtype
    rank: Annotated[int, Field(ge=1, le=2)]
    values: tuple[float, float] = (0, 1)


class OnnxNetwork(Frozen):
    """The signature of the graph, and how batches are run on it.

    Attributes:
        axes: of inputs and outputs: `batch_major` [B, T, ...], `time_major` [T, B, ...], `step`
            [B, ...], a graph of one step, or `unbatched` [T, ...], a graph of one row.
        inputs: which take the columns of a row, in this order.
        outputs: which the replies contain.
        states: the state pairs, in the order of the parts of a state.
        steps: the input by which it ignores padding; None if there is none.
        controls: inputs about the sequence.
        batching: how rows of different lengths share a batch: `padded` (one call, in which the
            graph ignores the padding), `cut` (one call for each distinct length, which continues
            every longer row), `equal` (one call for the rows of each length) or `step` (one call
            for each step).
        batch_size: B, if the graph has a fixed one.
        chunking: whether outputs depend on the chunk boundaries; see `models.spec.layers`.
    """

    axes: Axes
    inputs: Annotated[tuple[GraphInput, ...], Field(min_length=1, max_length=256)]
    outputs: Annotated[tuple[GraphOutput, ...], Field(min_length=1, max_length=256)]
    states: Annotated[tuple[StatePair, ...], Field(min_length=1, max_length=1024)]
    steps: StepsInput | None = None
    controls: tuple[ControlInput, ...] = ()
    batching: Batching
    batch_size: Annotated[int, Field(ge=1, le=64)] | None = None
    chunking: Literal["invisible", "per_chunk"] = "invisible"

    @model_validator(mode="after")
    def _check_consistency(self) -> OnnxNetwork:
        names = self.value_inputs
        if self.steps is not None:
            names.append(self.steps.name)
        for kind, found in (
            ("inputs", names),
            ("outputs", [output.name for output in self.outputs]),
            ("state outputs", [pair.output for pair in self.states]),
        ):
            if len(set(found)) < len(found):
                raise ValueError(f"expected {kind} with distinct names, got {found}")
        possible: dict[str, bool] = {
            "padded": self.steps is not None and self.axes != "step",
            "cut": self.axes != "step" and self.chunking == "invisible",
            "equal": self.axes != "step",
            "step": self.chunking == "invisible",
        }
        if not possible[self.batching]:
            raise ValueError(
                f"batching: expected one of {[name for name, ok in possible.items() if ok]}, "
                f"got {self.batching!r}"
            )
        if self.batching != "step" and not all(output.has_time for output in self.outputs):
            raise ValueError("batching: expected 'step' for outputs without an axis of time")
        if self.axes == "unbatched" and self.batch_size != 1:
            raise ValueError("batch_size: expected 1 of an unbatched graph")
        if self.axes != "unbatched" and any(pair.batch_axis is None for pair in self.states):
            raise ValueError("states: expected a batch axis of each, unless the graph is unbatched")
        return self

    @property
    def value_inputs(self) -> list[str]:
        """The inputs that features, states and controls feed."""
        names = [each.name for each in self.inputs] + [pair.input for pair in self.states]
        return names + [control.name for control in self.controls]

    @property
    def has_start(self) -> bool:
        """Whether a call depends on its being the first of a stream; `STARTED` is then a part."""
        return any(control.kind == "start" for control in self.controls)

    @property
    def features(self) -> int:
        """F, the number of columns of a row."""
        return sum(each.columns for each in self.inputs)

    @property
    def column_names(self) -> list[str]:
        """A name for each column: that of its input, with its place if there are several."""
        return [
            each.name if each.columns == 1 else f"{each.name}[{at}]"
            for each in self.inputs
            for at in range(each.columns)
        ]
