"""The nodes and constants of a graph under construction.

A value is identified by its name, which is generated here and internal to the graph: adding a layer
to a specification may rename every value of its graph. Constants with equal content are stored
once. Nothing is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import count as counting
from math import prod
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.onnx.messages import GraphProto, add_node, add_tensor

Value: TypeAlias = str
"""The name of a tensor in the graph; "" for an omitted optional input."""

MOST = np.iinfo(np.int64).max
"""As the end of a slice: up to the last element."""


class Nodes:
    """The nodes and constants added so far, in execution order.

    Args:
        graph: the GraphProto that they are added to.
    """

    def __init__(self, graph: Any):
        self.graph = graph
        self._constants = graph
        self._names = counting(1)
        self._known: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def inner(self) -> Nodes:
        """For the body of a loop: its own nodes, constants and names shared with these.

        A body sees every value around it; its constants are the graph's.
        """
        body = Nodes(GraphProto())
        body._constants, body._names, body._known = self._constants, self._names, self._known
        return body

    def add(self, operator: str, *inputs: Value, name: Value = "", **attributes: Any) -> Value:
        """Add a node with one output.

        Args:
            operator: an operator of the default ONNX domain.
            inputs: its inputs in order.
            name: the output's name if the graph's contract fixes it.
            attributes: the node's attributes; None leaves one out.
        """
        output = name or self.name()
        self._append(operator, inputs, [output], attributes)
        return output

    def add_many(self, operator: str, *inputs: Value, count: int, **attributes: Any) -> list[Value]:
        """Add a node with `count` outputs; the rest as for `add`."""
        outputs = [self.name() for _ in range(count)]
        self._append(operator, inputs, outputs, attributes)
        return outputs

    def split(self, value: Value, sizes: Sequence[int], axis: int) -> list[Value]:
        """Cut a tensor along an axis; sizes add up to its length there."""
        if len(sizes) == 1:
            return [value]
        return self.add_many("Split", value, self.integers(*sizes), count=len(sizes), axis=axis)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Join tensors along an axis."""
        return values[0] if len(values) == 1 else self.add("Concat", *values, axis=axis)

    def part(self, value: Value, start: int, stop: int, axis: int) -> Value:
        """The elements start..stop of a tensor along an axis; `stop` may be negative."""
        return self.add(
            "Slice", value, self.integers(start), self.integers(stop), self.integers(axis)
        )

    def column(self, value: Value, index: int) -> Value:
        """One column: [..., W] -> [...]."""
        return self.add("Gather", value, self.constant(np.array(index, np.int64)), axis=-1)

    def steps(self, x: Value) -> Value:
        """0, 1, ... T - 1 of a sequence [T, ...], int64 [T]."""
        count = self.column(self.add("Shape", x), 0)
        zero, one = (self.constant(np.array(number, np.int64)) for number in (0, 1))
        return self.add("Range", zero, count, one)

    def constant(self, array: NDArray[Any]) -> Value:
        """A constant tensor."""
        raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        key = (array.dtype.name, array.shape, hashlib.sha256(raw).digest())
        if key not in self._known:
            self._known[key] = f"c{len(self._known)}"
            add_tensor(self._constants, self._known[key], array.dtype.name, array.shape, raw)
        return self._known[key]

    def number(self, value: float) -> Value:
        """A float32 scalar."""
        return self.constant(np.array(value, np.float32))

    def integers(self, *values: int) -> Value:
        """An int64 vector, as axes, sizes and bounds are given."""
        return self.constant(np.array(values, np.int64))

    @property
    def constant_bytes(self) -> int:
        """Bytes of all constants."""
        return sum(prod(shape) * np.dtype(dtype).itemsize for dtype, shape, _ in self._known)

    def _append(
        self,
        operator: str,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        attributes: Mapping[str, Any],
    ) -> None:
        present = {name: value for name, value in attributes.items() if value is not None}
        add_node(self.graph, operator, inputs, outputs, present)

    def name(self) -> Value:
        """A name that no value has yet, for a value that another graph makes."""
        return f"v{next(self._names)}"
