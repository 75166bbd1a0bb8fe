"""The interface between a model's graph and its runtime: tensor names, metadata, format version.

Imports nothing, so that a runtime can use it without the `onnx` package.
"""

from __future__ import annotations

GRAPH_FORMAT = "1"
"""Increased when the meaning of a name changes; older graphs are then regenerated."""

ROWS = "rows"
"""Input float32 [B, T, F], B >= 1, T >= 1; a categorical column holds its code."""
LENGTHS = "lengths"
"""Input int32 [B], each 1..T."""
STATES = "states"
"""Input float32 [B, N], packed as `models.spec.layout.network_state` says."""
OUTPUTS = "outputs"
"""Output float32 [B, T, O], packed as `models.spec.layout.output_spec` says."""
STATES_AFTER = "states_after"
"""Output float32 [B, N], the state after each row's last valid step."""

MARK_FORMAT = "carry.graph_format"
MARK_FINGERPRINT = "carry.fingerprint"
"""Keys of the graph's own metadata: `GRAPH_FORMAT`, and the model's fingerprint in hex."""
