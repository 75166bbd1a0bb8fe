"""ONNX graphs of a model: their files, and their entries in the manifest.

`models.onnx` exports them from spec and weights, in milliseconds: for other programs when a model
is packaged, and for ONNX Runtime each time that a model is loaded. An imported graph is not
exported: it is the network.
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
    """The graphs of a model, or the reason for their absence.

    Attributes:
        data: graph of the network.
        decoder: graph of one decoder step, if the model has a decoder.
        rejection: why the model cannot be exported; None if it can.
        imported: whether the graph is the network itself, an imported one.
    """

    data: bytes | None = None
    decoder: bytes | None = None
    rejection: str | None = None
    imported: bool = False

    @property
    def files(self) -> dict[str, bytes]:
        """The graphs by file name."""
        files = {GRAPH_NAME: self.data, DECODER_GRAPH_NAME: self.decoder}
        return {name: data for name, data in files.items() if data is not None}

    @property
    def manifest_entries(self) -> dict[str, Any]:
        """The entries of the manifest about the graphs."""
        if self.imported:
            return {"runtimes": [ONNXRUNTIME], "graph": GRAPH_NAME}
        if self.data is None:
            return {"runtimes": [TENSORFLOW], "graph_refused": self.rejection}
        entries: dict[str, Any] = {"runtimes": [ONNXRUNTIME, TENSORFLOW], "graph": GRAPH_NAME}
        if self.decoder is not None:
            entries["decoder_graph"] = DECODER_GRAPH_NAME
        return entries


def write_graphs(spec: ModelSpec, weights: Mapping[str, FloatArray]) -> Graphs:
    """Export the graphs of a model, or return the reason why that is impossible."""
    try:
        network = spec.decoder_network
        decoder = None if network is None else write_graph(network, strip_decoder_prefix(weights))
        return Graphs(write_graph(spec, weights), decoder)
    except GraphUnsupportedError as error:
        return Graphs(rejection=str(error))
