"""The compiled library of detection, of the C files in this folder.

It is built when Carry is installed (`hatch_build.py`), and depends on the C library only.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray


@cache
def load_library() -> ctypes.CDLL:
    """The library.

    Raises:
        ImportError: it is missing, or built for another platform.
    """
    path = Path(__file__).with_name("libdetection.so")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"expected the compiled library of detection at {path}: run scripts/setup in a "
            f"checkout, or install Carry again ({error})"
        ) from error


def address_of(array: NDArray[Any]) -> int:
    """The address of an array's first element, to pass as a pointer."""
    address: int = array.__array_interface__["data"][0]
    return address
