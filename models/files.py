"""Files that are there whole or not at all, and names that stay inside their folder."""

from __future__ import annotations

import os
import secrets
from pathlib import Path, PurePosixPath


def write_new(file: Path, data: bytes) -> None:
    """Write a file that is not there yet, and its folders, through to the disk.

    Raises:
        FileExistsError: it is there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(file: Path, data: bytes) -> None:
    """Put a file in place, whole, whether or not one was there."""
    made = file.parent / f".{file.name}.{secrets.token_hex(6)}.tmp"
    try:
        write_new(made, data)
        made.replace(file)
        sync_directory(file.parent)
    finally:
        made.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make the names in a folder last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def inside(name: str) -> bool:
    """Whether a relative name, with `/` between folders, leads nowhere else."""
    parts = PurePosixPath(name).parts
    plain = bool(parts) and not name.startswith("/") and ".." not in parts
    return plain and "\\" not in name and str(PurePosixPath(name)) == name and name != "."
