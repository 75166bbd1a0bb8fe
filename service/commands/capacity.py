"""`carry capacity`: prints the resources that streams of a model need, by `capacity_formula`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from models.artifact.artifact import Artifact

GIB = 2**30
UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def capacity(
    model: Annotated[
        str, typer.Argument(help="A served model's name, or the directory of an artifact.")
    ],
    streams: Annotated[int, typer.Option(min=1, help="How many streams there will be.")],
    rate: Annotated[float, typer.Option(min=0, help="Events per second, of all streams.")] = 0.0,
    chunk: Annotated[int, typer.Option(min=1, help="Events of a typical chunk.")] = 16,
    name_chars: Annotated[int, typer.Option(min=1, help="Average length of a stream's name.")] = 16,
    node_gib: Annotated[
        float, typer.Option(min=0.1, help="Memory of one server of the store, in GiB.")
    ] = 16.0,
    chunks_per_core: Annotated[
        float | None,
        typer.Option(min=1, help="Measured chunks per second of a worker on one core."),
    ] = None,
) -> None:
    """Print the memory, the workers and the servers that a number of streams needs."""
    from service.commands import capacity_formula as formula
    from service.settings import Settings
    from service.store.history_codec import HistoryCodec

    settings = Settings.load({})
    artifact = _find(model, settings.models.models_dir)
    chunks_per_s = rate / chunk
    prefix = f"{settings.store.namespace}{{p0000}}:s:{artifact.spec.name}:"
    state_bytes = 4 * artifact.state.float_size + 8 * artifact.state.int_size
    reply_bytes = 4 * chunk * artifact.outputs.size
    replies = min(streams, round(chunks_per_s * settings.store.reply_ttl_s)) if rate else streams
    if reply_bytes > settings.store.reply_max_bytes:
        replies = 0
    rows = {
        "model": f"{artifact.spec.name}, version {artifact.version}",
        "raw state": f"{state_bytes:,} bytes",
        "stored replies": f"{replies:,} of {reply_bytes:,} bytes",
    }
    history, entries, entry_bytes = settings.models.history_of(artifact.spec), 0, 0
    if history is not None:
        codec = HistoryCodec(artifact.spec.events, artifact.spec.input_features)
        entries = -(-history.events // chunk) + 1
        # with the tag before it
        entry_bytes = 8 + codec.estimate_bytes(min(chunk, history.events), chunk)
        rows["history"] = (
            f"{history.events:,} events, {entry_bytes:,} bytes a chunk; "
            f"{history.snapshots} snapshots"
        )
    for server in ("valkey", "redis"):
        data_bytes = formula.stored_bytes(
            server,
            streams=streams,
            state_bytes=state_bytes,
            key_bytes=len(prefix) + name_chars,
            replies=replies,
            reply_bytes=reply_bytes,
            idle_ttl=settings.store.idle_ttl_s > 0,
        )
        if history is not None:
            data_bytes += streams * formula.history_bytes(
                server,
                key_bytes=len(prefix) + name_chars,
                entries=entries,
                entry_bytes=entry_bytes,
                snapshots=history.snapshots,
                state_bytes=state_bytes,
            )
        servers = formula.primaries(data_bytes, node_gib * GIB, chunks_per_s)
        rows |= {
            f"{server}: data": f"{_size(data_bytes)}, {data_bytes / streams:,.0f} bytes a stream",
            f"{server}: memory": _size(formula.COPY_FACTOR * data_bytes),
            f"{server}: primaries": f"{servers:,} of {node_gib:g} GiB",
        }
    cache_bytes = formula.cache_bytes(streams, state_bytes)
    rows["state cache"] = f"{_size(cache_bytes)} in each worker holds every state"
    if rate:
        per_core = chunks_per_core or formula.CHUNKS_PER_S
        rows["workers"] = (
            f"{formula.workers(chunks_per_s, per_core):,}, each on a core, for "
            f"{chunks_per_s:,.0f} chunks/s at {formula.UTILIZATION:.0%} of {per_core:,.0f}"
        )
    for name, value in rows.items():
        typer.echo(f"{name:{max(map(len, rows))}}  {value}")


def _find(model: str, directory: Path) -> Artifact:
    """The artifact of a path, or of a name among the served models.

    Raises:
        ArtifactError: there is none.
    """
    from models.artifact.artifact import load_artifact
    from models.errors import ArtifactError
    from service.model_files import load_models

    if os.sep in model or Path(model).is_dir():
        return load_artifact(Path(model))
    artifacts = {artifact.spec.name: artifact for artifact in load_models(directory)}
    if model not in artifacts:
        raise ArtifactError(
            f"expected one of the models {sorted(artifacts)} of {directory}, or the path of an "
            f"artifact, got {model!r}"
        )
    return artifacts[model]


def _size(size: float) -> str:
    """A number of bytes for people."""
    unit_bytes, unit = next(each for each in UNITS if size >= each[0] or each[0] == 1)
    return f"{size / unit_bytes:.{int(unit_bytes > 1)}f} {unit}"
