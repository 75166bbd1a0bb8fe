"""Sequences of categories as events of streams: tokens of Python, hospital cases, log keys.

    code     the tokens of every file of Python's standard library (PSF licence), as installed
             with the running Python: nothing to download
    sepsis   1,049 cases of a hospital, `sepsis.csv` of the R package `eventdataR` (MIT); an event
             is an activity
    hdfs     4,854 blocks of a Hadoop file system, `hdfs_train` of the repository `logdeep` (MIT,
             of logs of loghub); an event is a log key, which is the template of a message

Every sequence is in one split as a whole: 70% are trained on, 15% choose, 15% are held out.
"""

from __future__ import annotations

import hashlib
import keyword
import sysconfig
import tokenize
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl

from models.errors import ModelsError

STREAM, ORDER, EVENT = "sequence", "at", "event"
SPLITS = ("2001-01-01", "2002-01-01", "2003-01-01")
"""Days that the events of training, choice and test are put on, since tables are split by time."""
SHARES = (0.70, 0.85)
SALT = "2:"
"""Prefix of the hashed paths, so that the split differs from that of an earlier rule."""
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "pydoc_data",
           "site-packages", "dist-packages", "ensurepip", "__phello__"}  # fmt: skip
"""Folders of the standard library that are not read: tests, data, and what is not part of it."""


def read_tokens(path: Path) -> list[str]:
    """The categories of the tokens of a Python file.

    Keywords and operators are their own category; a name, number, string, line end, indentation or
    its end is one of its type. Comments and empty lines have none.
    """
    categories: list[str] = []
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
                continue
            is_own = token.type == tokenize.OP or keyword.iskeyword(token.string)
            categories.append(token.string if is_own else tokenize.tok_name[token.type])
    return categories


def read_code(folder: Path | None) -> Iterator[tuple[str, list[str]]]:
    """The paths of Python files below a folder (the standard library by default), their tokens."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED & set(name.parts) and not name.parts[0].startswith("config-"):
            yield name.as_posix(), read_tokens(path)


def read_sepsis(folder: Path | None) -> Iterator[tuple[str, list[str]]]:
    """The names of the cases, and their activities in the order of time."""
    path = (folder or Path()) / "sepsis.csv"
    table = pl.read_csv(path, separator=";", infer_schema=False)
    cases = table.sort("Case ID", "Complete Timestamp", maintain_order=True)
    yield from cases.group_by("Case ID", maintain_order=True).agg("Activity").iter_rows()


def read_hdfs(folder: Path | None) -> Iterator[tuple[str, list[str]]]:
    """The numbers of the blocks, and their log keys."""
    lines = ((folder or Path()) / "hdfs_train").read_text(encoding="ascii").splitlines()
    yield from ((str(number), line.split()) for number, line in enumerate(lines))


READERS = {"code": read_code, "sepsis": read_sepsis, "hdfs": read_hdfs}


def read_sequences(name: str, folder: Path | None = None) -> pl.DataFrame:
    """All sequences of a set as events: `sequence`, `at` (their order, and the split), `event`.

    Args:
        name: one of `READERS`.
        folder: with the file of the set; of `code` with the Python files.

    Raises:
        ModelsError: the file is not there, or holds something else.
    """
    try:
        sequences = {key: events for key, events in READERS[name](folder) if len(events) > 1}
    except (OSError, ValueError, SyntaxError, pl.exceptions.PolarsError) as error:
        raise ModelsError(f"{name}: expected its sequences in {folder}: {error}") from error
    if name == "code":  # by the path alone, whatever other files there are
        digests = [hashlib.sha256((SALT + path).encode()).digest() for path in sequences]
        place = np.array([int.from_bytes(digest[:4], "big") / 2**32 for digest in digests])
    else:
        place = np.random.default_rng(0).permutation(len(sequences)) / len(sequences)
    days = [datetime.fromisoformat(SPLITS[split]) for split in np.digitize(place, SHARES)]
    names = [key.replace("/", ":") for key in sequences]  # streams of requests have no slash
    frame = pl.DataFrame({STREAM: names, EVENT: [*sequences.values()], ORDER: days})
    seconds = pl.duration(seconds=pl.int_range(pl.len()).over(STREAM))
    at = (pl.col(ORDER) + seconds).dt.strftime("%FT%TZ")
    return frame.explode(EVENT).select(STREAM, at, EVENT)
