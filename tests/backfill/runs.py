"""One run of `carry backfill` in a process of its own, and what it has finished so far."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

RESULTS: Final = ("outputs", "states", "rejected")
UNITS: Final = "shuffle"
RECORDS: Final = "done"
STEPS: Final = ((UNITS, "parquet"), (RECORDS, "json"))
"""The files of which each finishes a step: a unit, or a bucket."""

SMALL: Final = {"unit_rows": 20_000, "piece_rows": 8_192, "buckets": 20}
"""Sizes for `tests.backfill.command`."""

File = tuple[int, int, int]
"""Inode, size and time of writing."""


@dataclass(frozen=True)
class Run:
    """A backfill: the words of the command, and the folder of its results.

    Attributes:
        sizes: for `tests.backfill.command`; none for those of the product.
        prefix: words before the command, such as those of a limit.
        bug: that is planted, of `tests.backfill.command.BUGS`.
    """

    artifact: Path
    history: Path
    out: Path
    options: Sequence[str] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    prefix: Sequence[str] = ()
    bug: str = ""

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command in a session of its own; it writes a log beside its results."""
        command = [*self.prefix, sys.executable, "-m", "tests.backfill.command", "backfill"]
        places = map(str, (self.artifact, self.history, self.out))
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*command, *places, *self.options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "BACKFILL_SIZES": json.dumps(self.sizes),
                    "BACKFILL_BUG": self.bug,
                },
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        """What all its processes have printed."""
        return self.out.with_name(f"{self.out.name}.log")

    def printed(self, characters: int = 4000) -> str:
        """The end of the log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text.replace("\r", "\n")[-characters:]

    def finish(self) -> int:
        """Run it to its end, and return the exit status."""
        return self.start().wait()

    def count_finished(self) -> int:
        """The number of finished units and buckets."""
        return sum(len(list((self.out / name).glob(f"[!.]*.{kind}"))) for name, kind in STEPS)

    def count_buckets(self) -> int:
        """The number of finished buckets."""
        return len(list((self.out / RECORDS).glob("[!.]*.json")))

    def finished(self) -> dict[str, dict[str, File]]:
        """The files of each finished unit and bucket."""
        found: dict[str, dict[str, File]] = {}
        for path in (self.out / UNITS).glob("[!.]*.parquet"):
            found[f"{UNITS}/{path.stem}"] = _files([path])
        for record in (self.out / RECORDS).glob("[!.]*.json"):
            folders = [self.out / name for name in RESULTS]
            results = [path for each in folders for path in each.glob(f"{record.stem}.*")]
            found[record.stem] = _files([record, *results])
        return found

    def computed_again(self, before: Mapping[str, Mapping[str, File]]) -> list[str]:
        """Units and buckets that were finished before and have other files now.

        The files of units may be removed; those of buckets may not.
        """
        now = self.finished()
        return [
            name
            for name, files in before.items()
            if now.get(name) != files and not (name.startswith(UNITS) and name not in now)
        ]

    def digests(self) -> dict[str, str]:
        """The digest of each result, by its path in the folder."""
        return {
            f"{folder}/{path.name}": hashlib.blake2b(path.read_bytes()).hexdigest()
            for folder in RESULTS
            for path in sorted((self.out / folder).glob("*"))
        }

    def leftovers(self) -> list[str]:
        """Files that were written and not finished."""
        return sorted(str(path.relative_to(self.out)) for path in self.out.rglob(".*.tmp"))


def _files(paths: Sequence[Path]) -> dict[str, File]:
    found = {}
    for path in paths:
        with suppress(FileNotFoundError):  # removed meanwhile
            status = path.stat()
            found[path.name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found
