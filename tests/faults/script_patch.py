"""Patches the store's Lua scripts, for planted bugs.

A planted bug is a `sitecustomize.py` in a folder of its own below `planted_bugs/`, which a run puts
on the workers' PYTHONPATH; the service knows nothing of it.
"""

from __future__ import annotations

from pathlib import Path


def replace_in_script(script: str, old: str, new: str) -> None:
    """Let a Lua script of the store be read with another text.

    Raises:
        ValueError: the script does not hold the old text just once.
    """
    read = Path.read_bytes
    name = f"{script}.lua"

    def changed(path: Path) -> bytes:
        found = read(path)
        if path.name != name:
            return found
        if found.count(old.encode()) != 1:
            raise ValueError(f"{path}: expected {old!r} once")
        return found.replace(old.encode(), new.encode())

    Path.read_bytes = changed
