"""Exports recurrent PyTorch models with explicit states to ONNX, ready for `carry import`.

    pip install torch onnx onnxscript
    python torch_models.py

Each `forward` takes the states besides the features and returns the next ones, which makes them
inputs and outputs of the graph. The dynamic axes let it run on any batch and any number of steps.
"""

from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent


class LstmModel(nn.Module):
    """nn.LSTM and a linear layer; states [layers, B, H], as PyTorch has them."""

    def __init__(self, features: int = 4, units: int = 8, layers: int = 2):
        super().__init__()
        self.lstm = nn.LSTM(features, units, layers, batch_first=True)
        self.head = nn.Linear(units, 3)

    def forward(self, x: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (hn, cn) = self.lstm(x, (h0, c0))
        return self.head(y), hn, cn


class GruModel(nn.Module):
    """nn.GRU with the time first, PyTorch's default layout [T, B, F]."""

    def __init__(self, features: int = 4, units: int = 8):
        super().__init__()
        self.gru = nn.GRU(features, units)
        self.head = nn.Linear(units, 2)

    def forward(self, x: Tensor, h_in: Tensor) -> tuple[Tensor, Tensor]:
        y, h_out = self.gru(x, h_in)
        return self.head(y), h_out


class GruCellModel(nn.Module):
    """nn.GRUCell: a graph of one step, whose hidden state is also its output."""

    def __init__(self, features: int = 4, units: int = 8):
        super().__init__()
        self.cell = nn.GRUCell(features, units)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.cell(x, hidden)


def export(
    model: nn.Module,
    name: str,
    inputs: dict[str, Tensor],
    outputs: list[str],
    dynamic: tuple[Any, ...],
) -> None:
    """Write one ONNX file, without the notes on Python's source that PyTorch adds."""
    program = torch.onnx.export(
        model.eval(),
        tuple(inputs.values()),
        input_names=list(inputs),
        output_names=outputs,
        dynamic_shapes=dynamic,
        dynamo=True,
    )
    graph = program.model_proto
    for message in (
        graph,
        graph.graph,
        *graph.graph.node,
        *graph.graph.value_info,
        *graph.graph.input,
        *graph.graph.output,
        *graph.graph.initializer,
    ):
        message.ClearField("metadata_props")
        message.ClearField("doc_string")
    graph.graph.ClearField("value_info")
    onnx.save(graph, FOLDER / f"{name}.onnx")


def main() -> None:
    """Write one ONNX file for each model."""
    torch.manual_seed(1)
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    export(
        LstmModel(),
        "torch_lstm",
        {"x": torch.zeros(2, 3, 4), "h0": torch.zeros(2, 2, 8), "c0": torch.zeros(2, 2, 8)},
        ["y", "hn", "cn"],
        ({0: batch, 1: steps}, {1: batch}, {1: batch}),
    )
    export(
        GruModel(),
        "torch_gru",
        {"x": torch.zeros(3, 2, 4), "h_in": torch.zeros(1, 2, 8)},
        ["y", "h_out"],
        ({0: steps, 1: batch}, {1: batch}),
    )
    export(
        GruCellModel(),
        "torch_gru_cell",
        {"x": torch.zeros(2, 4), "hidden": torch.zeros(2, 8)},
        ["next_hidden"],
        ({0: batch}, {0: batch}),
    )


if __name__ == "__main__":
    main()
