"""Sources of a backfill: files of events, in the order in which they count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from service.backfill.plan import BackfillError, Source


def find_sources(arguments: Sequence[str]) -> tuple[Source, ...]:
    """The files that the arguments name, sorted by name."""
    found = []
    for argument in arguments:
        path = Path(argument)
        files = (
            sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        )
        for file in files:
            if not file.is_file():
                raise BackfillError(f"expected an existing file, got {file}")
            status = file.stat()
            rows = max(1, status.st_size // 50)
            if file.suffix == ".parquet":
                rows = pl.scan_parquet(file).select(pl.len()).collect().item()
            found.append(
                Source(
                    path=str(file),
                    kind=file.suffix.removeprefix("."),
                    rows=rows,
                    size_bytes=status.st_size,
                    modified_ns=status.st_mtime_ns,
                )
            )
    return tuple(sorted(found, key=lambda source: source.path))
