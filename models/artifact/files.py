"""Atomic file replacement, validation of relative names, and safe opening of files."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import unicodedata
from pathlib import Path, PurePosixPath
from typing import BinaryIO


def write_new(file: Path, data: bytes) -> None:
    """Create a file and its directories, and sync the file to disk.

    Raises:
        FileExistsError: the file exists.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(file: Path, data: bytes) -> None:
    """Create or replace a file atomically."""
    temporary = file.parent / f".{file.name}.{secrets.token_hex(6)}.tmp"
    try:
        write_new(temporary, data)
        temporary.replace(file)
        sync_directory(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Sync the entries of a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def inside(name: str) -> bool:
    """Whether a relative name, with `/` as separator, stays inside its directory.

    False for names with control characters, including NUL, or lone surrogates.
    """
    parts = PurePosixPath(name).parts
    is_relative = bool(parts) and not name.startswith("/") and ".." not in parts
    is_unsafe = "\\" in name or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)
    return is_relative and not is_unsafe and str(PurePosixPath(name)) == name and name != "."


def open_regular(file: Path, folder: Path | None = None) -> BinaryIO:
    """Open a regular file for reading, without blocking.

    To avoid a race between check and use, inspect it through its descriptor (`os.fstat`), never
    again by its path. A FIFO, a device or a directory is rejected before a byte is read.

    Args:
        file: the file; symbolic links are followed.
        folder: the folder that the resolved file must be in; None for any.

    Raises:
        OSError: it cannot be opened, is not a regular file, or is outside the folder.
    """
    real = os.path.realpath(file)
    if folder is not None and not Path(real).is_relative_to(os.path.realpath(folder)):
        raise OSError(errno.EXDEV, f"expected a file inside the artifact, it leads to {real}")
    # without O_NONBLOCK, opening a FIFO waits for a writer
    handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "expected a regular file")
    return open(handle, "rb")
