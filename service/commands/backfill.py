"""`carry backfill`: turns recorded events into outputs and states of streams."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

History = Annotated[
    list[str],
    typer.Argument(
        metavar="HISTORY... OUT", help="Files or folders of events, and the output folder."
    ),
]


def backfill(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="The model's directory.")],
    history: History,
    stream: Annotated[
        str | None, typer.Option(help="Column of stream names; default: that of training.")
    ] = None,
    order_by: Annotated[
        str | None, typer.Option(help="Column that orders events; default: the timestamp.")
    ] = None,
    file_order: Annotated[
        bool, typer.Option("--file-order", help="Events are in the order of the files.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes; default: one per core.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in OUT.")] = False,
) -> None:
    """Compute the outputs and states of recorded events; the same command goes on after a stop."""
    from models.artifact.artifact import load_artifact
    from service.backfill.engines import Processes
    from service.backfill.run import BackfillOptions, open_job, plan_backfill, run_backfill

    if len(history) < 2:
        raise typer.BadParameter("expected HISTORY... and OUT")
    *sources, out = history
    loaded = load_artifact(artifact)
    options = BackfillOptions(stream=stream, order_by=order_by, file_order=file_order)
    job = open_job(loaded, plan_backfill(loaded, sources, options), Path(out))
    engine = Processes(job, workers or 1)
    try:
        report = run_backfill(job, engine, overwrite=overwrite)
    finally:
        engine.close()
    typer.echo(f"{out}: {report['events']:,} events of {report['streams']:,} streams")
