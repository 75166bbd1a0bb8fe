"""Notes on how an imported model is served, compared with the original."""

from __future__ import annotations

from typing import Any

from models.spec.layers import RECURRENT
from models.spec.model import ModelSpec


def chunking_notes(spec: ModelSpec, model: Any, steps: int | None, *, explicit: bool) -> list[str]:
    """How the model's chunking relates to the original.

    Args:
        spec: the imported model.
        model: the original.
        steps: the fixed number of steps of the original's input, if it has one.
        explicit: whether its states are inputs of the original.
    """
    stateful = any(getattr(layer, "stateful", False) for layer in model._flatten_layers())
    if spec.chunking == "per_chunk":
        recurrent = [layer for layer in spec.layers if isinstance(layer, RECURRENT)]
        starts = " and ".join(
            f"{to.name!r} from {to.starts_from!r}" for to in recurrent if to.starts_from
        )
        return [
            f"chunking per_chunk: states are passed on within a call ({starts}), so a chunk, of at "
            f"most {spec.chunk_limit} steps, is one call of the original that continues from the "
            "stream's state; other chunk boundaries give other outputs"
        ]
    if spec.chunking == "whole":
        notes = [
            f"chunking whole: it takes whole sequences of at most {spec.chunk_limit} steps "
            "(predict), and has no streams"
        ]
        if stateful:
            notes.append("stateful=True is left out: each sequence begins in the zero state")
        return notes
    if steps is not None and steps > 1 and not stateful and not explicit:
        return [
            f"the original reads windows of {steps} events, each from the zero state "
            "(stateful=False): a stream carries its state beyond them, and its outputs equal the "
            f"original's on the first {steps} events alone; to begin from the zero state every "
            f"{steps} events, import it with --reset-every {steps}"
        ]
    return []
