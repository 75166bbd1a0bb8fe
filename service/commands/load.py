"""`carry streams load`: writes the states of a backfill into a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.common import DataDir, RedisUrl, run_on_store, show_progress

if TYPE_CHECKING:
    from service.backfill.load_progress import LoadProgress
    from service.store.base import Store


def load_streams(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of `carry backfill`.")],
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Also overwrite streams that live and do not come from this folder."
        ),
    ] = False,
    rate: Annotated[
        float,
        typer.Option(min=0, metavar="STREAMS_PER_S", help="Most streams a second; 0: no limit."),
    ] = 0.0,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Write the states of a backfill into a store, whether the service runs or not.

    A stream that lives in the store is kept, and listed in OUT/kept.csv. The command can be
    repeated: what was loaded before is recognised.
    """
    from service.backfill.load import load_states
    from service.backfill.plan import read_plan

    read_plan(out)  # a wrong folder starts no store
    with show_progress("loading") as show:

        async def load(store: Store) -> LoadProgress:
            return await load_states(
                *(store, out),
                overwrite=overwrite,
                rate_per_s=rate,
                report=lambda progress: show(progress.done, progress.total),
            )

        progress = run_on_store(redis_url, data_dir, load, create=True)
    for line in describe_load(progress, out):
        typer.echo(line, err=True)


def describe_load(progress: LoadProgress, out: Path) -> list[str]:
    """The lines that say what was loaded, and where consumers start."""
    from service.backfill.load_progress import KEPT_FILE, describe_starts

    line = f"loaded {progress.loaded:,} stream{'' if progress.loaded == 1 else 's'}"
    if progress.loaded_before:
        line += f", {progress.loaded_before:,} were loaded before"
    if progress.kept:
        line += f", kept {len(progress.kept):,} that the store has ({out / KEPT_FILE})"
    return [
        line,
        *(
            f"new consumers of {topic}: start: {start}"
            for topic, start in describe_starts(progress).items()
        ),
    ]
