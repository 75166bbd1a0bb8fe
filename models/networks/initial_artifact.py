"""Writes an artifact with initial weights from a seed, for tests and benchmarks.

Needs no data and no runtime, but a fitted schema: without its statistics events cannot be encoded.
Equal specs and seeds give equal fingerprints.
"""

from __future__ import annotations

from pathlib import Path

from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.errors import SpecError
from models.events.schema import (
    BooleanField,
    CategoricalField,
    EventField,
    NumericField,
    TimestampField,
)
from models.networks.initial_weights import draw_weights
from models.spec.model import ModelSpec


def initialise_artifact(spec: ModelSpec, out: Path, seed: int, overwrite: bool = False) -> Artifact:
    """Write the model with initial weights to the directory `out`.

    Args:
        spec: the model; its event schema, if it has one, must be fitted.
        out: the directory to create.
        seed: any integer >= 0.
        overwrite: whether an existing artifact is replaced.

    Raises:
        SpecError: the schema is not fitted; the message names each field and what is missing.
        ArtifactError: `out` exists.
    """
    if spec.events is not None:
        open_fields = [
            f"{field.name} ({', '.join(lacks)})"
            for field in spec.events.fields
            if (lacks := _lacking(field))
        ]
        if open_fields:
            raise SpecError(
                f"model {spec.name!r}: initial weights need a fitted schema, and without data "
                f"these are unknown: {', '.join(open_fields)}; state them in the spec, or train"
            )
    return write_artifact(
        out,
        spec,
        draw_weights(spec, seed),
        training={"initialised": {"seed": seed}},
        overwrite=overwrite,
    )


def _lacking(field: EventField) -> list[str]:
    match field:
        case NumericField():
            statistics = {"mean": field.mean, "std": field.std}
            if field.normalisation is not None:
                statistics["normalisation.std"] = field.normalisation.std
        case CategoricalField():
            return [] if field.vocabulary is not None else ["vocabulary"]
        case TimestampField():
            statistics = {"gap_mean": field.gap_mean, "gap_std": field.gap_std}
        case BooleanField():
            statistics = {}
    return [name for name, value in statistics.items() if value is None]
