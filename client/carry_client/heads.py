"""Keeps the head of a stream in a small file, so that a later process can compare its history."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Union

from carry_client.types import Head


class HeadFile:
    """The head of one stream in a JSON file, replaced as a whole by each write.

    The service stays the authority on the position; the file adds which history is this client's.
    """

    def __init__(self, path: str | os.PathLike[str], model: str, stream: str) -> None:
        """Nothing is read yet.

        Raises:
            FileNotFoundError: the directory does not exist, in which a chunk's head could not be
                saved after the chunk was applied.
        """
        self._path = Path(path)
        if not self._path.parent.is_dir():
            raise FileNotFoundError(f"save: expected a file in an existing directory, got {path}")
        self._name = {"model": model, "stream": stream}

    def read(self) -> Head | None:
        """The head that was written last; None without a file.

        Raises:
            ValueError: the file is of another stream, or no file of a head.
        """
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            document = json.loads(content)
            name = {member: document[member] for member in self._name}
            head = Head(int(document["position"]), str(document["epoch"]), str(document["tag"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self._path} does not hold the head of a stream") from error
        if name != self._name:
            raise ValueError(f"{self._path}: expected the head of {self._name}, got {name}")
        return head

    def write(self, head: Head) -> None:
        """Replace the file; a crash leaves the old one or the new one."""
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        new.write_text(json.dumps({**self._name, **head._asdict()}) + "\n", encoding="utf-8")
        new.replace(self._path)


Save = Union[str, "os.PathLike[str]", Callable[[Head], None]]
"""A file that keeps the head of one stream, or a function that does."""


def open_save(
    save: Save | None, head: Head | None, model: str, stream: str
) -> tuple[Head | None, Callable[[Head], None] | None]:
    """The saved head of a stream, and how to save the next one.

    Args:
        head: given by the caller; otherwise that of the file.
    """
    if save is None or callable(save):
        return head, save
    file = HeadFile(save, model, stream)
    return head or file.read(), file.write
