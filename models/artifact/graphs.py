"""The ONNX graphs of a model: which files they are, and what its manifest says of them.

`models.onnx` derives them from spec and weights, in milliseconds: for other programs when a model
is packaged, and for ONNX Runtime each time that a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import GraphUnsupportedError
from models.onnx.graph import write_graph
from models.spec.decoder import strip_decoder_prefix
from models.spec.model import ModelSpec
from models.spec.state import FloatArray

ONNXRUNTIME = "onnxruntime"
TENSORFLOW = "tensorflow"
GRAPH_NAME = "graph.onnx"
DECODER_GRAPH_NAME = "decoder.onnx"


@dataclass(frozen=True, slots=True)
class Graphs:
    """A model's graphs, or why there can be none.

    Attributes:
        data: the network's graph.
        decoder: that of its decoder's step, where it has one.
        refused: why no graph can hold the model; None where there is one.
    """

    data: bytes | None = None
    decoder: bytes | None = None
    refused: str | None = None

    @property
    def files(self) -> dict[str, bytes]:
        """The graphs that there are, by file name."""
        found = {GRAPH_NAME: self.data, DECODER_GRAPH_NAME: self.decoder}
        return {name: data for name, data in found.items() if data is not None}

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of them."""
        if self.data is None:
            return {"runtimes": [TENSORFLOW], "graph_refused": self.refused}
        facts: dict[str, Any] = {"runtimes": [ONNXRUNTIME, TENSORFLOW], "graph": GRAPH_NAME}
        if self.decoder is not None:
            facts["decoder_graph"] = DECODER_GRAPH_NAME
        return facts


def write_graphs(spec: ModelSpec, weights: Mapping[str, FloatArray]) -> Graphs:
    """Derive a model's graphs, or say why there can be none."""
    try:
        network = spec.decoder_network
        decoder = None if network is None else write_graph(network, strip_decoder_prefix(weights))
        return Graphs(write_graph(spec, weights), decoder)
    except GraphUnsupportedError as error:
        return Graphs(refused=str(error))
