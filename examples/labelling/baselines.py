"""A unidirectional network, as a baseline of the labels.

It is `one_way.yaml`, trained on the same table in the same way: two stacked LSTMs of as many
units as both directions have together. When an hour is labelled it has seen that hour and
those before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.spec.heads import Head, LabelHead
from models.spec.layout import output_spec
from models.spec.spec_file import read_spec
from models.training.evaluate import run_chunks
from models.training.scores import score_label
from models.training.table import Baseline, Table
from models.training.trainer import train

SPEC = Path(__file__).parent / "one_way.yaml"
ONE_WAY = "LSTMs, one direction"


class OneWay:
    """Gives the baseline of each label head; the network is trained for the first of them."""

    def __init__(self) -> None:
        self._outputs: Mapping[str, NDArray[Any]] | None = None
        self._epoch = 0

    def __call__(self, table: Table, head: Head) -> list[Baseline]:
        """The baseline of a label head; empty for any other head."""
        if not isinstance(head, LabelHead):
            return []
        if self._outputs is None:
            self._outputs = self._train(table)
        probabilities = np.asarray(self._outputs[head.name][table.test], np.float64)
        scored = score_label(head, probabilities, table.labels[head.name][table.test])
        return [Baseline(ONE_WAY, scored, {"epoch": self._epoch})]

    def _train(self, table: Table) -> Mapping[str, NDArray[Any]]:
        """Train the network; returns its outputs at every row."""
        with TemporaryDirectory() as folder:
            out = Path(folder) / "one_way"
            result = train(read_spec(SPEC), table.streams.frame, out, quiet=True)
        [self._epoch] = result.best_epochs
        outputs = run_chunks(result.artifact, table.streams)
        return output_spec(result.artifact.spec).by_name(outputs)
