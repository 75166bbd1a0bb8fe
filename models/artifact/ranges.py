"""Ranges of a model's inputs and states on its training data, by which drift is noticed.

Each part of the network's state, and each field of its encoded inputs, has a norm: the square root
of the sum of its squares. A range holds the norms of nearly all training data. Codes of categories
and statistics of streams are left out, since their size means nothing.

The artifact keeps ranges in the manifest, outside of its fingerprint: they change no output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import ArtifactError
from models.spec.layout import network_state
from models.spec.model import ModelSpec

INPUTS = "inputs"
QUANTILES = (0.001, 0.999)
"""Of the norms on training data, the ends of a range."""

Floats = NDArray[np.float64]


class NormLayout:
    """The norms of a model's inputs and states.

    Attributes:
        names: of the P norms: the parts of the network's state, then `inputs.FIELD` by field, or
            `inputs` for a model that takes rows.
    """

    def __init__(self, spec: ModelSpec) -> None:
        state = network_state(spec)
        parts = {part.name: part.size for part in state.parts if part.in_floats and part.size}
        columns: dict[str, list[int]] = {}
        for at, column in enumerate(spec.columns):
            if column.codes is None and not column.statistic:
                name = INPUTS if column.field is None else f"{INPUTS}.{column.field}"
                columns.setdefault(name, []).append(at)
        self._floats = state.float_size
        self._columns = [at for of_field in columns.values() for at in of_field]
        sizes = [*parts.values(), *map(len, columns.values())]
        self._starts = np.cumsum([0, *sizes[:-1]])
        self.names = (*parts, *columns)

    def norms(self, rows: NDArray[np.float32], states: NDArray[np.float32]) -> Floats:
        """The norms of inputs and states, float64 [S, P].

        Args:
            rows: encoded events, float32 [S, F].
            states: the floats of states after them, [S, N], those of the network first.
        """
        values = np.concatenate([states[:, : self._floats], rows[:, self._columns]], axis=1)
        squares = np.square(values.astype(np.float64))
        norms: Floats = np.sqrt(np.add.reduceat(squares, self._starts, axis=1))
        return norms


class Ranges(NamedTuple):
    """The range of each norm on training data, [P] each.

    Attributes:
        names: as `NormLayout.names`.
        low, high: the ends, which nearly all norms are between (`models.training.ranges`).
        largest: the largest one.
    """

    names: tuple[str, ...]
    low: Floats
    high: Floats
    largest: Floats

    def to_manifest(self) -> dict[str, dict[str, float]]:
        """The ranges as plain data, the inverse of `ranges_of`."""
        columns = (self.low.tolist(), self.high.tolist(), self.largest.tolist())
        return {
            name: {"low": low, "high": high, "largest": largest}
            for name, low, high, largest in zip(self.names, *columns, strict=True)
        }


def ranges_of(spec: ModelSpec, manifest: Mapping[str, Any], where: str) -> Ranges | None:
    """The ranges of a manifest; None if it has none.

    Raises:
        ArtifactError: they are not those of the model's parts.
    """
    given = manifest.get("ranges")
    if given is None:
        return None
    names = NormLayout(spec).names
    try:
        values = np.array(
            [[given[name][end] for end in ("low", "high", "largest")] for name in names], np.float64
        ).reshape(len(names), 3)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: expected `ranges` of {list(names)}: {error!r}") from error
    return Ranges(names, *values.T)
